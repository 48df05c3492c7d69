"""What a stage needs to know of a checkpoint: calibration found or made, weights on demand, a search's objective."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from moe_compress.calibration.artefact import (
    Calibration,
    by_domain,
    calibrate,
    calibration_identity,
    component_weights,
    load_if_complete,
    mix_components,
)
from moe_compress.calibration.channel_statistics import ChannelStatistics
from moe_compress.calibration.gradients import ChannelGradients
from moe_compress.calibration.model_statistics import LayerStatistics, ModelStatistics
from moe_compress.calibration.output_sample import OutputSample, OutputSampler
from moe_compress.calibration.weight_statistics import weight_sums
from moe_compress.checkpoints.reader import Checkpoint
from moe_compress.engine.backward import backward
from moe_compress.engine.forward import forward_layers
from moe_compress.engine.layers import StreamedLayers
from moe_compress.engine.observer import BatchInfo
from moe_compress.models import hf
from moe_compress.models.families import family_of
from moe_compress.models.moe import MoEView, learned_view, moe_views
from moe_compress.models.shape import model_shape
from moe_compress.run.context import Run
from moe_compress.run.progress import progress_bar
from moe_compress.utils.devices import free_memory, measured_cost
from moe_compress.utils.files import gigabytes
from moe_compress.utils.logging import log

NOISE_TOKENS = 1024


def calibration_for(checkpoint: Checkpoint, run: Run, output_samples: bool = False) -> Calibration:
    """The artefact of an earlier run on the same model, text and arithmetic; else one pass makes it."""
    windows = run.windows("calibration", checkpoint)
    identity = calibration_identity(checkpoint, windows, run.dtype, run.device, run.options.attn)
    path = run.results("calibrations") / f"{identity}.safetensors"
    earlier = load_if_complete(path, output_samples)
    if earlier is not None:
        log.info("calibration: %d tokens already measured, no forward needed (%s).", windows.tokens, path)
        return earlier
    log.info("calibration: %d tokens of %s (%s).", windows.tokens, run.options.data, windows.fingerprint)
    with progress_bar("measuring") as progress:
        layers = run.layers(checkpoint)
        calibration = calibrate(checkpoint, layers, windows, path, identity, progress, output_samples=output_samples)
    run.log.event("calibrated", path=str(path), **calibration.description)
    return calibration


class Weights:
    """A checkpoint's layers by number, read when they are asked for, on the CPU in fp32."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    @functools.cached_property
    def layers(self) -> StreamedLayers:
        """The embeddings are read with the first layer."""
        return StreamedLayers(self.checkpoint, torch.device("cpu"), torch.float32)

    @contextlib.contextmanager
    def view(self, index: int) -> Iterator[MoEView]:
        """The experts of one layer."""
        with self.layers.layer(index) as layer:
            found = learned_view(layer, family_of(self.checkpoint.config))
            assert found is not None
            yield found


def observed(
    checkpoint: Checkpoint, calibration: Calibration, mix: Mapping[str, float], left_out: int | None = None
) -> ModelStatistics:
    """What a method is given, with the domains mixed, and perhaps one fold of the text left out."""
    weight_C = component_weights(calibration, mix, left_out)
    sums = {i: mix_components(table, weight_C) for i, table in calibration.layers.items()}
    streams = {
        i: {k.removeprefix("stream_"): float(v / found["stream_tokens"]) for k, v in found.items() if "stream_" in k}
        for i, found in sums.items()
    }
    base = _layers(checkpoint, {i: sums[i] for i in calibration.moe})
    layers = [
        dataclasses.replace(
            layer,
            output_sample=functools.partial(_weighted_sample, calibration, layer.shape.layer, weight_C),
            by_domain=by_domain(calibration.layers[layer.shape.layer], calibration.domains),
        )
        for layer in base.layers
    ]
    return ModelStatistics(
        shape=base.shape, layers=layers, block_influence=streams, span_influence_LL=calibration.span_influence_LL
    )


def _weighted_sample(calibration: Calibration, layer: int, weight_C: Tensor) -> OutputSample:
    return calibration.output_sample(layer).weighted(weight_C)


def unobserved(checkpoint: Checkpoint, with_weights: bool) -> ModelStatistics:
    """The same without a forward: shapes, and sums over weights alone."""
    return _layers(checkpoint, _weight_sums(checkpoint) if with_weights else {})


