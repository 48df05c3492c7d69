"""Stages whose method leaves factors: layer by layer, what experts multiply is summed up and they become factors.

As in other weight stages a layer is written, read back, and then passes the text on as it was written
(propagate=compressed) or as it came (propagate=original). E experts, F neurons of an expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_compress.calibration.input_crosses import OriginalInputs
from moe_compress.checkpoints.reader import Checkpoint
from moe_compress.checkpoints.writer import CheckpointWriter
from moe_compress.compression.weights.checks import gram_bytes, output_gram_bytes
from moe_compress.compression.weights.factor_sizes import Sizes, sizes_of_layers, squared_gradients
from moe_compress.compression.weights.factored_layer import FactoredStore
from moe_compress.compression.weights.format_choice import Storage
from moe_compress.compression.weights.layer_grams import GramCollector
from moe_compress.compression.weights.output_grams import measure_outputs
from moe_compress.compression.weights.stage import WeightStageResult, require_memory
from moe_compress.compression.weights.stage_matrices import StageMatrices, factoring_of
from moe_compress.compression.weights.visiting import visit_layers
from moe_compress.edits.edits import from_json, to_json
from moe_compress.engine.forward import LayerPass, Progress
from moe_compress.engine.layers import StreamedLayers
from moe_compress.methods import registry
from moe_compress.models.families import family_of
from moe_compress.models.matrices import layer_matrices
from moe_compress.models.moe import learned_view, permute_neurons
from moe_compress.recipes.recipe import Stage
from moe_compress.run.context import Run
from moe_compress.utils.devices import free_memory
from moe_compress.utils.files import gigabytes, read_json, require_disk, write_json
from moe_compress.utils.logging import log


def run_factor_stage(
    stage: Stage, source: Checkpoint, run: Run, writer: CheckpointWriter, progress: Progress | None = None
) -> WeightStageResult:
    """Carry out a stage that leaves factors into `writer`."""
    layers = run.layers(source)
    storage = Storage(StageMatrices(stage, layers.model))
    windows = run.windows("calibration", source) if stage.needs != "nothing" else None
    stage_run = FactorStage(stage, source, layers, writer, storage)
    crosses, pools = stage_run.factoring.crosses(stage.parameters), stage_run.factoring.pools(stage.parameters)
    if windows is not None and not pools:
        needed = gram_bytes(storage.matrices, crosses=crosses, tables=0)
        require_memory(needed, layers.device, "use grams=pooled")
        _require_disk_for_turns(storage.matrices, needed, writer.scratch)
    if stage_run.collector.outputs:
        _require_room(storage.matrices, layers.device, pools, writer.scratch)
        measure_outputs(source, run, writer.scratch, pools, progress)
    if stage_run.factoring.weighs(stage.parameters):
        stage_run.collector.gradients = squared_gradients(source, run, writer.scratch)
    stage_run.sizes = sizes_of_layers(stage, source, run, stage_run.collector, writer.scratch, progress)
    if windows is not None:
        log.info("%s: %d tokens of %s (%s).", stage.method, windows.tokens, run.options.data, windows.fingerprint)
    streams = 2 if crosses else 1
    return stage_run.finished(
        visit_layers(stage_run, source, layers, writer, windows, streams=streams, progress=progress)
    )


def _require_room(matrices: StageMatrices, device: torch.device, pools: bool, scratch: Path) -> None:
    """Raise ValueError if second moments of gradients fit neither memory, layer by layer, nor the disk."""
    needed, free = output_gram_bytes(matrices, pools), free_memory(device)
    advice = "use objective=activation" if pools else "use grams=pooled"
    for index, layer in needed.items():
        if layer > free:
            raise ValueError(
                f"layer {index}: the second moments of its gradients need {gigabytes(layer)}, and {gigabytes(free)} "
                f"are free: {advice}."
            )
    require_disk(scratch, sum(needed.values()), "the second moments of gradients", advice)


def _require_disk_for_turns(matrices: StageMatrices, needed: Mapping[int, tuple[int, int]], scratch: Path) -> None:
    """Raise ValueError if Gram matrices of experts that wait for the others do not fit on the disk."""
    counts = {i: max((len(each.weight_BOI) for each in found), default=0) for i, found in matrices.by_layer.items()}
    kept = (each * counts[i] for i, (each, at_once) in needed.items() if at_once < counts[i])
    require_disk(
        scratch, max(kept, default=0), "the Gram matrices of a layer", "use more experts_at_once or grams=pooled"
    )


class FactorStage:
    """Turns the experts of one layer after the other into factors, and keeps what is to be reported of each."""

    def __init__(
        self, stage: Stage, source: Checkpoint, layers: StreamedLayers, writer: CheckpointWriter, storage: Storage
    ) -> None:
        self.source, self.layers, self.writer = source, layers, writer
        self.changes = storage.matrices.by_layer
        self.family, self.options = family_of(source.config), storage.matrices.options
        self.method = registry.find(stage.method)
        self.own = stage.own_parameters
        self.factoring = factoring_of(stage)
        self.collector = GramCollector(
            self.family,
            self.options,
            self.factoring.pools(self.own),
            writer.scratch,
            layers.device,
            source.dense_dtype,
            self.factoring.outputs(self.own),
            kinds=storage.matrices.kinds,
        )
        self.store = FactoredStore(source, layers, writer)
        self.values = writer.values = storage.values(source.values)
        writer.keep_prediction_layers = False
        self.sizes: Sizes = {}

    def visit(self, index: int, layer: nn.Module, *runs: LayerPass) -> None:
        """One layer: observe, factor, write, verify, go on. Of two runs the first is of the original stream."""
        view = learned_view(layer, self.family)
        stays = self.options.propagate == "original"
        if view is None or not self.changes[index]:
            self.writer.copy(index)
            write_json(self._notes_file(index), {})
            for run in runs:
                run([], True)
            return
        originals = self._originals(runs[0]) if len(runs) > 1 else None
        order_EF = self.factoring.order(view, self.own) if "experts" in self.collector.kinds else None
        if order_EF is not None:  # what they compute stays the same
            permute_neurons(view, order_EF)
        if runs:
            self.collector.collect(view, runs[-1], stays, originals)
            self.collector.require_seen(index)
        sizes = self.sizes.get(index, {})
        beside = layer_matrices(layer, self.family, ["shared"]) if "shared" in self.collector.kinds else []
        experts = self.collector.experts(index, view, self.factoring, self.own, sizes, order_EF, beside)
        found = self.method.run(experts, **self.own)
        edit = self.store.write(index, layer, found.factors, order_EF, found.linears)
        counts = self.collector.counts
        self.collector.release()
        write_json(self._notes_file(index), {"edit": to_json(edit), "projections": found.report, **counts})
        if runs and not stays:
            runs[-1]([], True)

    def _originals(self, run: LayerPass) -> list[Tensor]:
        """What experts are sent of every batch where nothing is compressed, [T, D]; that stream goes on."""
        observer = OriginalInputs(self.family)
        run([observer], True)
        return observer.batches

    def _notes_file(self, index: int) -> Path:
        return self.writer.scratch / f"notes-{index:05d}.json"

    def is_done(self, index: int) -> bool:
        """Whether an earlier, killed run has finished this layer."""
        return self._notes_file(index).is_file()

    def finished(self, report: Mapping[str, Any]) -> WeightStageResult:
        """The report by layer and projection, and the edits."""
        notes = {i: read_json(self._notes_file(i)) for i in range(self.source.num_layers)}
        changed = {i: note for i, note in notes.items() if note}
        parts = [said for note in changed.values() for said in note["projections"].values()]
        before = sum(said["parameters_before"] for said in parts)
        found = {
            **report,
            "kept": sum(said["parameters"] for said in parts) / before,
            **{name: sum(said[name] for said in parts) / len(parts) for name in ("plain", "whitened")},
            "projections": {i: note["projections"] for i, note in changed.items()},
            **{key: {i: note[key] for i, note in changed.items() if note.get(key)} for key in ("unseen", "tokens")},
        }
        return WeightStageResult(found, [from_json(note["edit"]) for note in changed.values()], self.values)
