"""Model cards: README.md of a checkpoint, written with it, and again with its numbers once it is evaluated."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_compress.checkpoint.reader import Checkpoint
from moe_compress.checkpoint.writer import manifest_of
from moe_compress.harness.flops import sizes
from moe_compress.model import hf
from moe_compress.model.applying import apply_edits
from moe_compress.model.packing_config import packed_edits, says_packed, scale_bytes
from moe_compress.report.card import model_card, untouched
from moe_compress.report.record import Record
from moe_compress.runtime import atomic_write

CARD = "README.md"
LICENCES = ("LICENSE*", "LICENCE*")


def card_of(
    name: str,
    base: Checkpoint,
    manifest: Mapping[str, Any],
    values: Mapping[str, Any],
    record: Record | None = None,
    original: Record | None = None,
) -> str:
    """The card of a checkpoint made from `base`; values: its config.json."""
    counted = () if record else [_sizes(base, each) for each in (values, base.values)]
    licences = [path for pattern in LICENCES for path in sorted(base.folder.glob(pattern))]
    return model_card(
        manifest, record, original, name=name, packed=says_packed(values),
        base_card=_text(base.folder / CARD), licence_text=_text(licences[0]) if licences else "",
        licence_files=[path.name for path in licences], sizes=counted,
    )  # fmt: skip


def _sizes(base: Checkpoint, values: Mapping[str, Any]) -> dict[str, float]:
    """What a config alone says of a checkpoint that was not evaluated; FLOPs depend on a text and are left out."""
    model = hf.skeleton(hf.config_from(dict(values)), base.stored_dtype)
    apply_edits(model, packed_edits(model, values))
    found = sizes(model, 1, base.stored_dtype, scale_bytes(values)).to_json()
    return {key: value for key, value in found.items() if key != "flops_per_token"}


def update_card(checkpoint: Checkpoint, base: Checkpoint, record: Record, original: Record) -> None:
    """Put an evaluation into the card that was written with a checkpoint of ours; nothing for any other folder."""
    manifest, path = manifest_of(checkpoint.folder), checkpoint.folder / CARD
    if manifest is None or manifest["base"]["fingerprint"] != base.fingerprint:
        return
    # A card that was changed since it was written is its owner's.
    if untouched(_text(path)):
        card = card_of(checkpoint.folder.name, base, manifest, checkpoint.values, record, original)
        atomic_write(path, card.encode())


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
