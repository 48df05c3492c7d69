"""The log of one run: a JSON line an event."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from moe_compress.utils.files import room_for
from moe_compress.utils.logging import log


class RunLog:
    """One JSONL file a run: a line per event, with seconds since the start; a run that does nothing leaves none."""

    def __init__(self, path: Path | None, **options: Any) -> None:
        self.path = path
        self.options = options
        self.started = time.perf_counter()

    def event(self, name: str, **fields: Any) -> None:
        """Append one line; also say it at debug level."""
        line = {"event": name, "seconds": round(time.perf_counter() - self.started, 3), **fields}
        log.debug("%s", line)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            first = [] if self.path.exists() else [{"event": "started", "seconds": 0.0, **self.options}]
            with room_for(self.path), self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(each) + "\n" for each in [*first, line])
