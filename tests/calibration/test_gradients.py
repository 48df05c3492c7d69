"""Gradients that come back layer by layer are those of the whole model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from moe_compress.calibration.gradients import ChannelGradients
from moe_compress.engine.backward import backward
from moe_compress.engine.layers import StreamedLayers
from moe_compress.models.families import family_of
from support import naive_pruning as slow
from support import tiny
from support.editing import IDS
from support.slow import slow_after
from support.tiny import windows_of


def naive_heapr(family: str, layer: int) -> torch.Tensor:
    """Scores of one layer from one backward pass through the whole stock model, token by token, in float64."""
    model = tiny.make(family).double()
    model.set_experts_implementation("eager")
    outputs: list[torch.Tensor] = []
    experts = slow.block_of(model, family, layer).experts
    hook = experts.register_forward_hook(lambda _m, _args, out: outputs.append(out))
    hidden = model(IDS, use_cache=False).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(hidden.flatten(0, 1), IDS[:, 1:].flatten())
    (gradient,) = torch.autograd.grad(loss, outputs)
    hook.remove()
    gradient = gradient.reshape(IDS.numel(), -1)
    tokens, _ = slow.entering(model, family, IDS)[layer]
    squares = torch.zeros(tiny.EXPERTS, tiny.INNER, dtype=torch.float64)
    moments = torch.zeros(tiny.EXPERTS, tiny.HIDDEN, tiny.HIDDEN, dtype=torch.float64)
    counts = torch.zeros(tiny.EXPERTS, dtype=torch.float64)
    with torch.no_grad():
        for x, g in zip(tokens, gradient, strict=True):
            choice, _ = slow.routing(model, family, layer, x)
            for e, gate in zip(choice.ids, choice.gates, strict=True):
                squares[e] += slow.inner(family, model.config, experts, e, x).square()
                moments[e] += torch.outer(gate * g, gate * g)
                counts[e] += 1
        down = torch.stack([expert[-1] for expert in slow.matrices(model, family, layer)])
    mean = moments / counts.clamp_min(1)[:, None, None]
    return squares * torch.einsum("edf,edc,ecf->ef", down, mean, down)


@pytest.mark.parametrize(
    "family", slow_after(2, ["mixtral", "deepseek_v3", "nemotron_h", "gpt_oss", "qwen2_moe", "granitemoe"])
)
def test_gradients_that_come_back_layer_by_layer_are_those_of_the_whole_model(family, family_checkpoint, tmp_path):
    layers = StreamedLayers(family_checkpoint(family), torch.device("cpu"), torch.float32)
    seen = backward(layers, windows_of(IDS), ChannelGradients(family_of(layers.model.config)), tmp_path)
    assert not [*tmp_path.iterdir()]
    for layer in [layer for layer, found in enumerate(seen) if found]:
        expected = naive_heapr(family, layer)
        torch.testing.assert_close(seen[layer]["heapr"], expected, rtol=2e-3, atol=float(expected.max()) * 1e-5)


def test_gradients_need_a_disk(family_checkpoint, monkeypatch, tmp_path):
    layers = StreamedLayers(family_checkpoint("mixtral"), torch.device("cpu"), torch.float32)
    monkeypatch.setattr("moe_compress.utils.files.shutil.disk_usage", lambda _path: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match="use fewer or shorter windows"):
        backward(layers, windows_of(IDS), ChannelGradients(family_of(layers.model.config)), tmp_path)
