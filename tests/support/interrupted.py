"""Runs that are stopped at a call, and what they leave."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import moe_compress
from moe_compress.checkpoints import writer
from moe_compress.checkpoints.folder import MANIFEST
from moe_compress.engine import forward
from support.pruned import Options, report


class Interrupted(Exception):
    """Stands for whatever stops a run in the middle."""


def counting(monkeypatch: pytest.MonkeyPatch, place: object, name: str, stop_at: int | None = None) -> list[int]:
    """Count the calls of a function, and stop the run at one of them."""
    calls: list[int] = []
    real = getattr(place, name)

    def counted(*args: object, **keywords: object) -> object:
        if len(calls) == stop_at:
            raise Interrupted
        calls.append(1)
        return real(*args, **keywords)

    monkeypatch.setattr(place, name, counted)
    return calls


def outcome(folder: Path) -> dict[str, bytes]:
    """What must not depend on how often a run was stopped: all but the manifest, which has the seconds, and the card,
    which has the folder's name.
    """
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in (MANIFEST, "README.md")}
    manifest = json.loads((folder / MANIFEST).read_text())
    files["manifest"] = json.dumps([manifest["identity"], manifest["stages"], manifest["form"]]).encode()
    return files


def leftovers(results: Path) -> list[str]:
    found = [path.name for path in results.rglob("*") if path.suffix in (".tmp", ".partial")]
    return found + [path.name for path in results.rglob("*.stage*")]


def outcomes(
    sentences: Mapping[str, str], options: Options, place: Path
) -> Callable[[str], tuple[dict[str, bytes], dict[str, Any]]]:
    """name -> the outcome of its recipe and what is reported, never interrupted."""

    @functools.cache
    def of(name: str) -> tuple[dict[str, bytes], dict[str, Any]]:
        folder = moe_compress.compress(sentences[name], **{**options, "out": place / name}).folder
        return outcome(folder), report(folder)

    return of


def stopped_run(
    sentence: str, point: tuple[object, str, int], options: Options, monkeypatch: pytest.MonkeyPatch
) -> tuple[int, int, Path]:
    """Stop a run somewhere and run it again; returns how many layers that ran and wrote, and the checkpoint."""
    place, function, number = point
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        counting(patch, place, function, stop_at=number)
        moe_compress.compress(sentence, **options)
    assert not Path(str(options["out"])).exists()
    with monkeypatch.context() as patch:
        layers, written = counting(patch, forward.hf, "run_layer"), counting(patch, writer, "write_shard")
        folder = moe_compress.compress(sentence, **options).folder
    return len(layers), len(written), folder
