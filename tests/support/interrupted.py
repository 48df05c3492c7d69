"""Runs that are stopped at a call, and what they leave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_compress.checkpoints.folder import MANIFEST


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
