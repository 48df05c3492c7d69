"""What one pass records of a tiny model."""

from __future__ import annotations

import torch

from moe_compress.calibration.artefact import mix_components, mix_weights
from moe_compress.calibration.expert_statistics import ExpertStatistics
from moe_compress.checkpoints.reader import Checkpoint
from moe_compress.data.windows import FOLDS, Windows
from moe_compress.engine.forward import forward_layers
from moe_compress.engine.layers import StreamedLayers
from moe_compress.models.families import family_of
from support import tiny

Sums = dict[int, dict[str, torch.Tensor]]
CPU = torch.device("cpu")
IDS = tiny.token_ids(rows=4, length=12)
PADDED = torch.arange(12)[None] < torch.tensor([12, 7, 3, 10])[:, None]


def measured(checkpoint: Checkpoint, windows: Windows, left_out: int | None = None) -> Sums:
    """Layer -> [E] sums, as a method is given them."""
    observer = ExpertStatistics(family_of(checkpoint.config), checkpoint.config, FOLDS)
    seen, _ = forward_layers(StreamedLayers(checkpoint, CPU, torch.float32), windows, [observer])
    weights = mix_weights(windows.domains, torch.tensor([windows.tokens]), {}, left_out)
    return {index: mix_components(parts[0], weights) for index, parts in enumerate(seen) if parts[0]}