def noise_observed(checkpoint: Checkpoint, run: Run) -> ModelStatistics:
    """The same with output samples on standard normal inputs of every MoE block: no text, no stream."""
    base = unobserved(checkpoint, with_weights=False)
    layers = run.layers(checkpoint)
    found = [
        dataclasses.replace(layer, output_sample=functools.partial(_noise_sample, layers, layer.shape.layer))
        for layer in base.layers
    ]
    return dataclasses.replace(base, layers=found)


def channel_observed(checkpoint: Checkpoint, run: Run, gradients: bool) -> tuple[ModelStatistics, dict[str, Any]]:
    """The same with sums over the inner neurons of each expert, from one pass over the text (with `gradients`: two,
    and one back); and what that text was.
    """
    windows = run.windows("calibration", checkpoint)
    log.info("neurons: %d tokens of %s (%s).", windows.tokens, run.options.data, windows.fingerprint)
    layers = run.layers(checkpoint)
    with measured_cost(run.device) as cost, progress_bar("measuring") as progress:
        family = family_of(checkpoint.config)
        if gradients:
            _require_gradient_memory(layers)
            seen = backward(layers, windows, ChannelGradients(family), run.results("calibrations"), progress)
        else:
            seen = [
                found[0] for found in forward_layers(layers, windows, [ChannelStatistics(family)], progress=progress)[0]
            ]
    return _layers(checkpoint, dict(enumerate(seen))), {**windows.description, **cost}


def _require_gradient_memory(layers: StreamedLayers) -> None:
    """Raise ValueError if the outer products of the gradients at every expert's output would not fit."""
    counts = [view.num_experts for view in moe_views(layers.model).values()]
    needed, free = 4 * max(counts) * layers.model.config.get_text_config().hidden_size ** 2, free_memory(layers.device)
    if needed > free:
        raise ValueError(
            f"score=heapr holds an outer product of gradients for each of {max(counts)} experts of a layer, "
            f"{gigabytes(needed)}, and {gigabytes(free)} are free: use score=camera, or a device with more memory."
        )


@torch.no_grad()
def _noise_sample(layers: StreamedLayers, index: int) -> OutputSample:
    """An output sample of one block on NOISE_TOKENS inputs that depend on the layer's number alone."""
    config = layers.checkpoint.text_config
    generator = torch.Generator().manual_seed(index)
    noise_TD = torch.randn(NOISE_TOKENS, config.hidden_size, generator=generator).to(layers.device, layers.model.dtype)
    observer = OutputSampler(family_of(config), config, NOISE_TOKENS)
    real_T = torch.ones(NOISE_TOKENS, dtype=torch.bool, device=layers.device)
    with layers.layer(index) as layer:
        observer.enter(index, layer)
        observer.begin(BatchInfo(real_T, torch.zeros(NOISE_TOKENS, dtype=torch.long, device=layers.device)))
        view = learned_view(layer, family_of(config))
        assert view is not None
        view.run(noise_TD)
        return OutputSample.from_tensors(observer.leave())


def _layers(checkpoint: Checkpoint, sums: Mapping[int, Mapping[str, Tensor]]) -> ModelStatistics:
    shape = model_shape(hf.skeleton(checkpoint.config, checkpoint.stored_dtype))
    gate, weights = family_of(checkpoint.config).paper_gate, Weights(checkpoint)
    layers = [
        LayerStatistics(moe, sums.get(moe.layer, {}), shape.total, gate, functools.partial(weights.view, moe.layer))
        for moe in shape.moe
    ]
    return ModelStatistics(shape=shape, layers=layers)


def _weight_sums(checkpoint: Checkpoint) -> dict[int, dict[str, Tensor]]:
    """Sums over weights alone: one layer at a time, no forward."""
    layers = StreamedLayers(checkpoint, torch.device("cpu"), checkpoint.stored_dtype)
    family = family_of(checkpoint.config)
    found: dict[int, dict[str, Tensor]] = {}
    for index in range(checkpoint.num_layers):
        with layers.layer(index) as layer:
            view = learned_view(layer, family)
            if view is not None:
                found[index] = {f"weight_{name}": value for name, value in weight_sums(view).items()}
    return found
