"""What a teacher said of a text, kept on disk: it runs once, for every student that learns from it on that text.

A cache is a folder of shards, each of some windows; a shard is written as a whole and has a digest, so that one that is
there and agrees with it is finished, and any other is made (again). P predicted tokens, N windows.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from moe_compress.checkpoints.safetensors_file import write_shard
from moe_compress.data.windows import Windows
from moe_compress.methods.recovery_method import Keeping
from moe_compress.utils.files import read_json, write_json
from moe_compress.utils.hashing import fingerprint, tensor_bytes

VERSION = 1
TOKENS_PER_SHARD = 1 << 14
INDEX = "teacher.json"
IDENTITY, DIGEST, AGREES, ABOUT = "identity", "digest", "agrees_on", "about"


class TeacherCache:
    """What is kept of one teacher on one text.

    said: the teacher's fingerprint, its arithmetic; with the text's fingerprint, and what is kept, the identity; about:
    what else is to be remembered of the teacher, for whoever does not load it.
    """

    def __init__(self, place: Path, keeping: Keeping, windows: Windows, said: Mapping[str, Any]) -> None:
        self.keeping, self.windows = keeping, windows
        self.said = {**said, **keeping.said, "text": windows.fingerprint}
        self.identity = fingerprint(VERSION, self.said)
        self.folder = place / self.identity
        self.per = max(1, TOKENS_PER_SHARD // windows.ids_NS.shape[1])
        self.count = -(-len(windows) // self.per)
        predicted_N = torch.bincount(windows.predictions()[:, 0], minlength=len(windows))
        self.end_N = predicted_N.cumsum(0)
        self.start_N = self.end_N - predicted_N
        self.whole: set[int] = set()
        self.about: dict[str, Any] = {}

    def open(self) -> None:
        """See which shards are whole. ValueError if the folder is another cache's."""
        if self._index().get(IDENTITY, self.identity) != self.identity:
            raise ValueError(
                f"{self.folder} was kept of another teacher, text or number of tokens than its name says: remove it, "
                "and it is made anew."
            )
        self.whole = {shard for shard in range(self.count) if self._is_whole(shard)}

    @property
    def missing(self) -> set[int]:
        """Shards that are not there, or not as they were written."""
        return set(range(self.count)) - self.whole

    def inside(self, shard: int) -> range:
        """The windows of a shard."""
        return range(shard * self.per, min((shard + 1) * self.per, len(self.windows)))

    def rows(self, shard: int) -> int:
        """The tokens that they predict."""
        inside = self.inside(shard)
        return int(self.end_N[inside[-1]] - self.start_N[inside[0]])

    def targets(self, window_N: Tensor) -> dict[str, Tensor]:
        """What is kept of all tokens that windows of these numbers predict, in their order, [P, ...]."""
        parts: list[dict[str, Tensor]] = []
        for window in window_N.tolist():
            shard = window // self.per
            base = int(self.start_N[self.inside(shard)[0]])
            part = slice(int(self.start_N[window]) - base, int(self.end_N[window]) - base)
            with safe_open(self._file(shard), "pt") as kept:
                parts.append({key: kept.get_slice(key)[part] for key in kept.keys()})  # noqa: SIM118
        return {key: torch.cat([each[key] for each in parts]) for key in parts[0]}

    def write(self, shard: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep a shard."""
        write_shard(self._file(shard), tensors, {IDENTITY: self.identity, DIGEST: _digest(tensors)})
        self.whole.add(shard)

    def _is_whole(self, shard: int) -> bool:
        """Whether its bytes are those that were written for this teacher and text."""
        try:
            with safe_open(self._file(shard), "pt") as kept:
                meta = kept.metadata() or {}
            tensors = load_file(self._file(shard))
        except (OSError, SafetensorError):
            return False
        right = meta.get(IDENTITY) == self.identity and {len(each) for each in tensors.values()} == {self.rows(shard)}
        return right and meta.get(DIGEST) == _digest(tensors)

    def _file(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.safetensors"

    # --- what is said of it -----------------------------------------------------------------------------------

    @property
    def agreed(self) -> bool:
        """Whether what is there was made, or found to agree with the teacher, by the libraries that compute here."""
        return not self.whole or _libraries() in self._index().get(AGREES, [])

    def note(self, *, begun: bool = False) -> None:
        """Say of the folder what it is, and that it agrees with what computes here, alone if it is only `begun`."""
        known = [] if begun else self._index().get(AGREES, [])
        agrees = list(dict.fromkeys([*known, _libraries()]))
        known_by = {IDENTITY: self.identity, "version": VERSION, **self.said}
        write_json(self.folder / INDEX, {**known_by, AGREES: agrees, ABOUT: self.remembered})

    def _index(self) -> dict[str, Any]:
        try:
            found = read_json(self.folder / INDEX)
        except ValueError:  # none, or one cut short: shards say themselves what they are of
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def remembered(self) -> dict[str, Any]:
        """What was said about the teacher when it was loaded."""
        return {**self._index().get(ABOUT, {}), **self.about}

    def report(self) -> dict[str, Any]:
        """What is reported of it."""
        size = sum(self._file(shard).stat().st_size for shard in self.whole)
        each = round(size / max(1, int(self.end_N[-1])), 1)
        return {"identity": self.identity, "bytes": size, "bytes_per_token": each}


def _libraries() -> str:
    """The versions that logits depend on."""
    return f"torch {torch.__version__}, transformers {transformers.__version__}"


def _digest(tensors: Mapping[str, Tensor]) -> str:
    return fingerprint(*(part for key in sorted(tensors) for part in (key, tensor_bytes(tensors[key]))))
