"""AWQ's rescaling: against the naive search, on every family, and the routing that it leaves alone."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import moe_compress
from moe_compress.checkpoints.load import load_model
from moe_compress.compression.weights import stage
from moe_compress.compression.weights.norm_readers import NormReaders
from moe_compress.compression.weights.rescaling import Rescale
from moe_compress.engine.forward import walk_layers
from moe_compress.engine.layers import StreamedLayers
from moe_compress.methods.quantization.awq import awq_scale
from moe_compress.models.families import family_of
from moe_compress.models.matrices import layer_matrices
from moe_compress.models.moe import moe_views
from support import naive_quantization as slow
from support import readers, tiny
from support.editing import logits_of
from support.pruned import report, stock
from support.slow import slow_after, slow_families
from support.tiny import CPU, windows_of

pytestmark = pytest.mark.filterwarnings("ignore:packed weights are made dense")
Options = dict[str, object]
Made = Callable[[str, str], Path]
AWQ = "quantize method=awq group_size=8 min_tokens=1 clip=max"
AUTO = "quantize method=rtn bits=auto group_size=8 clip=max"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("pow2", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
def test_scales_are_those_of_the_naive_search(bits, pow2):
    x_RI = random(300, 32) * random(32, seed=1).exp()
    weights = [random(2, rows, 32, seed=rows) for rows in (8, 12)]
    gram = (x_RI.T @ x_RI / len(x_RI)).expand(2, -1, -1)
    scale_1I = awq_scale([(w, gram) for w in weights], gram[0].diagonal()[None], bits, 8, torch.float32, pow2=pow2)
    stacks = [(w[b].double(), gram[0].double()) for w in weights for b in range(2)]
    diagonal_I = gram[0].diagonal().double()
    expected_I = slow.awq_scale(
        [w for w, _ in stacks], [g for _, g in stacks], diagonal_I, bits, 8, torch.float32, pow2=pow2
    )

    def error(scale_I: Tensor) -> float:
        rounded = [slow.dequantized(*slow.rtn(w * scale_I, bits, 8, torch.float32, "max")) / scale_I for w, _ in stacks]
        return sum(slow.output_error(w, new, g) for (w, g), new in zip(stacks, rounded, strict=True))

    # The largest weight of a group lies half-way between two codes: which of them it gets is a matter of rounding.
    assert float(error(scale_1I[0].double())) == pytest.approx(float(error(expected_I)), rel=2e-2)
    assert not pow2 or torch.equal(scale_1I.log2(), scale_1I.log2().round())


def rescaled(family: str, checkpoint: Any, scale: float) -> tuple[Tensor, Tensor, list[str]]:
    """Logits of routers and hidden states before and after every norm is rescaled, and which norms those are."""
    layers = StreamedLayers(checkpoint, CPU, torch.float32)
    done: list[str] = []
    outputs: list[list[Tensor]] = [[], []]

    def visit(index: int, layer: torch.nn.Module, run: Any) -> None:
        feeds = NormReaders(family_of(layers.model.config))
        run([feeds], False, True)
        matrices = layer_matrices(layer, family_of(layers.model.config))
        for side in (0, 1):
            view = moe_views(layers.model).get(index)
            keep = functools.partial(kept, outputs[side])
            hook = None if view is None else view.router.register_forward_hook(keep)
            run([], False)
            if hook is not None:
                hook.remove()
            for norm, modules in feeds.found.items() if side == 0 else ():
                reading = [m for m in matrices if m.name in modules or m.name.rpartition(".")[0] in modules]
                routed = [m for m in reading if m.source in ("routed", "router")]
                if len(routed) >= 2:
                    width = routed[0].weight_BOI.shape[2]
                    power_1I = torch.tensor([2.0, 0.25, 1.0, 8.0]).repeat(width // 4)[None] * scale
                    names = [m.name for m in reading if m.source != "inner"]
                    Rescale(norm, tuple(names), power_1I, family == "qwen3_next").apply(
                        layer, family_of(layers.model.config)
                    )
                    done.append(norm)
        run([], True)

    walk_layers(layers, windows_of(tiny.token_ids()), visit)
    return torch.cat([t.flatten() for t in outputs[0]]), torch.cat([t.flatten() for t in outputs[1]]), done


def kept(found: list[Tensor], _module: Any, _args: Any, output: Any) -> None:
    found.append(output[0] if isinstance(output, tuple) else output)


@pytest.mark.parametrize("family", slow_after(1, ["mixtral", "deepseek_v3", "qwen2_moe", "olmoe"]))
def test_the_scales_that_are_found_for_a_router_are_powers_of_two(family, lab, monkeypatch, tmp_path):
    """And change no token's experts, in bf16, before anything is rounded."""
    found: list[Any] = []
    before = Rescale.apply

    def applied(self: Rescale, layer: Any, owner: Any) -> None:
        found.append(self)
        before(self, layer, owner)

    monkeypatch.setattr(Rescale, "apply", applied)
    asked = stage.WeightStage._choices
    monkeypatch.setattr(stage.WeightStage, "_choices", lambda self, run, _wanted=False: asked(self, run, True))
    options = {**lab(family), "dtype": "bfloat16", "out": str(tmp_path / "out")}
    folder = moe_compress.compress(f"{AWQ} bits=4", **options).folder
    norms = [each for each in found if each.maker.endswith("norm")]
    assert norms and all(bool((each.scale.log2() % 1 == 0).all()) for each in norms if "gate" in str(each.readers))
    changes = report(folder)["routing_rescaled"].values()
    assert changes and all(each["flips"] == 0 and each["overlap"] == 1 for each in changes)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "qwen2_moe", "olmoe", "granitemoeshared"])
