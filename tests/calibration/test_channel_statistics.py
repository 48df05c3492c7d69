"""Sums and scores of channels are those of the naive reference."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch

from moe_compress.calibration.channel_statistics import ChannelStatistics
from moe_compress.calibration.model_statistics import LayerStatistics
from moe_compress.engine.forward import forward_layers
from moe_compress.engine.layers import ResidentLayers
from moe_compress.methods.pruning.channels import channel_scores
from moe_compress.models.families import family_of
from moe_compress.models.moe import moe_views
from moe_compress.models.shape import moe_shapes
from support import naive_pruning as slow
from support import tiny
from support.editing import IDS
from support.tiny import windows_of


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "llama4_text", "nemotron_h", "qwen2_moe"])
def test_sums_and_scores_are_those_of_the_naive_reference(family):
    model = tiny.make(family)
    seen, _ = forward_layers(ResidentLayers(model), windows_of(IDS), [ChannelStatistics(family_of(model.config))])
    layer = next(iter(moe_views(model)))
    found, rows = seen[layer][0], slow.rows(tiny.make(family), family, IDS)[layer]
    nothing = torch.zeros(1, tiny.INNER, dtype=torch.float64)
    inner = [torch.stack(each.inner) if each.inner else nothing for each in rows]
    gated = [a * torch.tensor(r.gates or [0.0]).double().unsqueeze(1) for a, r in zip(inner, rows, strict=True)]
    square = torch.stack([a.square().sum(0) for a in inner])
    total, largest = (torch.stack([f(a.square()) for a in gated]) for f in (lambda a: a.sum(0), lambda a: a.amax(0)))
    close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-7)
    close(found["channel_square"], square)
    close(found["channel_gated"], total)
    close(found["channel_max"], largest)
    view = moe_views(model)[layer]
    shape = next(shape for shape in moe_shapes(model) if shape.layer == layer)
    sums = LayerStatistics(shape, found, 3, "full", lambda: contextlib.nullcontext(view))
    matrices = [[m.double() for m in expert] for expert in slow.matrices(model, family, layer)]
    down = torch.stack([expert[-1] for expert in matrices])
    close(channel_scores(sums, "camera", 0.25), down.square().sum(1) * (0.75 * total + 0.25 * largest))
    close(channel_scores(sums, "wanda", 0.25), down.abs().sum(1) * square.sqrt())
    into = torch.stack([sum(m.square().sum(1) for m in expert[:-1]) for expert in matrices])
    close(channel_scores(sums, "magnitude", 0.25), into + down.square().sum(1))
