"""What the parts of one run share: its options, its arithmetic, its texts, its log and its folders."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from moe_compress.checkpoints.load import load_tokenizer
from moe_compress.checkpoints.reader import Checkpoint
from moe_compress.data.documents import DataSpec, Use
from moe_compress.data.windows import Windows, make_windows
from moe_compress.engine.layers import StreamedLayers
from moe_compress.reports.record import now
from moe_compress.run.launch import launched
from moe_compress.run.log import RunLog
from moe_compress.run.options import Options
from moe_compress.run.processes import ALONE, Processes, process_device
from moe_compress.utils.devices import resolve_dtype
from moe_compress.utils.files import require_writable
from moe_compress.utils.logging import log

KEPT = ("logs", "records", "documents", "originals", "calibrations")


@dataclass
class Run:
    """One run of a command: layers are computed on `device` in `dtype`, and `processes` train together."""

    options: Options
    log: RunLog
    processes: Processes = ALONE
    device: torch.device = field(init=False)
    dtype: torch.dtype = field(init=False)
    cut: dict[DataSpec, Windows] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.device = process_device(self.options.device, launched())
        self.dtype = resolve_dtype(self.options.dtype, self.device)

    def results(self, folder: str) -> Path:
        """A folder under results= (runs/, unless told otherwise)."""
        return Path(self.options.results) / folder

    def layers(self, checkpoint: Checkpoint) -> StreamedLayers:
        """The layers of a checkpoint, one in memory at a time, in this run's arithmetic."""
        return StreamedLayers(checkpoint, self.device, self.dtype, self.options.attn)

    def tokenizer(self, checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer; one that is code of its own only where the run trusts it."""
        return load_tokenizer(checkpoint.folder, checkpoint.text_config.vocab_size, self.options.trust_remote_code)

    def windows(self, use: Use, checkpoint: Checkpoint) -> Windows:
        """The calibration or the held-out text of this run in the tokens of the checkpoint, cut once."""
        spec = text_spec(self.options, use)
        if spec not in self.cut:
            self.cut[spec] = make_windows(spec, self.tokenizer(checkpoint))
            positions = getattr(checkpoint.text_config, "max_position_embeddings", None) or spec.length
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
            fields=options.fields,
            template=options.template,
            system=options.system,
            assistant_only=options.assistant_only,
        )
    return DataSpec(
        source=options.eval_data,
        use=use,
        samples=options.eval_samples,
        length=options.eval_length,
        config=options.eval_config,
        split=options.eval_split,
        field=options.eval_field,
        fields=options.fields,
        template=options.template,
        system=options.system,
    )


def start(options: Options, processes: Processes = ALONE) -> Run:
    """A run with its own log file under runs/logs (results=). ValueError where its folders cannot be written to."""
    for folder in KEPT:
        require_writable(Path(options.results) / folder, f"results={options.results}")
    stamp = now().replace(":", "")
    path = Path(options.results) / "logs" / f"{stamp}-{os.getpid()}.jsonl"
    return Run(options, RunLog(path, options=options.model_dump()), processes)
