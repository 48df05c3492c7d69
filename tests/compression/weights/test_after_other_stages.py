"""Weight stages before and after other stages, and the bits of what they leave alone."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

import moe_compress
from moe_compress.checkpoints.folder import MANIFEST
from moe_compress.checkpoints.load import load_model
from support import naive_pruning as slow
from support import tiny
from support.editing import logits_of
from support.pruned import PER_MATRIX, WORDS, same_bits, stock, stored, stored_as
from support.slow import slow_after

BEFORE = [
    ("mixtral", "expert_drop keep=6"),
    ("deepseek_v3", "expert_drop score=weight_norm keep=4"),
    ("mixtral", "expert_drop keep=4 novice=mean"),
    ("gpt_oss", "expert_drop keep=4 novice=mean"),
    ("mixtral", "expert_drop score=weight_norm keep=4 budget=global"),
    ("mixtral", "expert_merge preset=hc_smoe keep=4"),
    ("gpt_oss", "expert_merge keep=4"),
    ("mixtral", "layer_drop layers=1"),
    ("qwen3_moe", "block_drop layers=1"),
    ("olmoe", "skip beta=0.6"),
    ("deepseek_v2", "top_k mean=1.5"),
]


@pytest.mark.parametrize(
    ("family", "before", "words"),
    slow_after(
        3,
        [
            *((*one, "method=wanda where=experts,router") for one in BEFORE[1:4]),
            *((*one, "method=magnitude") for one in BEFORE[4:5]),
            *((*one, "method=sparsegpt") for one in BEFORE[5:6]),
            *((*one, "method=wanda where=experts,router") for one in BEFORE[8:10]),
            *((*one, "method=wanda where=experts,router") for one in (*BEFORE[:1], *BEFORE[4:8], *BEFORE[10:])),
        ],
    ),
)
def test_pruning_after_other_stages(family, before, words, lab, made, tmp_path):
    """Only matrices change: the pruned checkpoint is loaded as the other one is, by the same code."""
    first = made(family, before)
    options = {**lab(family), "model": str(first), "out": str(tmp_path / "out")}
    folder = moe_compress.compress(f"prune {words}", **options).folder
    old, one = stored(first), stored(folder)
    if words == "method=sparsegpt":
        sentence = f"{before} + prune {words}"
        both = stored(moe_compress.compress(sentence, **{**lab(family), "out": tmp_path / "both"}).folder)
        assert one.keys() == both.keys() and all(same_bits(one[name], both[name]) for name in one)
    assert {k: (t.dtype, t.shape) for k, t in old.items()} == {k: (t.dtype, t.shape) for k, t in one.items()}
    differ = {name for name in old if not same_bits(old[name], one[name])}
    zeros = sum(int((one[name] == 0).sum()) - int((old[name] == 0).sum()) for name in differ)
    weights = sum(old[name].numel() for name in differ)
    assert differ and zeros * 2 == weights and not any("norm" in n or "embed" in n or "bias" in n for n in differ)
    assert logits_of(load_model(folder, torch.float32), WORDS).isfinite().all()
    assert json.loads((folder / "config.json").read_text()) == json.loads((first / "config.json").read_text())


@pytest.mark.parametrize("family", slow_after(1, ["mixtral", "gpt_oss"]))
def test_dropping_experts_keeps_the_zeros_of_the_others(family, made):
    folder = made(family, "prune pattern=2:4 method=sparsegpt + expert_drop score=weight_norm keep=5")
    pruned = made(family, "prune pattern=2:4 method=sparsegpt")
    edits = json.loads((folder / "plan.json").read_text())["stages"][-1]["edits"]
    assert len(edits) == tiny.LAYERS
    for edit in edits:
        before = slow.matrices(stock(pruned), family, edit["layer"])
        after = slow.matrices(stock(folder), family, edit["layer"])
        for e, new in zip(edit["experts"], after, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(before[e], new, strict=True))


@pytest.mark.parametrize("words", slow_after(1, ["method=magnitude", "pattern=2:4 propagate=original"]))
def test_pruning_twice_the_same_way_changes_nothing_and_more_takes_more(words, made):
    once, twice = made("mixtral", f"prune {words}"), made("mixtral", f"prune {words} + prune {words}")
    assert all(same_bits(t, stored(twice)[name]) for name, t in stored(once).items())
    more = made("mixtral", f"prune {words} + prune method=sparsegpt sparsity=0.75")
    for layer in range(tiny.LAYERS):
        pairs = zip(*(slow.matrices(stock(f), "mixtral", layer) for f in (once, more)), strict=True)
        for old, new in itertools.chain.from_iterable(zip(*pair, strict=True) for pair in pairs):
            assert int((new == 0).sum()) == PER_MATRIX * 3 // 4
            assert bool((new[old == 0] == 0).double().mean() > 0.99)


def test_reports_of_both_stages_are_kept(made):
    folder = made("mixtral", "prune method=magnitude + prune method=sparsegpt sparsity=0.75")
    manifest = json.loads((folder / MANIFEST).read_text())
    assert [part["sparsity"]["experts"] for part in manifest["report"]] == [0.5, 0.75]
    assert [stage["given"]["method"] for stage in manifest["stages"]] == ["magnitude", "sparsegpt"]


# How a checkpoint is stored, in what it is computed, and which of its tensors are stored in fp32 all the same.
STORED = [
    ("bfloat16", "float32", ""),
    ("bfloat16", "bfloat16", ""),
    ("float32", "bfloat16", ""),
    ("float16", "bfloat16", ""),
    ("bfloat16", "float16", ""),
    ("bfloat16", "float32", "gate.weight"),
    ("bfloat16", "bfloat16", "gate.weight"),
]


@pytest.mark.parametrize(
    ("stored_in", "computed_in", "keep", "family", "method"),
    slow_after(
        6,
        [(*one, "mixtral", method) for one in STORED for method in ("wanda", "sparsegpt")[: 1 + bool(one[2])]]
        + [(*one, "gpt_oss", "magnitude") for one in STORED[:5]],
    ),
)
def test_what_is_not_pruned_keeps_its_bits(stored_in, computed_in, keep, family, method, lab, tmp_path):
    model = stored_as(family, tmp_path / "model", getattr(torch, stored_in), keep)
    options = {**lab(family), "model": str(model), "out": str(tmp_path / "out"), "dtype": computed_in}
    before, after = stored(model), stored(moe_compress.compress(f"prune method={method}", **options).folder)
    assert before.keys() == after.keys()
    matrices = [name for name in before if ".experts." in name and not name.endswith("bias")]
    assert matrices
    for name in before:
        assert before[name].dtype == after[name].dtype
        if name not in matrices:
            assert same_bits(before[name], after[name]), name
        elif method != "sparsegpt":
            assert same_bits(after[name], torch.where(after[name] == 0, 0, before[name])), name
    zeros = sum(int((after[name] == 0).sum()) for name in matrices)
    assert zeros == sum(after[name].numel() for name in matrices) // 2
