"""Recipes of `factorise` that cannot be, memory that does not suffice, and forecasts that come true."""

from __future__ import annotations

import pytest

import moe_compress
from moe_compress.compression.weights import stage
from moe_compress.engine import forward
from support import tiny
from support.interrupted import counting
from support.pruned import refused
from support.slow import slow_after


@pytest.mark.parametrize(
    ("sentence", "said"),
    [
        ("rank=0", "layer 0: structure=base_delta of matrices 24 x 32: rank=0 is not in 1..24."),
        ("rank=25", "layer 0: structure=base_delta of matrices 24 x 32: rank=25 is not in 1..24."),
        ("structure=wrapper rank=13", "structure=wrapper of matrices 24 x 32: rank=13 is not in 1..12."),
        ("rank=4 ratio=0.5", "factorise takes rank= or ratio=, not both."),
        ("ratio=0", "ratio=0.0: the share of the experts that is kept is above 0 and below 1."),
        ("ratio=1", "ratio=1.0: the share of the experts that is kept is above 0 and below 1."),
        ("ratio=nan", "ratio=nan: the share of the experts that is kept is above 0 and below 1."),
        ("ratio=none", "ratio=None: the share of the experts that is kept is above 0 and below 1."),
        ("ratio=0.1", "structure=base_delta keeps at least 0.1980 of 8 experts (its core and rank 1): ratio=0.1"),
        ("structure=svd ratio=0.05", "structure=svd keeps at least 0.0730 of 8 experts (rank 1): ratio=0.05 is less."),
        ("structure=wrapper ratio=0.2", "structure=wrapper keeps at least 0.2709 of 8 experts (its core and wrappers"),
        ("structure=auto ratio=0.01", "structure=shared_basis keeps at least 0.0365 of 8 experts"),
        ("structure=wrapper solver=adam steps=-5", "steps=-5: at least 1."),
        ("structure=wrapper solver=adam lr=nan", "lr=nan: a step size above 0 is needed"),
        ("structure=sparse_low_rank sparse=nan", "sparse=nan: the residue's share of what is stored is above 0"),
        ("structure=sparse_low_rank ratio=0.05", "keeps at least 0.1355 of 8 experts (its residue and rank 1)"),
        ("structure=auto budget=global ratio=0.05", "structure=svd keeps at least 0.0730 of 8 experts"),
        ("structure=qr", "factorise.structure=qr: allowed: base_delta, svd, shared_basis"),
        ("projections=gates", "projections=gates: 'gates' is no projection of these experts; they have gate, up, down"),
        ("projections=", "projections=: nothing is named; they have gate, up, down (all for each of them)."),
        ("where=all", "where=all: factors are made of experts alone (where=experts, shared or both)."),
        ("where=experts,attention", "where=experts,attention: factors are made of experts alone"),
        ("where=shared", "where=shared: mixtral has no such part that can be told apart."),
        ("structure=auto rank=4", "structure=auto compares structures at the same bytes: say ratio= in place"),
        ("structure=svd budget=layer rank=4", "budget=layer shares out ranks at the same bytes: say ratio= in place"),
        ("structure=wrapper budget=global", "budget=global is for structure=svd, base_delta, sparse_low_rank, shared"),
        ("structure=svd solver=adam", "factorise.solver=adam would do nothing: it goes with structure=wrapper."),
        ("multiple=0", "multiple=0 sweeps=4: at least 1 each."),
        ("sweeps=0", "multiple=1 sweeps=0: at least 1 each."),
        ("objective=plain shrink=4", "shrink=4.0 would do nothing: with its other words factorise looks at no text"),
        ("shrink=-1", "shrink=-1.0: a number of tokens from 0 up is needed."),
        ("min_tokens=0", "experts_at_once=0 min_tokens=0: counts from 0 (all) and from 1 up are needed."),
        ("experts_at_once=-1", "experts_at_once=-1 min_tokens=1: counts from 0 (all) and from 1 up are needed."),
        ("unseen=dense", "factorise.unseen=dense: allowed: pooled, plain, error."),
        ("structure=basis_mixture bases=9", "structure=basis_mixture of 8 experts: bases=9 is not in 1..8."),
        ("structure=sparse_low_rank pattern=2:5", "pattern=2:5 does not divide 32 inputs."),
        ("structure=sparse_low_rank pattern=4:2", "pattern=4:2: write how many weights stay of how many in a row"),
        ("structure=sparse_low_rank sparse=1", "sparse=1.0: the residue's share of what is stored is above 0 and"),
        ("structure=svd + factorise structure=svd", "experts that are held in factors can be rounded to the nearest"),
        ("structure=svd + prune", "experts that are held in factors can be rounded to the nearest alone"),
    ],
)  # fmt: skip
def test_what_cannot_be_factored(sentence, said, lab, monkeypatch, tmp_path):
    calls = counting(monkeypatch, forward.hf, "run_layer")
    assert said in refused(f"factorise {sentence}", lab("mixtral"), tmp_path)
    assert not calls


