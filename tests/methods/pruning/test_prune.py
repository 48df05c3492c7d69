"""Weight pruning from end to end on every family, against naive references in float64."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import moe_compress
from moe_compress.checkpoints.folder import MANIFEST
from support import naive_pruning as slow
from support import tiny
from support.editing import logits_of
from support.pruned import (
    FAMILIES,
    NAMES,
    PER_MATRIX,
    WORDS,
    agreement,
    changed,
    moe_layers,
    reference,
    report,
    rows,
    stock,
    stored,
    windows,
    zero_counts,
)
from support.slow import slow_after

METHODS = ("magnitude", "wanda", "sparsegpt")
KINDS = ("sparsity=0.5", "pattern=2:4")
# Every method and both ways to say how much on some families; one of these six runs on each of the others.
SIX = [f"prune method={method} {kind}" for kind in KINDS for method in METHODS]
RUNS = [
    pytest.param(family, sentence, marks=() if (place - number) % 6 == 0 else pytest.mark.slow)
    for number, family in enumerate(FAMILIES)
    for place, sentence in enumerate(SIX)
    if family in ("mixtral", "gpt_oss") or (place - number) % 6 == 0
]


@pytest.mark.parametrize(("family", "sentence"), RUNS)
def test_experts_are_pruned_and_nothing_else(family, sentence, lab, made):
    folder, model = made(family, sentence), lab(family)["model"]
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["form"] == "plain" and not list(folder.glob("scratch"))
    before, after = stored(model), stored(folder)
    assert {k: (t.dtype, t.shape) for k, t in before.items()} == {k: (t.dtype, t.shape) for k, t in after.items()}
    names = changed(model, folder)
    layers = moe_layers(model, family)
    assert names == {name for name in stock(model).state_dict() if NAMES.search(name)} and layers
    assert logits_of(stock(folder), WORDS).isfinite().all()
    for layer in layers:
        pairs = zip(
            slow.matrices(stock(model), family, layer), slow.matrices(stock(folder), family, layer), strict=True
        )
        for old, new in itertools.chain.from_iterable(zip(*pair, strict=True) for pair in pairs):
            zero = new == 0
            # What an expert of Nemotron's never uses goes on top: it counts for nothing.
            assert int(zero.sum()) == PER_MATRIX // 2 or (family == "nemotron_h" and zero.sum() > PER_MATRIX // 2)
            if "pattern" in sentence:
                groups = zero.unflatten(1, (-1, 4)).sum(2)
                assert bool((groups == 2).all()) or (family == "nemotron_h" and bool((groups >= 2).all()))
            if "sparsegpt" not in sentence:
                assert torch.equal(new, old.masked_fill(zero, 0))
            if "magnitude" in sentence:
                share = (2, 4) if "pattern" in sentence else 0.5
                assert torch.equal(zero, slow.magnitude(old, share))
    zeros = zero_counts(folder, family, layers).sum((1, 2)).double() / zero_counts(folder, family, layers)[0].numel()
    said = report(folder)
    assert said["sparsity_by_layer"] == pytest.approx(
        {str(layer): float(z) / PER_MATRIX for layer, z in zip(layers, zeros, strict=True)}
    )
    assert said["sparsity"] == pytest.approx({"experts": float(zeros.mean()) / PER_MATRIX})


@pytest.mark.parametrize("family", tiny.NO_EXPERT_EDITS)
@pytest.mark.parametrize("words", ["", " method=magnitude where=experts", " where=attention"])
def test_families_that_cannot_be_told_apart_are_refused(family, words, lab, tmp_path):
    options = {**lab(family), "out": str(tmp_path / "out")}
    with pytest.raises(ValueError, match=f"experts of {family} cannot be"):
        moe_compress.compress(f"prune{words}", **options)
    assert not any(tmp_path.iterdir())


NAIVE = ("mixtral", "deepseek_v3", "gpt_oss", "llama4_text", "qwen2_moe", "granitemoe", "nemotron_h")


@pytest.mark.parametrize(
    ("family", "share"),
    slow_after(3, [*((family, 0.5) for family in NAIVE), ("deepseek_v3", (2, 4)), ("gpt_oss", (2, 4))]),
)
def test_wanda_is_that_of_the_paper_on_each_expert_s_own_tokens(family, share, lab, made):
    kind = "sparsity=0.5" if share == 0.5 else "pattern=2:4"
    folder = made(family, f"prune {kind} propagate=original")
    same, whole = agreement(family, folder, lab(family)["model"], rows(family, lab(family)), share)
    assert whole >= len(moe_layers(folder, family)) * 4 * PER_MATRIX and same >= 0.999 * whole


@pytest.mark.parametrize("family", slow_after(2, NAIVE))
def test_sparsegpt_is_that_of_the_paper_on_each_expert_s_own_tokens(family, lab, made):
    folder, model, seen = made(family, "prune method=sparsegpt propagate=original"), lab(family)["model"], {}
    seen = rows(family, lab(family))
    layer = min(seen)
    same = whole = close = 0
    before, after = slow.matrices(stock(model), family, layer), slow.matrices(stock(folder), family, layer)
    for old, new, found in zip(before, after, seen[layer], strict=True):
        if not found.gates:
            continue
        for n, (was, now) in enumerate(zip(old, new, strict=True)):
            inputs = found.source(down=n == len(old) - 1)
            left, mask = slow.sparsegpt(was, inputs / len(inputs) ** 0.5, 0.5)
            right = ((now == 0) == (left == 0)).all(1)
            same += int(((now == 0) == (left == 0)).sum())
            close += int(((now - left).abs() < 1e-3 * (1 + left.abs()))[right].sum())
            whole += mask.numel()
    assert whole >= 3 * PER_MATRIX and same >= 0.99 * whole and close >= 0.9 * whole


def test_padding_does_not_count(lab, tmp_path):
    options = {**lab("mixtral"), "pack": False, "length": 48, "out": str(tmp_path / "out")}
    found = windows(options)
    assert not bool(found.mask_NS.all())
    folder, seen = moe_compress.compress("prune propagate=original", **options).folder, rows("mixtral", options)
    same, whole = agreement("mixtral", folder, options["model"], seen)
    assert same >= 0.999 * whole
    padded = slow.rows(reference(options["model"]), "mixtral", found.ids_NS, torch.ones_like(found.mask_NS))
    assert agreement("mixtral", folder, options["model"], {0: padded[0]})[0] < 0.99 * whole / 3
    assert report(folder)["calibration"]["tokens"] == int(found.mask_NS.sum())


@pytest.mark.parametrize("family", slow_after(1, ["mixtral", "deepseek_v3"]))
def test_compressed_means_what_comes_out_of_the_layers_before(family, lab, made):
    options = lab(family)
    folder = made(family, "prune propagate=compressed sparsity=0.75")
    model, done, found = reference(options["model"]), stock(folder), windows(options)
    first, *later = moe_layers(folder, family)
    untouched = rows(family, options)
    for layer in later:
        for earlier in range(layer):
            model.model.layers[earlier].load_state_dict(done.model.layers[earlier].state_dict())
        seen = slow.rows(model, family, found.ids_NS, found.mask_NS)
        same, whole = agreement(family, folder, options["model"], {layer: seen[layer]}, 0.75)
        assert same >= 0.999 * whole
        assert agreement(family, folder, options["model"], {layer: untouched[layer]}, 0.75)[0] < 0.999 * whole
    same, whole = agreement(family, folder, options["model"], {first: untouched[first]}, 0.75)
    assert same >= 0.999 * whole


ATTENTION, DENSE = r"self_attn\.(.*_proj\w*)\.weight", r"layers\.0\.mlp\.(gate|up|down)_proj\.weight"
PARTS: list[Any] = [
    ("deepseek_v3", "where=shared", r"shared_experts\..*weight"),
    ("deepseek_v3", "where=attention", ATTENTION),
    ("deepseek_v3", "where=dense", DENSE),
    ("deepseek_v3", "where=router", r"mlp\.gate\.weight"),
    ("deepseek_v3", "where=all spare=attention,experts", rf"shared_experts\..*weight|{DENSE}"),
    ("deepseek_v3", "where=experts,router spare=router", NAMES.pattern),
    ("qwen2_moe", "where=shared", r"shared_expert\..*weight"),
    ("qwen2_moe", "where=router", r"mlp\.gate\.weight|shared_expert_gate\.weight"),
    ("qwen2_moe", "where=all", rf"shared_expert\..*weight|{ATTENTION}|{NAMES.pattern}"),
    ("llama4_text", "where=shared,router", r"shared_expert\..*weight|router\.weight"),
    ("hunyuan_v1_moe", "where=shared,router", r"shared_mlp\..*weight|mlp\.gate\.wg\.weight"),
    ("granitemoeshared", "where=shared", r"shared_mlp\..*weight"),
    ("gpt_oss", "where=attention,router", rf"{ATTENTION}|mlp\.router\.weight"),
    ("jamba", "where=dense", r"feed_forward\.(gate|up|down)_proj\.weight"),
    ("nemotron_h", "where=shared", r"shared_experts\..*weight"),
]


@pytest.mark.parametrize(("family", "words", "pattern"), slow_after(6, PARTS))
def test_where_says_what_is_pruned(family, words, pattern, lab, made):
    model, folder = lab(family)["model"], made(family, f"prune {words}")
    names = changed(model, folder)
    assert names == {name for name in stock(model).state_dict() if re.search(pattern, name)} and names
    state = stock(folder).state_dict()
    for name in names:
        assert NAMES.search(name) or int((state[name] == 0).sum()) == state[name].numel() // 2
    assert all(share == 0.5 for share in report(folder)["sparsity"].values())
    assert bool(report(folder)["routing_change"]) == ("router" in report(folder)["sparsity"])


@pytest.mark.parametrize(
    "family", slow_after(3, ["mixtral", "qwen3_next", "afmoe", "lfm2_moe", "minimax", "phimoe", "ernie4_5_moe"])
)
def test_all_is_every_matrix_but_the_routers(family, lab, made):
    model, folder = lab(family)["model"], made(family, "prune method=magnitude where=all sparsity=0.25")
    expected = set()
    for i, layer in enumerate(stock(model).model.layers):
        block = slow.naive.BLOCK.get(family, "mlp")
        router = f"{block}.{slow.naive.ROUTER.get(family, 'gate')}"
        has_experts = hasattr(getattr(layer, block, None), "experts")
        for name, module in layer.named_modules():
            gate = has_experts and (name.startswith(router) or getattr(module, "out_features", 0) == 1)
            if isinstance(module, nn.Linear) and not gate:
                expected.add(f"model.layers.{i}.{name}.weight")
        expected |= {f"model.layers.{i}.{n}" for n, _ in layer.named_parameters() if NAMES.search(n)}
    assert changed(model, folder) == expected
    state = stock(folder).state_dict()
    assert {int((state[name] == 0).sum()) * 4 - state[name].numel() for name in expected} == {0}


@pytest.mark.parametrize("family", slow_after(2, ["mixtral", "deepseek_v3", "gpt_oss", "llama4_text"]))
@torch.no_grad()
def test_what_a_pruned_router_changes(family, lab, made):
    model, folder, found = lab(family)["model"], made(family, "prune where=router sparsity=0.75"), windows(lab(family))
    before, after = reference(model), reference(folder)
    layer = moe_layers(folder, family)[0]
    tokens, _ = slow.entering(before, family, found.ids_NS)[layer]
    flips, overlap, kl = [], [], []
    for x in tokens:
        (old, old_logits), (new, new_logits) = (slow.routing(m, family, layer, x) for m in (before, after))
        flips.append(set(old.ids) != set(new.ids))
        overlap.append(len(set(old.ids) & set(new.ids)) / len(old.ids))
        p, q = old_logits.double().softmax(0), new_logits.double().softmax(0)
        kl.append(float((p * (p / q).log()).sum()))
    said = report(folder)["routing_change"]
    assert sorted(map(int, said)) == moe_layers(folder, family)
    assert 0 < said[str(layer)]["flips"] == pytest.approx(np.mean(flips), abs=0.5 / len(tokens))
    assert said[str(layer)]["overlap"] == pytest.approx(np.mean(overlap), abs=0.5 / len(tokens))
    assert 0 < said[str(layer)]["kl"] == pytest.approx(np.mean(kl), rel=1e-3)