def test_powers_of_two_change_no_routing(family, family_checkpoint):
    before, after, done = rescaled(family, family_checkpoint(family), 1.0)
    assert done and torch.equal(before, after)


def require_close(folder: Path, whole: Any) -> None:
    """8 bits change little: what was made larger was made smaller elsewhere, router and shared experts included.

    Some tokens of random models choose other experts all the same, so it is the middle one that counts.
    """
    expected = logits_of(whole)
    error = (logits_of(load_model(folder, torch.float32)) - expected).abs().amax(-1).median()
    assert float(error) < 0.05 * float(expected.abs().max())


@pytest.mark.parametrize("family", slow_families(tiny.EDITABLE, 5))
def test_awq_rescales_what_it_can_and_nothing_else(family, made, lab):
    folder = made(family, f"{AWQ} bits=8 format=dense")
    said, whole = report(folder), stock(str(lab(family)["model"]))
    assert len(said["rescaled"]) + len(said["not_rescaled"]) > 0
    require_close(folder, whole)


def test_free_scales_report_the_routing_that_they_change(made):
    said = report(made("mixtral", f"{AWQ} bits=4 scales=free"))
    assert said["routing_rescaled"].keys() == {"0", "1", "2"}
    assert all(0 <= each["flips"] < 0.1 and each["overlap"] > 0.9 for each in said["routing_rescaled"].values())
    assert not report(made("mixtral", f"{AWQ} bits=4"))["routing_rescaled"]


def test_awq_in_half_precision_stores_what_it_made_of_the_original(lab, tmp_path):
    options = {**lab("qwen2_moe"), "dtype": "bfloat16", "out": str(tmp_path / "out")}
    folder = moe_compress.compress(f"{AWQ} bits=8 format=dense", **options).folder
    whole = stock(str(options["model"]))
    assert report(folder)["rescaled"]
    require_close(folder, whole)


MASSIVE = 100.0


def save_massive(family: str, folder: Path) -> Path:
    """A tiny reader in bf16 in whose stream one channel is a hundred times larger than the others."""
    readers.save_model(family, folder)
    file = folder / "model.safetensors"
    tensors = {
        key: tensor.bfloat16() if tensor.is_floating_point() else tensor for key, tensor in load_file(file).items()
    }
    next(tensor for key, tensor in tensors.items() if "embed" in key)[:, 3] = MASSIVE
    save_file(tensors, file, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    return folder


@pytest.mark.parametrize(
    ("family", "scales"),
    slow_after(2, [("gpt_oss", "pow2"), ("qwen3_next", "free"), ("mixtral", "free"), ("olmoe", "pow2")]),
)
def test_rescaling_in_bf16_keeps_the_model_in_which_a_channel_is_massive(family, scales, lab, tmp_path):
    """GPT-OSS multiplies by up + 1, which no rescaling of up keeps; Qwen3-Next's norms multiply by 1 + weight."""
    source = save_massive(family, tmp_path / "model")
    options = {**lab(family), "model": str(source), "dtype": "bfloat16", "out": str(tmp_path / "out")}
    folder = moe_compress.compress(f"{AWQ} bits=8 scales={scales} format=dense", **options).folder
    rounded = moe_compress.compress(
        "quantize method=rtn group_size=8 clip=max bits=8 format=dense", **{**options, "out": str(tmp_path / "rtn")}
    ).folder
    expected, found, alike = (logits_of(load_model(each, torch.float32)) for each in (source, folder, rounded))
    error, usual = ((each - expected).abs().amax(-1).median() for each in (found, alike))
    assert float(error) <= 3 * float(usual)
    assert not any("up" in maker for maker in report(folder)["rescaled"]) or family != "gpt_oss"
