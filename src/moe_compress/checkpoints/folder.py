"""The folder a checkpoint is written into: under another name until it is whole, and what a killed run left of it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from moe_compress.utils.files import read_json, require_writable

CARD = "README.md"

STATE = "state.json"
SCRATCH = "scratch"
MANIFEST = "moe_compress.json"


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class _Base(_Part):
    model: str
    commit: str | None
    fingerprint: str


class _Stage(_Part):
    method: str
    given: dict[str, Any]
    parameters: dict[str, Any]


class _Cost(_Part):
    surgery_seconds: float
    peak_bytes: float


class _Manifest(_Part):
    """What readers of a manifest need."""

    identity: str
    form: Literal["plain", "edited"]
    base: _Base
    stages: list[_Stage]
    report: list[dict[str, Any]]
    cost: _Cost


def partial_folder(out: Path) -> Path:
    """Where an unfinished checkpoint is kept."""
    return out.with_name(out.name + ".partial")


def stage_folder(out: Path, number: int) -> Path:
    """Where the checkpoint behind the stage of that number (from 0) is kept until the last one is there."""
    return out.with_name(f"{out.name}.stage{number + 1}")


def require_free(out: Path) -> None:
    """Refuse an output folder that holds anything, that no rename can make, or beside which a foreign one stands."""
    if not out.name:
        raise ValueError(f"{out} has no name that an unfinished folder could stand beside: choose another out=.")
    require_writable(out.parent, f"out={out}")
    if out.is_symlink() or out.is_mount():
        kind, other = ("a symbolic link", "where it leads") if out.is_symlink() else ("a mount point", "a folder in it")
        raise ValueError(f"{out} is {kind}, and a checkpoint gets its name by a rename: choose {other} with out=.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} already holds something: choose another folder with out=, or remove it first.")
    _require_ours(partial_folder(out))


def _require_ours(partial: Path) -> None:
    if os.path.lexists(partial) and not partial.is_dir():
        raise ValueError(
            f"{partial} is a file where the unfinished checkpoint would be kept: move it away, or choose another out=."
        )
    strange = [path.name for path in partial.glob("*") if path.name != STATE + ".tmp"]
    if strange and begun_identity(partial) is None:
        raise ValueError(f"{partial} is not unfinished work of moe-compress: move it away, or choose another out=.")


def begun_identity(partial: Path) -> str | None:
    """Which run began this folder; None if this package did not. Killed just before its renaming, it has no state."""
    for name in (STATE, MANIFEST):
        if (partial / name).is_file():
            found = read_json(partial / name)
            return str(found.get("identity")) if isinstance(found, dict) else None
    return None


def clear_partial(partial: Path) -> None:
    """Remove all that unfinished work holds; what marks it as ours goes last, in case of a kill."""
    for path in sorted(partial.iterdir(), key=lambda path: path.name in (STATE, MANIFEST)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def remove_scratch(folder: Path) -> None:
    """Remove what only the run that wrote a checkpoint had to remember."""
    shutil.rmtree(folder / SCRATCH, ignore_errors=True)


def begun_bytes(out: Path) -> int:
    """What an interrupted run has already written of a checkpoint."""
    return sum(path.stat().st_size for path in partial_folder(out).glob("*.safetensors"))


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What a finished checkpoint of ours says about itself; None for any other folder."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    manifest = read_json(path)
    try:
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        wrong = error.errors()[0]
        where = ".".join(map(str, wrong["loc"])) or "all of it"
        raise ValueError(
            f"{path} is not what moe-compress writes into a checkpoint ({where}: {wrong['msg'].lower()}): remove it, "
            "or make the folder anew."
        ) from error
    found: dict[str, Any] = manifest
    return found


def remove_intermediate(folder: Path) -> None:
    """Remove a checkpoint between two stages, and nothing else; what marks it as such goes last, in case of a kill."""
    if not (read_manifest(folder) or {}).get("intermediate"):
        return
    for path in sorted(folder.iterdir(), key=lambda path: path.name == MANIFEST):
        path.unlink()
    folder.rmdir()


RECIPE = "recipe.yaml"
# What factors save, in the words of the founding documents.
STATISTICS = "compression_statistics.yaml"
