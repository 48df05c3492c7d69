"""What a search asks of a candidate: agreement with the original on text that the sums leave out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_compress.checkpoints.load import load_as_run
from moe_compress.checkpoints.reader import Checkpoint
from moe_compress.data.windows import FOLDS, Windows
from moe_compress.edits.apply import apply_edit, shallow
from moe_compress.edits.edits import Edit, KeepExperts
from moe_compress.edits.resulting_config import kept_layers, layer_lists
from moe_compress.engine.forward import forward_layers
from moe_compress.engine.layers import ResidentLayers
from moe_compress.models import hf
from moe_compress.models.modeling import edited_model
from moe_compress.models.modeling.edit_layer import mask_experts
from moe_compress.models.moe import moe_views
from moe_compress.models.sublayers import block_names
from moe_compress.run.context import Run


class OriginalAgreement:
    """Agreement of next-token distributions, mean over tokens of sum_v min(p_original, p_edited), in [0, 1].

    EvoESAP (arXiv 2603.06003). Calling it with edits leaves the model as it was.
    """

    def __init__(self, model: PreTrainedModel, windows: Windows) -> None:
        self.layers = ResidentLayers(model)
        self.windows = windows
        self.where = windows.predictions()
        self.original_NSD = self._hidden()
        self.evaluations = 0

    def _hidden(self) -> Tensor:
        return forward_layers(self.layers, self.windows)[1]

    @torch.no_grad()
    def __call__(self, edits: Sequence[Edit]) -> float:
        """The agreement after `edits`, in the order given."""
        self.evaluations += 1
        with masked(self.layers.model, edits):
            hidden_NSD = self._hidden()
        total, model = 0.0, self.layers.model
        rows = hf.head_rows(model)
        for start in range(0, len(self.where), rows):
            n, s = self.where[start : start + rows].unbind(1)
            p_TV = hf.head(model, self.original_NSD[n, s]).float().softmax(-1)
            q_TV = hf.head(model, hidden_NSD[n, s]).float().softmax(-1)
            total += float(torch.minimum(p_TV, q_TV).sum(dtype=torch.float64))
        return total / len(self.where)


@contextlib.contextmanager
def masked(model: PreTrainedModel, edits: Sequence[Edit]) -> Iterator[None]:
    """The model with edits carried out inside the block; its own modules and weights are not touched."""
    names, own = block_names(model), nn.ModuleList([shallow(layer) for layer in hf.decoder_layers(model)])
    plain = [{"edit": edit.edit, "layer": edit.layer} for edit in edits]
    lists = layer_lists(model.config, kept_layers(plain, hf.num_layers(model.config)))
    with hf.other_layers(model, own):
        for edit in edits:
            if isinstance(edit, KeepExperts) and not edit.novices and _reroutable(model, edit.layer):
                mask_experts(hf.decoder_layers(model)[edit.layer], names, experts=edit.experts)
            else:
                apply_edit(model, names, edit)
        with edited_model.config_values(model.config, lists):
            yield


def _reroutable(model: PreTrainedModel, layer: int) -> bool:
    return not hf.gate_on_input(moe_views(model)[layer].experts)


SEARCH_FOLD = FOLDS - 1


def agreement_objective(checkpoint: Checkpoint, run: Run) -> OriginalAgreement:
    """Agreement with the original on the fold of the calibration text that a search's sums leave out."""
    windows = run.windows("calibration", checkpoint)
    model = load_as_run(checkpoint, run.dtype, run.device, run.options.attn)
    return OriginalAgreement(model, search_windows(windows))


def search_windows(windows: Windows) -> Windows:
    """The windows held aside for a search. ValueError if there are too few to share."""
    if len(windows) < FOLDS:
        raise ValueError(f"a search needs at least {FOLDS} windows of calibration text: raise samples=.")
    return windows.select(windows.component_N % FOLDS == SEARCH_FOLD)
