"""One JSON record a run: what was done, how it was measured, what came out. This module knows nothing of ours."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import platform
import re
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict

from moe_compress.utils.files import atomic_write

VERSION = 2
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "moe-compress")


class Metric(BaseModel):
    """A number, its unit and its 95 % interval (None: no interval can be given)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    value: float
    unit: str
    interval: tuple[float, float] | None = None


class SealedModel(BaseModel):
    """What is saved as JSON with a hash of all else in it: changed afterwards, it is refused. name: the file's."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    version: int = VERSION
    digest: str | None = None

    def sealed(self) -> Self:
        """The same with its digest."""
        values = self.model_dump(mode="json", exclude={"digest"})
        return self.model_copy(update={"digest": digest_of(values)})

    def save(self, folder: Path) -> Path:
        """Write it under its name, whole or not at all."""
        text = json.dumps(self.sealed().model_dump(mode="json"), indent=1)
        return write_whole(folder / f"{self.name}.json", text + "\n")


class Record(SealedModel):
    """A run. A table holds records of one protocol; what was not measured is absent.

    name: the row's name; model: the original, base: its commit and fingerprint; recipe: resolved stages (none for
    the original itself); protocol: all that a number depends on besides the model; sizes: parameters, bytes, ...
    cost: seconds and peak bytes; report: what the method had to say (experts without tokens, stability);
    fingerprint: of what was measured (None in records that are older than it).
    """

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
    fingerprint: str | None = None


class Failure(SealedModel):
    """A run that did not finish. recipe: its sentence; reason: what went wrong; written: when, in UTC."""

    model: str
    recipe: str
    reason: str
    written: str

    def overtaken(self, records: Iterable[Record]) -> bool:
        """Whether the run has a record since; its name may end in what it was measured on."""
        name = re.compile(f"{re.escape(self.name)}(-[0-9a-f]{{6}})?")
        return any(record.written >= self.written and name.fullmatch(record.name) for record in records)


def write_whole(path: Path, text: str) -> Path:
    """Write a file, whole or not at all, and say where."""
    atomic_write(path, text.encode())
    return path


def digest_of(values: Mapping[str, Any]) -> str:
    """Hash of a record's JSON without its own digest, whatever its spaces and the order of its keys."""
    rest = {key: value for key, value in values.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:16]


def environment() -> dict[str, Any]:
    """Machine and library versions."""
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
        "cpus": os.cpu_count(),
        "processor": processor(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def processor() -> str:
    """What the processor is called, as far as the system says."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def now() -> str:
    """The time, in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
