"""How often weights were rounded to few bits: by whoever published them so, and by every stage that quantized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moe_compress.checkpoints.folder import read_manifest
from moe_compress.checkpoints.formats.registry import QUANTIZATION
from moe_compress.checkpoints.partly_packed import packed_kinds
from moe_compress.checkpoints.reader import Checkpoint
from moe_compress.models import hf


def times_rounded(source: Checkpoint, report: Mapping[str, Any]) -> dict[str, int]:
    """By part of a layer, the stage included that left this report on top of the source."""
    earlier = [part["rounded"] for part in _earlier_report(source) if "rounded" in part]
    times: dict[str, int] = dict(earlier[-1]) if earlier else {}
    if not earlier and source.values.get(QUANTIZATION):
        published = packed_kinds(hf.skeleton(source.config, source.dense_dtype), source.values)
        times = dict.fromkeys(sorted(published), 1)
    for kind, share in report.get("quantized", {}).items():
        times[kind] = times.get(kind, 0) + bool(share)
    return {kind: count for kind, count in times.items() if count}


def _earlier_report(source: Checkpoint) -> Sequence[Mapping[str, Any]]:
    """What earlier stages reported; a manifest that is not ours says nothing of the weights, and stops no run."""
    try:
        found: Sequence[Mapping[str, Any]] = (read_manifest(source.folder) or {}).get("report", ())
    except ValueError:
        return ()
    return found
