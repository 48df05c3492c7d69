"""Analyse, plan and compress one MoE layer of a model in memory at a time, looking at every step.

compressor = ExpertCompressor("tiny-mixtral")
compressor.analyze_compression_potential(layer_idx=2)
plan = compressor.plan_compression(layer_idx=2, strategy="balanced")
compressor.apply_compression(plan, layer_idx=2, inplace=True)
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_compress.analysis.argument_checks import checked
from moe_compress.analysis.in_memory import Seen, edited_copy, observe, relative_error
from moe_compress.analysis.layer_analysis import SIMILAR, LayerAnalysis, analyse, require_cosine
from moe_compress.analysis.layer_info import MoEHooks, MoELayerInfo, get_moe_layer_info, shape_of, view_of
from moe_compress.analysis.layer_plan import (
    BLENDS,
    CompressedMoEConfig,
    CompressionPlan,
    ExpertMergeResult,
    config_of,
    edits_of,
    require_whole,
)
from moe_compress.analysis.sizes import estimate_compressed_size, estimate_model_size, print_compression_summary
from moe_compress.analysis.strategies import impact_of, make_plan, strategy_target
from moe_compress.checkpoints.load import load_model, load_tokenizer
from moe_compress.checkpoints.model_names import local_folder
from moe_compress.checkpoints.reader import Checkpoint, architecture_values
from moe_compress.checkpoints.resolve import resolve_model
from moe_compress.checkpoints.safetensors_file import write_shard
from moe_compress.data.documents import DataSpec
from moe_compress.data.prompts import prompt_windows
from moe_compress.data.windows import Windows, make_windows
from moe_compress.edits.apply import apply_edits, check_edits, refuse_if_uneditable
from moe_compress.edits.edits import Edit, Plan
from moe_compress.edits.plan_file import ARRAYS, PLAN, StagePlan, plan_arrays, plan_values
from moe_compress.methods.expert_merge.alignment import aligned_order
from moe_compress.models import hf
from moe_compress.models.shape import moe_shapes
from moe_compress.utils.choices import one_of
from moe_compress.utils.devices import resolve_device, resolve_dtype
from moe_compress.utils.files import write_json
from moe_compress.utils.logging import log

__all__ = [
    "CompressedMoEConfig",
    "CompressionPlan",
    "ExpertCompressor",
    "ExpertMergeResult",
    "LayerAnalysis",
    "MoEHooks",
    "MoELayerInfo",
    "estimate_compressed_size",
    "estimate_model_size",
    "get_moe_layer_info",
    "print_compression_summary",
]

# Without prompts: so many windows of the zoo's text, prose, code and tasks, which needs no download.
WINDOWS, LENGTH = 64, 256
Prompts = tuple[str, ...]


class ExpertCompressor:
    """Compresses a model in memory, layer by layer. One pass over a text measures all layers, and is remembered."""

    @checked
    def __init__(
        self,
        model_or_path: PreTrainedModel | str | os.PathLike[str],
        tokenizer: PreTrainedTokenizerBase | None = None,
        similarity_threshold: float = SIMILAR,
    ) -> None:
        self.similarity_threshold = require_cosine(similarity_threshold)
        self.checkpoint: Checkpoint | None = None
        if isinstance(model_or_path, str | os.PathLike):
            self.checkpoint = resolve_model(os.fspath(model_or_path))
            device = resolve_device("auto")
            dtype = resolve_dtype("auto", device)
            self.model = load_model(self.checkpoint.folder, dtype, device_map=str(device))
        else:
            self.model = model_or_path
            hf.complete_experts(self.model)
        refuse_if_uneditable(self.model.config)
        self.tokenizer = tokenizer
        self._seen: dict[Prompts, dict[int, Seen]] = {}
        self._analyses: dict[tuple[Prompts, int], LayerAnalysis] = {}
        self._orders: dict[tuple[int, tuple[tuple[int, ...], ...]], Tensor] = {}
        self._changed: set[int] = set()
        self._applied: list[Edit] = []
        self._latest: Prompts = ()

    # --- analysing ------------------------------------------------------------------------------------------

    @checked
    def analyze_compression_potential(
        self, layer_idx: int, test_prompts: Sequence[str] | None = None
    ) -> dict[str, Any]:
        """How compressible a layer is, from exactly these prompts (or the zoo's text): see `LayerAnalysis`."""
        return self.analysis(layer_idx, test_prompts).to_json()

    @checked
    def analysis(self, layer_idx: int, test_prompts: Sequence[str] | None = None) -> LayerAnalysis:
        """The same as an object."""
        view_of(self.model, layer_idx)
        prompts = tuple(test_prompts or ())
        if layer_idx in self._changed:  # what was measured is of a layer that is no more
            self._seen, self._analyses, self._changed = {}, {}, set()
        if (prompts, layer_idx) not in self._analyses:
            seen = self._observed(prompts)[layer_idx]
            found = analyse(seen.layer, seen.count_CE, seen.token_C, self.similarity_threshold)
            self._analyses[prompts, layer_idx] = found
        found = self._analyses[prompts, layer_idx]
        if found.warning is None:
            self._latest = prompts
        else:
            log.warning("layer %d: %s", layer_idx, found.warning)
        return found

    def _observed(self, prompts: Prompts) -> dict[int, Seen]:
        if prompts not in self._seen:
            self._seen[prompts] = observe(self.model, self._windows(prompts))
        return self._seen[prompts]

    def _windows(self, prompts: Prompts) -> Windows:
        if prompts:
            return prompt_windows(prompts, self._tokenizer())
        spec = DataSpec(source="zoo", use="calibration", samples=WINDOWS, length=LENGTH)
        return make_windows(spec, self._tokenizer())

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            folder = self.checkpoint.folder if self.checkpoint else local_folder(self.model.config._name_or_path)
            if folder is None:
                raise ValueError("text is needed and there is no tokenizer: ExpertCompressor(model, tokenizer).")
            self.tokenizer = load_tokenizer(folder, self.model.config.get_text_config().vocab_size)
        return self.tokenizer

    # --- planning -------------------------------------------------------------------------------------------

    @checked
    def plan_compression(
        self,
        layer_idx: int,
        target_experts: int | None = None,
        strategy: str = "balanced",
        weight_blend: str | None = None,
    ) -> CompressionPlan:
        """Which experts go: exactly down to `target_experts`, or as many as the strategy says.

        weight_blend: how merged experts are blended; None: as changes the layer's output least. The plan rests on the
        text analysed last, if it was enough to judge experts by, else on the default text.
        """
        analysis = self.analysis(layer_idx, self._latest)
        if analysis.warning is not None and self._latest:
            self._latest = ()
            analysis = self.analysis(layer_idx)
        shape = shape_of(self.model, layer_idx)
        target = strategy_target(analysis, shape, strategy) if target_experts is None else target_experts
        plan = make_plan(analysis, shape, target, strategy)
        plan.expert_params = get_moe_layer_info(self.model, layer_idx).expert_params
        if weight_blend is not None or not plan.merges:
            return self._judged(plan, one_of(weight_blend or BLENDS[0], BLENDS, "weight_blend"))
        return min((self._judged(plan, blend) for blend in BLENDS), key=lambda judged: judged.predicted_error or 0.0)

    def _judged(self, plan: CompressionPlan, weight_blend: str) -> CompressionPlan:
        """The plan with its merges blended like this, and what it would change."""
        assert plan.layer_idx is not None
        merges = [dataclasses.replace(merge, weight_blend=weight_blend) for merge in plan.merges]
        judged = dataclasses.replace(plan, merges=merges)
        inputs_PD = self._observed(self._latest)[plan.layer_idx].inputs_PD
        judged.predicted_error = relative_error(self.model, self._edits(judged, plan.layer_idx), inputs_PD)
        judged.estimated_quality_impact = impact_of(judged.predicted_error)
        return judged

    def _edits(self, plan: CompressionPlan, layer_idx: int) -> list[Edit]:
        self._require(plan, layer_idx)
        key = layer_idx, plan.groups
        if key not in self._orders:  # matching the neurons of wide experts takes seconds a pair
            self._orders[key] = aligned_order(plan.groups, view_of(self.model, layer_idx))
        return edits_of(plan, layer_idx, self._orders[key])

    def _require(self, plan: CompressionPlan, layer_idx: int) -> None:
        """Raise ValueError, before anything is changed, unless the plan fits the layer and its router."""
        require_whole(plan, layer_idx, view_of(self.model, layer_idx))
        shape_of(self.model, layer_idx).require_ids(tuple(plan.survivors))

    # --- carrying out ---------------------------------------------------------------------------------------

    @checked
    def apply_compression(self, plan: CompressionPlan, layer_idx: int, inplace: bool = False) -> CompressedMoEConfig:
        """Change experts and router of the layer if `inplace`; in any case say where each expert goes.

        Without `inplace` the model stays as it is: `compressed_model` makes a new one, `save_plan` a file to apply.
        """
        self._require(plan, layer_idx)
        config = config_of(plan, layer_idx, view_of(self.model, layer_idx))
        if inplace:
            with torch.no_grad():
                edits = self._edits(plan, layer_idx)
                apply_edits(self.model, edits)
            self._applied += edits
            self._changed.add(layer_idx)
            self._orders.clear()
        return config

    @checked
    def compressed_model(self, plans: Sequence[CompressionPlan]) -> PreTrainedModel:
        """A new model with the plans carried out; tensors that they leave alone are shared with this one."""
        return edited_copy(self.model, self._all_edits(plans))

    @checked
    def save_plan(self, plans: Sequence[CompressionPlan], folder: str | os.PathLike[str]) -> Path:
        """Write plan.json and its tensors: `moe-compress apply` makes the compressed checkpoint of them.

        What was done in place comes first, so that the file is for the model as it was; raises ValueError if that is
        not how the model in memory came about.
        """
        source, path = self.checkpoint, Path(folder) / PLAN
        edits = [*self._applied, *self._all_edits(plans)]
        self._require_as_applied()
        base = {"model": self.model.config._name_or_path, "commit": None, "fingerprint": None}
        if source is not None:
            base = {"model": source.name, "commit": source.commit, "fingerprint": source.fingerprint}
        stage = StagePlan("expert_compressor", Plan(edits, {}, {}))
        write_json(path, plan_values([stage], base))
        write_shard(path.with_name(ARRAYS), plan_arrays([stage]))
        return path

    def _require_as_applied(self) -> None:
        """Raise ValueError if the model has other experts than its source has after what was done in place."""
        name = self.model.config._name_or_path
        folder = self.checkpoint.folder if self.checkpoint else local_folder(name)
        if folder is None:
            return
        expected = hf.skeleton(hf.config_from(architecture_values(folder)), self.model.dtype)
        check_edits(expected, self._applied)
        if moe_shapes(expected) != moe_shapes(self.model):
            raise ValueError(
                f"the model is not what is in {folder} with this compressor's plans in place: save the model as it is, "
                "and open that folder with a new ExpertCompressor."
            )

    def _all_edits(self, plans: Sequence[CompressionPlan]) -> list[Edit]:
        if any(plan.layer_idx is None for plan in plans):
            raise ValueError("a plan that goes with others must say for which layer it is: set layer_idx.")
        layers = [plan.layer_idx for plan in plans]
        if len(set(layers)) < len(layers):
            raise ValueError(f"these plans are for layers {layers}: one a layer; for more, apply the first in place.")
        return [edit for plan in plans for edit in self._edits(plan, plan.layer_idx or 0)]
