"""Weight stages that cannot be, and memory that does not suffice."""

from __future__ import annotations

import copy

import pytest
import torch

import moe_compress
from moe_compress.compression.weights import stage
from moe_compress.engine import forward
from support.interrupted import counting
from support.pruned import NAMES, refused, report, same_bits, stock, stored
from support.slow import slow_after


@pytest.mark.parametrize(
    ("family", "sentence", "said"),
    [
        ("mixtral", "prune sparsity=1", "sparsity=1.0: the fraction of weights that become zero is in [0, 1)."),
        ("mixtral", "prune sparsity=0", "sparsity=0.0 would set no weight to zero in matrices of at most 768 weights"),
        ("mixtral", "prune sparsity=0.0005", "of at most 768 weights: say at least sparsity=0.001302."),
        ("mixtral", "prune allocate=owl spread=0.001", "allocate=owl has nothing to share out at sparsity=0.5 spread"),
        ("mixtral", "prune sparsity=-0.1", "sparsity=-0.1: the fraction of weights"),
        ("mixtral", "prune sparsity=nan", "sparsity=nan: the fraction of weights"),
        ("mixtral", "prune sparsity=inf", "sparsity=inf: the fraction of weights"),
        ("mixtral", "prune sparsity=none", "sparsity=None: the fraction of weights"),
        ("mixtral", "prune sparsity=half", "prune.sparsity=half: a number is needed."),
        ("mixtral", "prune sparsity=0.5 pattern=2:4", "prune takes sparsity= or pattern=, not both."),
        ("mixtral", "prune pattern=4:2", "pattern=4:2: write how many weights stay of how many in a row, such as 2:4"),
        ("mixtral", "prune pattern=0:4", "pattern=0:4: write how many"),
        ("mixtral", "prune pattern=4:4", "pattern=4:4: write how many"),
        ("mixtral", "prune pattern=2-4", "pattern=2-4: write how many"),
        ("mixtral", "prune pattern=-2:4", "pattern=-2:4: write how many"),
        ("mixtral", "prune pattern=2:4:8", "pattern=2:4:8: write how many"),
        ("mixtral", "prune pattern=2.5:4", "pattern=2.5:4: write how many"),
        ("mixtral", "prune pattern=²:4", "pattern=²:4: write how many"),
        ("mixtral", "prune pattern=2:5", "pattern=2:5: mlp.experts.gate of layer 0 has 32 inputs, which are no groups"),
        ("mixtral", "prune pattern=4:16", "mlp.experts.down of layer 0 has 24 inputs, which are no groups of 16"),
        ("mixtral", "prune where=exports", "where=exports: 'exports' is no part of a layer; parts: experts, shared"),
        ("mixtral", "prune spare=all", "spare=all: 'all' is no part of a layer; parts: experts, shared"),
        ("mixtral", "prune where=", "nothing is left to be changed."),
        ("mixtral", "prune where=experts spare=experts", "where=experts spare=experts: nothing is left to be changed."),
        ("mixtral", "prune where=shared", "where=shared: mixtral has no such part that can be told apart."),
        ("mixtral", "prune where=dense", "where=dense: mixtral has no such part that can be told apart."),
        ("jetmoe", "prune", "experts of jetmoe cannot be changed"),
        ("mixtral", "prune pattern=2:4 allocate=owl", "allocate=owl shares out sparsity=; a pattern is the same in"),
        ("mixtral", "prune allocate=owl where=attention", "allocate=owl needs experts (where=) of one size"),
        ("mixtral", "prune allocate=both spread=0", "spread=0.0: how far an expert's sparsity may be"),
        ("mixtral", "prune allocate=both spread=nan", "spread=nan: how far an expert's sparsity may be"),
        ("mixtral", "prune experts_at_once=-1", "experts_at_once=-1 min_tokens=1: counts from 0 (all) and from 1 up"),
        ("mixtral", "prune min_tokens=0", "experts_at_once=0 min_tokens=0: counts from 0 (all) and from 1 up"),
        ("mixtral", "prune shrink=-1", "shrink=-1.0: a number of tokens from 0 up is needed."),
        ("mixtral", "prune shrink=nan", "shrink=nan: a number of tokens from 0 up is needed."),
        ("mixtral", "prune shrink=inf", "shrink=inf: a number of tokens from 0 up is needed."),
        ("mixtral", "prune where=router propagate=original", "use propagate=compressed."),
        ("mixtral", "prune unseen=skip", "prune.unseen=skip: allowed: pooled, magnitude, dense, error."),
        ("mixtral", "prune method=wand", "prune.method=wand: did you mean 'wanda'?"),
        ("mixtral", "expert_drop keep=4 + prune pattern=2:7", "pattern=2:7: mlp.experts.gate of layer 0 has 32 inputs"),
    ],
)  # fmt: skip
def test_what_cannot_be_pruned(family, sentence, said, lab, monkeypatch, tmp_path):
    calls = counting(monkeypatch, forward.hf, "run_layer")
    assert said in refused(sentence, lab(family), tmp_path)
    assert not calls


