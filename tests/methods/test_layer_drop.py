"""How far layers turn the stream, and which layer_drop and block_drop take."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from moe_compress.calibration import block_influence
from moe_compress.calibration.artefact import calibrate
from moe_compress.calibration.collect import observed
from moe_compress.calibration.model_statistics import ModelStatistics
from moe_compress.checkpoints.reader import open_checkpoint
from moe_compress.engine.layers import StreamedLayers
from moe_compress.methods.layer_drop import block_drop, check_blocks
from moe_compress.models.shape import ModelShape, MoEShape
from support import tiny
from support.slow import each_once, slow_unless
from support.tiny import CPU, windows_of
from support.trimming import batched, planned


@pytest.mark.parametrize(
    ("moe", "mixing", "count", "left"),
    [
        ((0, 2, 4), (1, 3), 1, {0, 1, 2, 3}),
        ((0, 2, 4), (1, 3), 3, {2, 3}),
        ((0, 2, 4), (1, 3), 4, None),
        ((0, 1, 2, 3, 4), (1, 3), 4, {3}),
        ((0, 1, 2, 3, 4), (0, 1, 2, 3, 4), 4, {3}),
        ((0, 1, 2, 3, 4), (), 4, {3}),
        ((2,), (2, 0), 4, {2}),
    ],
)
def test_block_drop_spares_experts_and_attention(moe, mixing, count, left):
    shapes = [MoEShape(layer=layer, num_experts=8, top_k=2) for layer in moe]
    shape = ModelShape(moe=shapes, total=5, mixing=list(mixing))
    turns = {0: 0.3, 1: 0.4, 2: 0.5, 3: 0.6, 4: 0.1}
    model = ModelStatistics(
        layers=[], shape=shape, block_influence={layer: {"block": turn} for layer, turn in turns.items()}
    )
    words = {"drop": count, "layers": None, "mode": "discrete"}
    if left is None:
        for call in (lambda: check_blocks(shape, **words), lambda: block_drop(model, **words)):
            with pytest.raises(ValueError, match="no single layer has both experts and attention"):
                call()
        return
    assert {*range(5)} - {edit.layer for edit in block_drop(model, **words).edits} == left
    planned = {*range(5)} - {edit.layer for edit in check_blocks(shape, **words).edits}
    assert len(planned) == len(left) and planned & {*moe} and (not mixing or planned & {*mixing})


Streams = dict[str, list[Tensor]]


@torch.no_grad()
def streams_of(model: Any, names: Mapping[str, str], ids: Tensor) -> Streams:
    """Per layer, flat over tokens, in float64: the stream in front of each sub-layer, what goes into and out of it.

    names: for `moe` and `attention` the module whose input is the stream, and (`_block`) the sub-layer itself.
    """
    found: Streams = {key: [] for key in ("in", "out", "moe", "moe_in", "moe_out", "attention_in", "attention_out")}
    model = batched(model).double()

    def into(key: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            found[key].append((args[0] if args else kwargs["hidden_states"]).reshape(-1, tiny.HIDDEN).clone())

        return hook

    def out_of(key: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            found[key].append((output[0] if isinstance(output, tuple) else output).reshape(-1, tiny.HIDDEN).clone())

        return hook

    for layer in model.model.layers:
        layer.register_forward_pre_hook(into("in"), with_kwargs=True)
        layer.register_forward_hook(out_of("out"))
        layer.get_submodule(names["stream"]).register_forward_pre_hook(into("moe"), with_kwargs=True)
        block, attention = layer.get_submodule(names["block"]), layer.self_attn
        block.register_forward_pre_hook(into("moe_in"), with_kwargs=True)
        block.register_forward_hook(out_of("moe_out"))
        attention.register_forward_pre_hook(into("attention_in"), with_kwargs=True)
        attention.register_forward_hook(out_of("attention_out"))
        if "beside" in names:
            layer.get_submodule(names["beside"]).register_forward_hook(out_of("beside"))
            found.setdefault("beside", [])
    model(ids, use_cache=False)
    return found


PRE_NORM = {"stream": "post_attention_layernorm", "block": "mlp"}
WHERE = {
    "mixtral": PRE_NORM,
    "flex_olmo": {"stream": "mlp", "block": "mlp"},  # its norms stand behind the sub-layers
    "minimax": PRE_NORM,  # the stream itself passes through its norms, and is scaled
    "granitemoeshared": {**PRE_NORM, "block": "block_sparse_moe", "beside": "shared_mlp"},
}
FACTORS = {"minimax": {"mlp_alpha_factor": 2.0, "mlp_beta_factor": 0.5, "full_attn_alpha_factor": 3.0}}
TURNED = tiny.token_ids(4, 16, seed=5)


def pass_over(family: str, tmp_path: Path, ids: Tensor = TURNED) -> tuple[Any, ModelStatistics]:
    """A tiny model and what one pass saw of it."""
    overrides = FACTORS.get(family, {})
    model = tiny.make(family, num_hidden_layers=5, **overrides)
    checkpoint = open_checkpoint(tiny.save(model, tmp_path / "model"))
    layers = StreamedLayers(checkpoint, CPU, torch.float32)
    found = calibrate(checkpoint, layers, windows_of(ids), tmp_path / "sums.safetensors", "", None)
    return model, observed(checkpoint, found, {})


def turn(one: Tensor, other: Tensor) -> float:
    return float((1 - cosine_similarity(one, other, dim=-1)).mean())


@pytest.mark.parametrize("family", WHERE)
def test_cosines_are_those_of_the_stock_model_in_float64(family, tmp_path):
    model, model_seen = pass_over(family, tmp_path)
    found = streams_of(model, WHERE[family], TURNED)
    for layer in range(5):
        moe_out = found["moe_out"][layer] + (found["beside"][layer] if "beside" in found else 0)
        expected = {
            "block": turn(found["in"][layer], found["out"][layer]),
            "moe": turn(found["moe"][layer], found["out"][layer]),
            "attention": turn(found["in"][layer], found["moe"][layer]),
            "moe_inner": turn(found["moe_in"][layer], moe_out),
            "attention_inner": turn(found["attention_in"][layer], found["attention_out"][layer]),
        }
        got = {name: model_seen.block_influence[layer][name] for name in expected}
        assert got == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("part", "metric", "family"),
    slow_unless(
        each_once(("moe", "attention"), ("with_norm", "without_norm"), ("mixtral", "flex_olmo")),
        ("moe", "attention"),
        ("with_norm", "without_norm"),
        ("mixtral", "flex_olmo"),
    ),
)
def test_layer_drop_takes_the_most_similar(family, metric, part, tmp_path):
    model, model_seen = pass_over(family, tmp_path)
    found = streams_of(model, WHERE[family], TURNED)
    before = (
        {"moe": "moe", "attention": "in"} if metric == "with_norm" else {p: f"{p}_in" for p in ("moe", "attention")}
    )
    after = (
        {"moe": "out", "attention": "moe"} if metric == "with_norm" else {p: f"{p}_out" for p in ("moe", "attention")}
    )
    turns_L = [turn(found[before[part]][i], found[after[part]][i]) for i in range(5)]
    plan = planned(model_seen, f"layer_drop drop=2 metric={metric} part={part}")
    least = sorted(np.argsort(turns_L)[:2].tolist())
    assert [(edit.layer, edit.part) for edit in plan.edits] == [(layer, part) for layer in least]
    assert plan.report["dropped"] == least
    assert [plan.scores[i][0] for i in range(5)] == pytest.approx([1 - t for t in turns_L], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("family", ["mixtral", "minimax"])
def test_block_drop_takes_the_best_layers_and_the_best_run(family, tmp_path):
    """Against all hidden states of the stock model, and every run of every length."""
    model, model_seen = pass_over(family, tmp_path)
    found = streams_of(model, WHERE[family], TURNED)
    stream = [*found["in"], found["out"][-1]]
    for count in (1, 2, 3, 4):
        single = [turn(stream[i], stream[i + 1]) for i in range(5)]
        plan = planned(model_seen, f"block_drop drop={count}")
        sets = [set(chosen) for chosen in itertools.combinations(range(5), count)]
        leaving = [chosen for chosen in sets if not set(model_seen.shape.attention) <= chosen]
        assert {edit.layer for edit in plan.edits} == min(leaving, key=lambda chosen: sum(single[i] for i in chosen))
        runs = [turn(stream[i], stream[i + count]) for i in range(5 - count + 1)]
        assert [float(model_seen.span_influence_LL[i, i + count]) for i in range(len(runs))] == pytest.approx(
            runs, rel=1e-4
        )
        plan = planned(model_seen, f"block_drop drop={count} mode=consecutive")
        best = int(np.argmin(runs))
        assert [edit.layer for edit in plan.edits] == list(range(best + count - 1, best - 1, -1))


def test_runs_are_judged_on_the_same_sample_of_tokens_in_every_layer(tmp_path, monkeypatch):
    """Where hidden states would be too large to keep: 16 of 64 tokens, every fourth."""
    monkeypatch.setattr(block_influence, "SAMPLE_BYTES", 16 * 4 * tiny.HIDDEN * (5 + 1))
    model, model_seen = pass_over("mixtral", tmp_path)
    found = streams_of(model, WHERE["mixtral"], TURNED)
    stream = [each[3::4] for each in [*found["in"], found["out"][-1]]]
    for i, j in itertools.combinations(range(6), 2):
        assert float(model_seen.span_influence_LL[i, j]) == pytest.approx(turn(stream[i], stream[j]), rel=1e-4)


def test_the_last_layer_with_experts_is_in_no_run(tmp_path):
    """DeepSeek with one dense layer: no run may hold all others."""
    model = tiny.make("deepseek_v2", num_hidden_layers=3)
    checkpoint = open_checkpoint(tiny.save(model, tmp_path / "model"))
    layers = StreamedLayers(checkpoint, CPU, torch.float32)
    found = calibrate(checkpoint, layers, windows_of(TURNED), tmp_path / "sums.safetensors", "", None)
    plan = planned(observed(checkpoint, found, {}), "block_drop drop=2 mode=consecutive")
    assert [edit.layer for edit in plan.edits] == [1, 0]
