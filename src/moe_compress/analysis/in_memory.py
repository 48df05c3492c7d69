"""A model that is in memory: what one fold over it shows of every MoE layer, and what edits would do to it.

The model is never changed here. T tokens, D model width, P sampled tokens.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_compress.analysis.layer_info import view_of
from moe_compress.calibration.artefact import by_domain, mix_components
from moe_compress.calibration.expert_statistics import ExpertStatistics
from moe_compress.calibration.model_statistics import LayerStatistics
from moe_compress.calibration.output_sample import OutputSample, OutputSampler
from moe_compress.data.windows import FOLDS, Windows
from moe_compress.edits.apply import apply_edits
from moe_compress.edits.edits import Edit
from moe_compress.engine.forward import forward_layers
from moe_compress.engine.layers import ResidentLayers
from moe_compress.engine.observer import BatchInfo, Observer, evenly_T
from moe_compress.models import hf
from moe_compress.models.families import family_of
from moe_compress.models.hf import RoutedRows
from moe_compress.models.moe import learned_view
from moe_compress.models.shape import MoEShape, moe_shapes
from moe_compress.run.progress import progress_bar

# Tokens of the output sample, and of the inputs that are kept to try plans on: enough for means, and little to hold.
SAMPLE = 1024


@dataclass(frozen=True, slots=True)
class Seen:
    """One MoE layer as a fold saw it: sums, tokens by domain and fold [C, E] and [C], some inputs of its block."""

    layer: LayerStatistics
    count_CE: Tensor
    token_C: Tensor
    inputs_PD: Tensor


class BlockInputs:
    """An observer that keeps what enters the MoE block, for an even sample of tokens."""

    def __init__(self, model: PreTrainedModel, real_tokens: int) -> None:
        self.family = family_of(model.config)
        self.real_tokens = real_tokens
        self.sample = min(SAMPLE, real_tokens)

    def enter(self, index: int, layer: nn.Module) -> None:
        """Listen to the block."""
        view = learned_view(layer, self.family)
        if view is not None and view.in_layer:
            raise ValueError(
                f"layer {index} has no MoE block of its own that could be run alone, as this analysis does."
            )
        self.passed, self.parts = 0, list[Tensor]()
        self.hook = view.block.register_forward_pre_hook(self._keep, with_kwargs=True) if view else None

    def begin(self, batch: BatchInfo) -> None:
        """Choose the batch's tokens."""
        real_T = batch.real_T.nonzero().flatten()
        self.chosen_T = real_T[evenly_T(self.passed, len(real_T), self.sample, self.real_tokens, real_T.device)]
        self.passed += len(real_T)

    def _keep(self, _module: nn.Module, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        self.parts.append(hidden.reshape(-1, hidden.shape[-1])[self.chosen_T])

    def end(self, hidden_BSD: Tensor) -> None:
        """Nothing is left to do."""

    def leave(self) -> dict[str, Tensor]:
        """The sample, on the CPU; nothing for a layer without experts."""
        if self.hook is None:
            return {}
        self.hook.remove()
        return {"inputs": torch.cat(self.parts).cpu()}


@contextlib.contextmanager
def watched(model: PreTrainedModel) -> Iterator[None]:
    """The model in evaluation mode, its experts run by the function that can be listened to; then as it was."""
    training, function = model.training, model.config.get_text_config()._experts_implementation
    model.eval()
    hf.use_experts_function(model)
    try:
        yield
    finally:
        model.set_experts_implementation(function)
        model.train(training)


def observe(model: PreTrainedModel, windows: Windows) -> dict[int, Seen]:
    """One fold over all layers: what each MoE layer does with the text."""
    family, config, domains = family_of(model.config), model.config.get_text_config(), windows.domains
    observers: list[Observer] = [
        ExpertStatistics(family, config, len(domains) * FOLDS),
        OutputSampler(family, config, windows.tokens, SAMPLE),
        BlockInputs(model, windows.tokens),
    ]
    with watched(model), progress_bar("measuring") as progress:
        layers, _ = forward_layers(ResidentLayers(model), windows, observers, progress=progress)
    shapes = moe_shapes(model)
    return {shape.layer: _seen(model, shape, len(layers), layers[shape.layer], domains) for shape in shapes}


def _seen(
    model: PreTrainedModel, shape: MoEShape, total: int, found: Sequence[Mapping[str, Tensor]], domains: Sequence[str]
) -> Seen:
    tables, sample, inputs = found
    layer = LayerStatistics(
        shape,
        mix_components(tables, torch.ones(len(domains) * FOLDS, dtype=torch.float64)),
        total,
        family_of(model.config).paper_gate,
        lambda: contextlib.nullcontext(view_of(model, shape.layer)),
        functools.partial(OutputSample.from_tensors, sample),
        by_domain(tables, domains),
    )
    return Seen(layer, tables["count"], tables["tokens"], inputs["inputs"])


@torch.no_grad()
def edited_copy(model: PreTrainedModel, edits: Sequence[Edit]) -> PreTrainedModel:
    """A new model with the edits carried out; it shares every tensor that they leave alone with the old one."""
    aligned = [edit for edit in edits if edit.needed_array == "order"]  # they reorder neurons where they lie
    own = {id(t) for edit in aligned for t in view_of(model, edit.layer).experts.parameters()}
    shared = {id(t): t for t in (*model.parameters(), *model.buffers()) if id(t) not in own}
    copied: PreTrainedModel = copy.deepcopy(model, shared)
    apply_edits(copied, edits)
    return copied


@torch.no_grad()
def relative_error(model: PreTrainedModel, edits: Sequence[Edit], inputs_PD: Tensor) -> float:
    """|routed output before - after| / |before| of one layer over the given inputs of its block, by running both."""
    if not edits:
        return 0.0
    edited = edited_copy(model, edits)
    before_PD, after_PD = (_routed(each, edits[0].layer, inputs_PD) for each in (model, edited))
    return float((before_PD - after_PD).norm() / before_PD.norm())


def _routed(model: PreTrainedModel, layer: int, inputs_PD: Tensor) -> Tensor:
    """What the routed experts of a layer add to each token, float64 [P, D]."""
    view, heard = view_of(model, layer), list[Tensor]()

    def listen(rows: RoutedRows) -> None:
        heard.append(rows.routed_TD.double())

    with watched(model):
        hf.tap(view.block, view.experts, listen)
        try:
            view.run(inputs_PD.to(view.router_rows_ED.device))
        finally:
            hf.untap(view.block, view.experts, listen)
    return torch.cat(heard)
