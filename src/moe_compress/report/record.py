"""One JSON record a run: what was done, how it was measured, what came out. This module knows nothing of ours."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "moe-compress")


class Metric(BaseModel):
    """A number, its unit and its 95 % interval (None: no interval can be given)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    value: float
    unit: str
    interval: tuple[float, float] | None = None


class Record(BaseModel):
    """A run. A table holds records of one protocol; what was not measured is absent.

    name: the row's name; model: the original, base: its commit and fingerprint; recipe: resolved stages (none for
    the original itself); protocol: all that a number depends on besides the model; sizes: parameters, bytes, ...
    cost: seconds and peak bytes; report: what the method had to say (experts without tokens, stability).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    version: int = 1
    name: str
    model: str
    base: dict[str, Any]
    recipe: list[dict[str, Any]]
    seed: int
    form: str
    protocol: dict[str, Any]
    metrics: dict[str, Metric]
    sizes: dict[str, float]
    cost: dict[str, float]
    report: list[dict[str, Any]]
    environment: dict[str, Any]
    written: str

    def save(self, folder: Path) -> Path:
        """Write the record under its name, whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.model_dump(mode="json"), indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
        return path


def load_records(paths: Iterable[Path]) -> list[Record]:
    """Read records; a file that is none is named."""
    records = []
    for path in paths:
        try:
            records.append(Record.model_validate_json(path.read_text(encoding="utf-8")))
        except (ValidationError, UnicodeDecodeError, OSError) as error:
            raise ValueError(f"{path} is not a record of moe-compress: {str(error).splitlines()[0]}") from error
    return records


def environment() -> dict[str, Any]:
    """Machine and library versions."""
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
        "cpus": os.cpu_count(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def now() -> str:
    """The time, in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
