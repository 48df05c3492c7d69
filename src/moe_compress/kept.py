"""What reports of harnesses have in common: they are values, and kept as JSON under a name."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from moe_compress.runtime import write_json


class Kept:
    """A dataclass that is kept in a folder, named by its model unless it says otherwise."""

    model: str

    @property
    def file_name(self) -> str:
        """Without its ending."""
        return Path(self.model).name

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)  # type: ignore[call-overload]

    def save(self, folder: Path) -> Path:
        """Write it, and say where."""
        path = folder / f"{self.file_name}.json"
        write_json(path, self.to_json())
        return path