@pytest.mark.parametrize(
    ("family", "sentence", "said"),
    [
        ("nemotron_h", "factorise projections=gate", "'gate' is no projection of these experts; they have up, down"),
        ("jetmoe", "factorise", "experts of jetmoe cannot be"),
    ],
)
def test_experts_that_have_no_such_parts(family, sentence, said, lab, tmp_path):
    assert said in refused(sentence, lab(family), tmp_path)


@pytest.mark.parametrize(
    "before",
    slow_after(
        1,
        [
            "channels ratio=0.25 within=layer",
            "quantize method=rtn bits=4 group_size=8 format=packed where=experts",
        ],
    ),
)
def test_experts_that_are_no_whole_matrices_of_one_size(before, lab, tmp_path):
    said = refused(f"{before} + factorise structure=svd", lab("mixtral"), tmp_path)
    assert "experts that differ in width or are packed cannot be changed any more: put this stage before" in said


# Two Gram matrices (of 32 and of 24 inputs), and four more of the larger one for the solver, in fp32.
EACH = 4 * (tiny.HIDDEN**2 + tiny.INNER**2)


def test_gram_matrices_that_do_not_fit(lab, monkeypatch, tmp_path):
    """Say what would fit: fewer experts at a time, or one matrix for all of them."""
    monkeypatch.setattr(stage, "free_memory", lambda _device: 4 * EACH - 1)
    said = refused("factorise structure=svd", lab("mixtral"), tmp_path)
    assert said.startswith("layer 0: the Gram matrices of 8 experts need ") and "experts_at_once=3 would fit" in said
    out = {"out": str(tmp_path / "out")}
    assert moe_compress.compress("factorise structure=svd experts_at_once=3", **{**lab("mixtral"), **out}).folder
    monkeypatch.setattr(stage, "free_memory", lambda _device: EACH - 1)
    place = tmp_path / "less"
    place.mkdir()
    assert refused("factorise structure=svd experts_at_once=1", lab("mixtral"), place).endswith(": use grams=pooled.")
    out = {"out": str(tmp_path / "pooled")}
    assert moe_compress.compress("factorise structure=svd grams=pooled", **{**lab("mixtral"), **out}).folder


@pytest.mark.parametrize(
    ("family", "words"),
    slow_after(
        3,
        [
            ("mixtral", "structure=base_delta"),
            ("deepseek_v3", "structure=sparse_low_rank ratio=0.4"),
            ("gpt_oss", "structure=shared_basis rank=6 projections=up,down"),
            ("mixtral", "structure=wrapper rank=2"),
            ("nemotron_h", "structure=basis_mixture bases=3 activation=silu"),
            ("llama4_text", "structure=svd multiple=4"),
        ],
    ),
)
def test_the_forecast_comes_true(family, words, reader_folder, options):
    found = moe_compress.plan(f"factorise {words}", model=reader_folder(family), **options)
    made = moe_compress.compress(f"factorise {words}", model=reader_folder(family), **options)
    assert made.record.sizes["parameters"] == found.after.parameters < found.before.parameters
    assert made.record.sizes["bytes"] == found.after.bytes
    assert made.record.form == found.form == "edited"


@pytest.mark.parametrize("words", slow_after(1, ["structure=svd budget=global", "structure=auto"]))
def test_a_forecast_of_what_is_shared_out_is_near(words, reader_folder, options):
    found = moe_compress.plan(f"factorise {words}", model=reader_folder("mixtral"), **options)
    made = moe_compress.compress(f"factorise {words}", model=reader_folder("mixtral"), **options)
    assert made.record.sizes["parameters"] == pytest.approx(found.after.parameters, rel=0.1)
    experts = tiny.LAYERS * tiny.EXPERTS * 3 * tiny.HIDDEN * tiny.INNER
    assert made.record.sizes["parameters"] <= found.before.parameters - experts // 2
