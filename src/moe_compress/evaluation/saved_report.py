"""What reports of harnesses have in common: they are values, and kept as JSON under a name, with a digest."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moe_compress.reports.record import VERSION, digest_of
from moe_compress.utils.files import as_json, write_json


def save_sealed(path: Path, values: dict[str, Any]) -> Path:
    """Write values as JSON with a digest, whole or not at all."""
    # Read again, so that the digest is of what a reader of the file will see.
    sealed = {**json.loads(as_json(values)), "version": VERSION}
    write_json(path, {**sealed, "digest": digest_of(sealed)})
    return path


class SavedReport:
    """A dataclass that is kept in a folder, named by its model and, where its numbers depend on more, by its `id`."""

    model: str
    id: str = ""

    @property
    def file_name(self) -> str:
        """Without its ending."""
        return f"{self.model}-{self.id[:6]}" if self.id else Path(self.model).name

    @property
    def exit_code(self) -> int:
        """What a command ends with that made it."""
        return 0

    def markdown(self) -> str:
        """What a command prints."""
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)  # type: ignore[call-overload]

    def save(self, folder: Path) -> Path:
        """Write it, and say where."""
        return save_sealed(folder / f"{self.file_name}.json", self.to_json())