def test_spared_routers_do_not_forbid_the_original_stream(lab, tmp_path):
    options = {**lab("mixtral"), "out": str(tmp_path / "out")}
    folder = moe_compress.compress("prune where=experts,router spare=router propagate=original", **options).folder
    assert report(folder)["sparsity"] == {"experts": 0.5}


# Two Gram matrices (of 32 and of 24 inputs), and four more of the larger one for the solver, in fp32.
EACH = 4 * (32**2 + 24**2 + 4 * 32**2)


@pytest.mark.parametrize("fit", slow_after(1, [1, 3, 7]))
def test_gram_matrices_that_do_not_fit(fit, lab, monkeypatch, tmp_path):
    monkeypatch.setattr(stage, "free_memory", lambda _device: (fit + 1) * EACH - 1)
    said = refused("prune method=sparsegpt", lab("mixtral"), tmp_path)
    assert said.startswith("layer 0: the Gram matrices of 8 experts need ")
    assert said.endswith(f"experts_at_once={fit} would fit.")
    assert f"experts_at_once={fit} would fit" in refused(
        f"prune method=sparsegpt experts_at_once={fit + 1}", lab("mixtral"), tmp_path
    )
    options = {**lab("mixtral"), "out": str(tmp_path / "out")}
    assert moe_compress.compress(f"prune method=sparsegpt experts_at_once={fit}", **options).folder
    moe_compress.compress("prune method=wanda", **{**options, "out": str(tmp_path / "wanda")})


def test_not_even_one_gram_matrix_fits(lab, monkeypatch, tmp_path):
    monkeypatch.setattr(stage, "free_memory", lambda _device: EACH - 1)
    assert "would fit" not in refused("prune method=sparsegpt experts_at_once=1", lab("mixtral"), tmp_path)


@pytest.mark.parametrize("sentence", ["prune", "expert_drop score=weight_norm keep=6 + prune method=magnitude"])
def test_no_plan_holds_pruned_weights(sentence, lab, made, tmp_path):
    plan = made("mixtral", sentence) / "plan.json"
    options = {**lab("mixtral"), "out": str(tmp_path / "out")}
    with pytest.raises(ValueError, match=r"its stage prune changes weights, which no plan holds: run the recipe\.yaml"):
        moe_compress.apply(plan, **options)
    assert not list(tmp_path.iterdir())


def test_the_same_folder_in_other_arithmetic_is_another_checkpoint(lab, tmp_path):
    """Magnitudes are compared in the arithmetic's dtype: a checkpoint that is there must not pass for the other one."""
    options = {**lab("mixtral"), "out": str(tmp_path / "out")}
    moe_compress.compress("prune method=magnitude", **{**options, "dtype": "bfloat16"})
    other = moe_compress.compress("prune method=magnitude", **{**options, "out": str(tmp_path / "other")}).folder
    try:
        found = moe_compress.compress("prune method=magnitude", **options).folder
    except ValueError as error:
        assert "already holds something" in str(error)
    else:
        one, two = stored(found), stored(other)
        assert all(same_bits(one[name], two[name]) for name in one)


@pytest.mark.parametrize("words", ["", " method=sparsegpt pattern=2:4 where=all", " allocate=both"])
def test_pruning_takes_no_parameter_away(words, lab):
    found = moe_compress.plan(f"prune{words}", **lab("deepseek_v3"))
    assert found.form == "plain" and found.after == found.before


def test_weights_too_small_for_the_arithmetic_go_all_the_same(reader_folder, lab, tmp_path):
    """In fp16 they are zero, and are chosen first: they have to be zero in the fp32 file, too."""
    model = stock(reader_folder("mixtral"))
    small = copy.deepcopy(model)
    with torch.no_grad():
        for name, tensor in small.named_parameters():
            if name.endswith("experts.down_proj"):
                tensor.mul_(1e-6)
    small.save_pretrained(tmp_path / "small")
    for path in reader_folder("mixtral").glob("token*"):
        (tmp_path / "small" / path.name).write_bytes(path.read_bytes())
    options = {**lab("mixtral"), "model": str(tmp_path / "small"), "results": str(tmp_path / "runs")}
    folder = moe_compress.compress("prune method=magnitude", **{**options, "dtype": "float16"}).folder
    for name, tensor in stock(folder).state_dict().items():
        if NAMES.search(name):
            assert float((tensor == 0).float().mean()) >= 0.5, name
