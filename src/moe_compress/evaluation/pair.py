"""A checkpoint and the original it is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_compress.checkpoints.folder import read_manifest
from moe_compress.checkpoints.reader import Checkpoint
from moe_compress.checkpoints.resolve import resolve_model
from moe_compress.run.context import Run, start
from moe_compress.run.options import make_options
from moe_compress.utils.files import require_writable
from moe_compress.utils.logging import log


def open_pair(
    checkpoint: str | Path, original: str | Path | None, options: dict[str, Any], command: str
) -> tuple[Checkpoint, Checkpoint, Run]:
    """A checkpoint, its original, and a run with the original's defaults."""
    if "model" in options:
        raise ValueError(f"{command} takes the checkpoint as its first word; what it is compared with is original=.")
    given = make_options({**options, "model": checkpoint})
    opened = resolve_model(given.model, given.revision)
    base = original_for(opened, original)
    require_writable(Path(given.results) / command, f"results={given.results}")
    return opened, base, start(given.model_copy(update={"model": base.name}).resolved())


def require_same_tokens(checkpoint: Checkpoint, base: Checkpoint) -> None:
    """ValueError for models of different vocabularies."""
    words, others = base.text_config.vocab_size, checkpoint.text_config.vocab_size
    if words != others:
        raise ValueError(f"{checkpoint.name} has {others} tokens and {base.name} {words}: they cannot be compared.")


def original_for(checkpoint: Checkpoint, named: str | Path | None) -> Checkpoint:
    """What a checkpoint was made from, unless another one is named; itself if it was made from none."""
    if named is not None:
        return resolve_model(str(named))
    base = (read_manifest(checkpoint.folder) or {}).get("base")
    if base is None:
        return checkpoint
    try:
        original = resolve_model(base["model"], base["commit"])
    except ValueError as error:
        raise ValueError(f"the original of {checkpoint.name} is needed (or original=): {error}") from error
    if original.fingerprint != base["fingerprint"]:
        log.warning("%s is not what it was when %s was made from it.", original.name, checkpoint.name)
    return original
