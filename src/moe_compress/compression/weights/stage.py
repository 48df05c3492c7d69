"""Stages that change weights and leave the structure: one fold that observes, changes, writes and goes on.

Layer by layer: the text runs through it while its matrices' inputs are summed up, the method makes new matrices, the
layer is written, read back and verified, and then passes the text on as it was written (propagate=compressed) or as it
came (propagate=original).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from moe_compress.calibration.input_moments import InputMomentCollector, Moments
from moe_compress.calibration.router_choices import RouterChoices, routing_change
from moe_compress.checkpoints.reader import Checkpoint
from moe_compress.checkpoints.writer import CheckpointWriter
from moe_compress.compression.weights.bit_sensitivity import expert_bits
from moe_compress.compression.weights.checks import gram_bytes
from moe_compress.compression.weights.format_choice import Storage, storage_for
from moe_compress.compression.weights.layer_stores import LayerStore, MatrixDraft
from moe_compress.compression.weights.report import counts, warn_of_skipped, weights_report
from moe_compress.compression.weights.rescaling import Rescaler, rescaled_moments
from moe_compress.compression.weights.sparsity_sensitivity import expert_sparsities
from moe_compress.compression.weights.stage_matrices import StageMatrices
from moe_compress.compression.weights.visiting import visit_layers
from moe_compress.edits.edits import Edit
from moe_compress.engine.forward import LayerPass, Progress
from moe_compress.engine.layers import StreamedLayers
from moe_compress.methods import registry
from moe_compress.methods.weight_method import Bits, InputRescaling, MatrixGroup
from moe_compress.models import hf
from moe_compress.models.families import family_of
from moe_compress.models.matrices import ROUTED, Matrix, layer_matrices
from moe_compress.recipes.recipe import Stage
from moe_compress.run.context import Run
from moe_compress.utils.devices import free_memory
from moe_compress.utils.files import gigabytes, read_json, write_json
from moe_compress.utils.logging import log

# Tokens on which a changed router is compared with the one before.
CHOICES = 4096
Notes = dict[str, Any]


@dataclass(frozen=True, slots=True)
class WeightStageResult:
    """What a weight stage leaves beside the layers it wrote: a report, edits, and values for config.json."""

    report: dict[str, Any]
    edits: Sequence[Edit]
    values: dict[str, Any]


@dataclass(frozen=True, slots=True)
class SharedOut:
    """What a budget gives to experts: fractions [E] by layer, bits by layer and stack; none where all get the same."""

    sparsities: dict[int, Tensor]
    bits: Bits | None


def run_weight_stage(
    stage: Stage, source: Checkpoint, run: Run, writer: CheckpointWriter, progress: Progress | None = None
) -> WeightStageResult:
    """Carry out a weight stage into `writer`."""
    layers = run.layers(source)
    storage = storage_for(StageMatrices(stage, layers.model), source.values, source.prediction_modules)
    if stage.needs == "input_grams":
        require_memory(gram_bytes(storage.matrices), layers.device)
    shared = _shared_out(stage, storage, source, run, writer, progress)
    windows = run.windows("calibration", source) if stage.needs != "nothing" else None
    stage_run = WeightStage(stage, source, layers, writer, storage, shared, windows.tokens if windows else 0)
    if windows is not None:
        log.info("%s: %d tokens of %s (%s).", stage.method, windows.tokens, run.options.data, windows.fingerprint)
    return stage_run.finished(visit_layers(stage_run, source, layers, writer, windows, progress=progress))


def require_memory(
    needed: Mapping[int, tuple[int, int]], device: torch.device, otherwise: str = "not even one expert's fit"
) -> None:
    """Raise ValueError if a layer's Gram matrices would not fit, saying how many experts at a time would, or what.

    needed: by layer, bytes of each expert and how many are held at once.
    """
    free = free_memory(device)
    for index, (each, at_once) in needed.items():
        if at_once * each > free:
            fits = f"experts_at_once={free // each} would fit" if free >= each else otherwise
            raise ValueError(
                f"layer {index}: the Gram matrices of {at_once} experts need {gigabytes(at_once * each)}, and "
                f"{gigabytes(free)} are free: {fits}."
            )


def _shared_out(
    stage: Stage, storage: Storage, source: Checkpoint, run: Run, writer: CheckpointWriter, progress: Progress | None
) -> SharedOut:
    """Measured in a pass of its own; a killed run has it already."""
    sparsities: dict[int, Tensor] = {}
    if storage.matrices.options.allocate != "uniform":
        file = writer.scratch / "sparsities.json"
        if not file.is_file():
            by_layer = expert_sparsities(stage, storage.matrices, source, run, progress)
            write_json(file, {layer: sparsity_E.tolist() for layer, sparsity_E in by_layer.items()})
        sparsities = {int(i): torch.tensor(each, dtype=torch.float64) for i, each in read_json(file).items()}
    allocation = registry.find(stage.method).implementation.allocates_bits(stage.parameters)
    if allocation is None:
        return SharedOut(sparsities, None)
    file = writer.scratch / "bits.json"
    if not file.is_file():
        write_json(file, expert_bits(allocation, source, run, storage.group_sizes, progress))
    return SharedOut(sparsities, {int(i): stacks for i, stacks in read_json(file).items()})


class WeightStage:
    """Changes one layer after the other; what has to be reported of it is kept beside the unfinished checkpoint."""

    def __init__(
        self,
        stage: Stage,
        source: Checkpoint,
        layers: StreamedLayers,
        writer: CheckpointWriter,
        storage: Storage,
        shared: SharedOut,
        tokens: int,
    ) -> None:
        self.stage, self.layers, self.writer, self.storage, self.shared = stage, layers, writer, storage, shared
        self.model, self.family, self.tokens = layers.model, family_of(source.config), tokens
        self.options, self.kinds = storage.matrices.options, storage.matrices.kinds
        self.method = registry.find(stage.method)
        self.own = stage.own_parameters
        self.rescaling = self.method.implementation.rescales_inputs(stage.parameters)
        self.store = LayerStore(storage.writer, source, layers, writer, self.kinds)
        self.stored_dtype = storage.writer.scale_dtype or source.dense_dtype
        self.values = writer.values = storage.values(source.values)
        warn_of_skipped(storage.group_sizes)
        writer.keep_prediction_layers = storage.keeps_beside(source.values, self.values)

    def visit(self, index: int, layer: nn.Module, run: LayerPass | None = None) -> None:
        """One layer: observe, change, write, verify, go on."""
        matrices = layer_matrices(layer, self.family, self.kinds)
        drafts = [MatrixDraft(matrix) for matrix in matrices]
        notes: Notes = defaultdict(list)
        parts = list(self._parts(matrices))
        stays = self.options.propagate == "original" or not matrices
        choices = self._choices(run)
        rescaling = self.rescaling if run is not None else None
        for experts in parts:
            on = stays and experts is parts[-1]
            seen = self._observe(run, experts, on and rescaling is None) if run is not None else {}
            if rescaling is not None and run is not None:
                seen = self._rescale(rescaling, index, layer, matrices, seen, run, notes) if matrices else seen
                if on:
                    run([], True)
            self._change(index, drafts, seen, experts, notes)
        if matrices:
            changes = [draft.change() for draft in drafts]
            self.store.write(index, layer, changes)
            self.store.verify(index, layer, changes)
            notes.update(counts(changes))
        else:
            self.writer.copy(index)
        if choices:
            notes["routing"] = routing_change(choices, self._choices(run))
        write_json(self._notes_file(index), notes)
        if run is not None and not stays:
            run([], True)

    def _rescale(
        self,
        rescaling: InputRescaling,
        index: int,
        layer: nn.Module,
        matrices: Sequence[Matrix],
        seen: Mapping[str, Moments],
        run: LayerPass,
        notes: Notes,
    ) -> Mapping[str, Moments]:
        """Make inputs larger that matter; the moments of what the matrices then see."""
        free, grid = not rescaling.keeps_routing, self.storage.matrices.grid
        assert grid is not None
        before = self._choices(run, free)
        rescaler = Rescaler(self.family, rescaling, grid.nearest, self.storage.group_sizes, self.stored_dtype)
        done, refused = rescaler.layer(index, layer, matrices, seen, run)
        self.store.rescale(done)
        notes["rescaled"] += [rescale.maker for rescale in done]
        notes["not_rescaled"] += refused
        if before:
            notes["routing_rescaled"] = routing_change(before, self._choices(run, free))
        return rescaled_moments(seen, matrices, done)

    def _choices(self, run: LayerPass | None, wanted: bool = False) -> dict[str, Tensor]:
        """What the layer's router does to the tokens that come now, if routers are changed or it is wanted."""
        if run is None or not (wanted or "router" in self.kinds):
            return {}
        choices = RouterChoices(self.family, self.tokens, CHOICES)
        run([choices], False)
        return choices.found

    def _observe(self, run: LayerPass, experts: range | None, go_on: bool) -> Mapping[str, Moments]:
        assert self.stage.needs in ("input_squares", "input_grams")
        observer = InputMomentCollector(self.family, self.kinds, self.stage.needs, experts)
        run([observer], go_on)
        return observer.found

    def _parts(self, matrices: Sequence[Matrix]) -> Iterator[range | None]:
        """Experts whose statistics are held at the same time; None: all of them."""
        count = next((len(matrix.weight_BOI) for matrix in matrices if matrix.kind == "experts"), 0)
        at_once = self.options.experts_at_once
        if not 0 < at_once < count or self.stage.needs == "nothing":
            yield None
            return
        yield from (range(start, min(start + at_once, count)) for start in range(0, count, at_once))

    def _change(
        self,
        index: int,
        drafts: Sequence[MatrixDraft],
        seen: Mapping[str, Moments],
        experts: range | None,
        notes: Notes,
    ) -> None:
        """Let the method make the new matrices of every source; those that are no experts come with the first part."""
        by_source: dict[str, list[MatrixDraft]] = defaultdict(list)
        for draft in drafts:
            by_source[draft.matrix.source].append(draft)
        for source, group in by_source.items():
            routed = group[0].matrix.kind == "experts"
            if not routed and experts is not None and experts.start > 0:
                continue
            part = slice(experts.start, experts.stop) if routed and experts is not None else slice(None)
            numbers = range(len(group[0].matrix.weight_BOI))[part]
            names = [f"expert {e} of layer {index}" if routed else f"{source} of layer {index}" for e in numbers]
            moment, rare_B = self._moment(seen.get(source), routed, names)
            changed = self.method.run(
                MatrixGroup(
                    names,
                    [draft.matrix.weight_BOI[part] for draft in group],
                    moment,
                    self.shared.sparsities[index][part] if routed and self.shared.sparsities else None,
                    self._bits(index, group, part),
                    group_size=self.storage.group_sizes.get((index, group[0].matrix.name), 0),
                    stored=self.stored_dtype,
                    numbers=self.storage.writer.numbers,
                    reach_B=seen[source].most_B if source in seen else None,
                ),
                **self.own,
            )
            stay_B = rare_B if self.options.unseen == "dense" else torch.zeros_like(rare_B)
            for n, draft in enumerate(group):
                draft.take(part, stay_B, changed, n)
            if source == ROUTED:
                notes["unseen"] += [numbers[b] for b in rare_B.nonzero().flatten().tolist()]
                notes["tokens"] += seen[source].count_B.tolist() if source in seen else []
            for name, found in changed.notes.items():
                notes[name] += [names[b] for b in found]

    def _moment(self, moments: Moments | None, routed: bool, names: Sequence[str]) -> tuple[Tensor | None, Tensor]:
        """The mean moments of a source, and which of its experts saw too few tokens, bool [B]."""
        if moments is None:
            return None, torch.zeros(len(names), dtype=torch.bool, device=self.layers.device)
        least = self.options.min_tokens if routed else 1
        rare_B = moments.count_B < least
        unseen = self.options.unseen
        if unseen == "error" and bool(rare_B.any()):
            few = [names[b] for b in rare_B.nonzero().flatten().tolist()]
            others = [each for each in get_args(self.method.parameters["unseen"].hint) if each != "error"]
            raise ValueError(
                f"{', '.join(few[:3])}: fewer than {least} tokens of the calibration text. Calibrate on more "
                f"(samples=), or say unseen= with one of {', '.join(others)}."
            )
        return moments.mean(self.options.shrink if routed else 0.0, rare_B, unseen == "pooled"), rare_B

    def _bits(self, index: int, group: Sequence[MatrixDraft], part: slice) -> list[list[int]] | None:
        """Shared-out bits of a source's matrices; of stacks that no group fits there are none, and none are needed."""
        found = (self.shared.bits or {}).get(index, {})
        names = [draft.matrix.name for draft in group]
        return [list(found[name][part]) for name in names] if found.keys() >= set(names) else None

    def _notes_file(self, index: int) -> Path:
        return self.writer.scratch / f"notes-{index:05d}.json"

    def is_done(self, index: int) -> bool:
        """Whether an earlier, killed run has finished this layer."""
        return self._notes_file(index).is_file()

    def finished(self, report: Mapping[str, Any]) -> WeightStageResult:
        """The report, and what says in config.json how the layers were stored."""
        notes = [read_json(self._notes_file(i)) for i in range(len(hf.decoder_layers(self.model)))]
        changed = {i: note for i, note in enumerate(notes) if note.get("weights")}
        allocated = {i: [round(s, 6) for s in sparsity_E.tolist()] for i, sparsity_E in self.shared.sparsities.items()}
        found = {**report, **weights_report(self.stage, self.kinds, changed, self.storage.group_sizes)}
        found["allocated"] = allocated or self.shared.bits or {}
        return WeightStageResult(found, self.storage.edits(self.shared.bits), self.values)
