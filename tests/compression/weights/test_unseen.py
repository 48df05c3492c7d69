"""Experts that see too few tokens."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import moe_compress
from moe_compress.calibration.input_moments import Moments
from support import naive_pruning as slow
from support import readers, tiny
from support.pruned import PER_MATRIX, Options, agreement, random, report, rows, stock
from support.slow import each_once, slow_unless

LONELY = 3


@pytest.fixture(scope="session")
def lonely(lab, tmp_path_factory) -> Options:
    """Options for a model whose expert LONELY of layer 0 is never chosen."""
    folder = readers.save_lonely(tmp_path_factory.mktemp("lonely") / "model", LONELY)
    return {**lab("gpt_oss"), "model": str(folder)}


def pooled(experts: list[slow.Rows]) -> slow.Rows:
    return slow.Rows([x for e in experts for x in e.inputs], [x for e in experts for x in e.inner])


SOLVERS, POLICIES = ("wanda", "sparsegpt"), ("pooled", "magnitude", "dense")


@pytest.mark.parametrize(("method", "policy"), slow_unless(each_once(SOLVERS, POLICIES), SOLVERS, POLICIES))
def test_an_expert_without_tokens(method, policy, lonely, tmp_path):
    options = {**lonely, "out": str(tmp_path / "out")}
    folder = moe_compress.compress(f"prune method={method} propagate=original unseen={policy}", **options).folder
    assert report(folder)["unseen"] == {"0": [LONELY]}
    before, after = (slow.matrices(stock(place), "gpt_oss", 0) for place in (options["model"], folder))
    everything = pooled(rows("gpt_oss", lonely)[0])
    assert not rows("gpt_oss", lonely)[0][LONELY].gates
    for n, (old, new) in enumerate(zip(before[LONELY], after[LONELY], strict=True)):
        inputs = everything.source(down=n == 2)
        if policy == "dense":
            assert torch.equal(old, new)
        elif method == "wanda":
            expected = slow.wanda(old, inputs if policy == "pooled" else torch.ones(1, old.shape[1]), 0.5)
            assert torch.equal(new, old.masked_fill(expected, 0))
        elif policy == "magnitude":
            torch.testing.assert_close(new, old.masked_fill(slow.magnitude(old, 0.5), 0))
        else:
            left, _ = slow.sparsegpt(old, inputs / len(inputs) ** 0.5, 0.5)
            assert float(((new - left).abs() < 1e-3 * (1 + left.abs())).double().mean()) > 0.97
    for e in set(range(tiny.EXPERTS)) - {LONELY}:
        assert [int((m == 0).sum()) for m in after[e]] == [PER_MATRIX // 2] * 3


def test_an_expert_without_tokens_can_be_an_error(lonely, tmp_path):
    options = {**lonely, "out": str(tmp_path / "out")}
    with pytest.raises(ValueError, match=rf"^expert {LONELY} of layer 0: fewer than 1 tokens of the calibration text"):
        moe_compress.compress("prune unseen=error", **options)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial" / "config.json").exists()


def test_fewer_tokens_than_asked_for_are_as_good_as_none(lab, made):
    seen, least = rows("deepseek_v3", lab("deepseek_v3")), 25
    folder = made("deepseek_v3", f"prune propagate=original min_tokens={least}")
    few = {str(i): [e for e, one in enumerate(experts) if len(one.gates) < least] for i, experts in seen.items()}
    assert any(few.values()) and report(folder)["unseen"] == {i: found for i, found in few.items() if found}
    for layer, experts in seen.items():
        together = pooled(experts)
        mixed = [together if len(one.gates) < least else one for one in experts]
        for one in mixed:
            one.gates = one.gates or [1.0]
        same, whole = agreement("deepseek_v3", folder, lab("deepseek_v3")["model"], {layer: mixed})
        assert same >= 0.999 * whole


@pytest.mark.parametrize("use_pooled", [True, False])
@pytest.mark.parametrize("shrink", [0.0, 5.0])
@pytest.mark.parametrize("statistic", ["input_squares", "input_grams"])
def test_mean_moments(statistic, shrink, use_pooled):
    parts = [random(rows, 4, seed=rows).double() for rows in (1, 7, 30)]

    def moment(x: Tensor) -> Tensor:
        return x.square().sum(0) if statistic == "input_squares" else x.T @ x

    total = torch.stack([moment(x) for x in parts])
    moments = Moments(torch.tensor([1, 7, 30]), total.float(), total.sum(0).float(), 38)
    found = moments.mean(shrink, torch.tensor([True, False, False]), use_pooled)
    every = total.sum(0) / 38
    flat = torch.ones(4) if statistic == "input_squares" else torch.eye(4)
    torch.testing.assert_close(found[0].double(), every if use_pooled else flat.double(), rtol=1e-5, atol=1e-6)
    for e in (1, 2):
        expected = (total[e] + shrink * every) / (len(parts[e]) + shrink)
        torch.testing.assert_close(found[e].double(), expected, rtol=1e-5, atol=1e-6)
    none = Moments(torch.zeros(3, dtype=torch.long), 0 * total, 0 * total[0], 0)
    assert torch.equal(none.mean(shrink, torch.ones(3, dtype=torch.bool), True), flat.expand(3, *flat.shape))


def test_shrinking_leads_to_what_all_experts_see(lab, made):
    options = lab("mixtral")
    folder = made("mixtral", "prune propagate=original shrink=1e6")
    seen = {layer: [pooled(experts)] * tiny.EXPERTS for layer, experts in rows("mixtral", options).items()}
    for one in itertools.chain.from_iterable(seen.values()):
        one.gates = [1.0]
    same, whole = agreement("mixtral", folder, options["model"], seen)
    own, _ = agreement("mixtral", folder, options["model"], rows("mixtral", options))
    assert same >= 0.999 * whole > own
