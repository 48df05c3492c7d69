"""What the parts of one run share: its options, its arithmetic, its texts, its log and its folders."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moe_compress.checkpoint.load import load_tokenizer
from moe_compress.checkpoint.locate import open_model
from moe_compress.checkpoint.reader import Checkpoint
from moe_compress.checkpoint.writer import manifest_of
from moe_compress.recipe import Options, make_options
from moe_compress.report.record import now
from moe_compress.runtime import RunLog, log, require_writable, resolve_device, resolve_dtype
from moe_compress.stream.data import Windows, make_windows
from moe_compress.stream.documents import DataSpec, Use

KEPT = ("logs", "records", "documents", "originals", "calibrations")


@dataclass
class Run:
    """One run of a command: layers are computed on `device` in `dtype`."""

    options: Options
    log: RunLog
    device: torch.device = field(init=False)
    dtype: torch.dtype = field(init=False)
    cut: dict[DataSpec, Windows] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.device = resolve_device(self.options.device)
        self.dtype = resolve_dtype(self.options.dtype, self.device)

    def results(self, folder: str) -> Path:
        """A folder under results= (runs/, unless told otherwise)."""
        return Path(self.options.results) / folder

    def windows(self, use: Use, checkpoint: Checkpoint) -> Windows:
        """The calibration or the held-out text of this run in the tokens of the checkpoint, cut once."""
        spec = text_spec(self.options, use)
        if spec not in self.cut:
            tokenizer = load_tokenizer(checkpoint.folder, checkpoint.config.vocab_size)
            self.cut[spec] = make_windows(spec, tokenizer)
            positions = getattr(checkpoint.config, "max_position_embeddings", None) or spec.length
            if spec.length > positions:
                log.warning("windows of %d tokens: %s was made for %d.", spec.length, checkpoint.name, positions)
        return self.cut[spec]


def text_spec(options: Options, use: Use) -> DataSpec:
    """Which text serves which use. The held-out windows are the same whatever the seed."""
    if use == "calibration":
        return DataSpec(
            source=options.data,
            use=use,
            samples=options.samples,
            length=options.length,
            seed=options.seed,
            packed=options.pack,
            config=options.data_config,
            split=options.data_split,
            field=options.data_field,
        )
    return DataSpec(
        source=options.eval_data,
        use=use,
        samples=options.eval_samples,
        length=options.eval_length,
        config=options.eval_config,
        split=options.eval_split,
        field=options.eval_field,
    )


def start(options: Options) -> Run:
    """A run with its own log file under runs/logs (results=). ValueError where its folders cannot be written to."""
    for folder in KEPT:
        require_writable(Path(options.results) / folder, f"results={options.results}")
    stamp = now().replace(":", "")
    path = Path(options.results) / "logs" / f"{stamp}-{os.getpid()}.jsonl"
    return Run(options, RunLog(path, options=options.model_dump()))


def beside(
    checkpoint: str | Path, original: str | Path | None, options: dict[str, Any], command: str
) -> tuple[Checkpoint, Checkpoint, Run]:
    """A checkpoint, its original, and a run with the original's defaults."""
    if "model" in options:
        raise ValueError(f"{command} takes the checkpoint as its first word; what it is compared with is original=.")
    given = make_options({**options, "model": checkpoint})
    opened = open_model(given.model, given.revision)
    base = base_of(opened, original)
    require_writable(Path(given.results) / command, f"results={given.results}")
    return opened, base, start(given.model_copy(update={"model": base.name}).resolved())


def require_same_tokens(checkpoint: Checkpoint, base: Checkpoint) -> None:
    """ValueError for models of different vocabularies."""
    words, others = base.config.vocab_size, checkpoint.config.vocab_size
    if words != others:
        raise ValueError(f"{checkpoint.name} has {others} tokens and {base.name} {words}: they cannot be compared.")


def base_of(checkpoint: Checkpoint, named: str | Path | None) -> Checkpoint:
    """What a checkpoint was made from, unless another one is named; itself if it was made from none."""
    if named is not None:
        return open_model(str(named))
    base = (manifest_of(checkpoint.folder) or {}).get("base")
    if base is None:
        return checkpoint
    try:
        original = open_model(base["model"], base["commit"])
    except ValueError as error:
        raise ValueError(f"the original of {checkpoint.name} is needed (or original=): {error}") from error
    if original.fingerprint != base["fingerprint"]:
        log.warning("%s is not what it was when %s was made from it.", original.name, checkpoint.name)
    return original
