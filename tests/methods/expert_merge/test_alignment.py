"""Neurons are matched as well as can be: permuted copies exactly, small ones as brute force would."""

from __future__ import annotations

import itertools
import threading
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import relu, silu

from moe_compress.methods.expert_merge import alignment
from moe_compress.methods.expert_merge.alignment import Neurons, align_groups, order, permuted
from moe_compress.models.moe import Expert, moe_views
from support import tiny

# Gated; gated with biases, interleaved and transposed; without a gate.
FAMILIES = ("mixtral", "gpt_oss", "nemotron_h")
BY = ("weights", "activations", "both")


@pytest.fixture(scope="module", params=FAMILIES)
def experts(request) -> list[Expert]:
    """The experts of a tiny model's first MoE layer."""
    view = next(iter(moe_views(tiny.make(request.param)).values()))
    with torch.no_grad():
        return [view.expert(e) for e in range(view.num_experts)]


def shuffle(width: int, seed: int = 0) -> Tensor:
    return torch.randperm(width, generator=torch.Generator().manual_seed(seed))


def tokens(width: int, seed: int = 0) -> Tensor:
    return torch.randn(50, width, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def activations(expert: Expert, x_TD: Tensor) -> Tensor:
    """What enters the down projection, [F, T]."""
    up_TF = x_TD @ expert.up.T + (0 if expert.up_bias is None else expert.up_bias)
    if expert.gate is None:
        return relu(up_TF).square().T
    return (silu(x_TD @ expert.gate.T + (0 if expert.gate_bias is None else expert.gate_bias)) * up_TF).T


def outputs(expert: Expert, x_TD: Tensor) -> Tensor:
    return activations(expert, x_TD).T @ expert.down.T + (0 if expert.down_bias is None else expert.down_bias)


def combined(change: Any, *experts: Expert) -> Expert:
    """An expert whose tensors are `change` of the given experts' tensors."""
    tensors = {f.name: [getattr(e, f.name) for e in experts] for f in fields(Expert)}
    return Expert(**{name: None if found[0] is None else change(*found) for name, found in tensors.items()})


def noisy(expert: Expert, size: float, seed: int = 9) -> Expert:
    generator = torch.Generator().manual_seed(seed)
    return combined(lambda t: t + size * torch.randn(t.shape, generator=generator), expert)


def wide(width: int, size: int = 8, seed: int = 0) -> Expert:
    generator = torch.Generator().manual_seed(seed)
    gate, up = (torch.randn(width, size, generator=generator) for _ in range(2))
    return Expert(gate, up, torch.randn(size, width, generator=generator))


def neurons(expert: Expert) -> Neurons:
    return Neurons.of(expert, activations(expert, tokens(expert.up.shape[1])))


def total(reference: Neurons, other: Neurons, found_F: Tensor, by: str) -> float:
    return float(
        sum((a * b[found_F]).sum() for a, b in zip(reference.parts(by), other.parts(by), strict=True))  # type: ignore
    )


def test_another_order_of_neurons_is_the_same_function(experts):
    x_TD = tokens(experts[0].up.shape[1])
    for expert in experts:
        other = permuted(expert, shuffle(len(expert.up)))
        assert (other.gate is None) == (expert.gate is None) and not torch.equal(other.up, expert.up)
        torch.testing.assert_close(outputs(other, x_TD), outputs(expert, x_TD))


@pytest.mark.parametrize("by", BY)
def test_a_permuted_copy_is_put_back_in_order(by, experts):
    for seed, expert in enumerate(experts):
        moved_F = shuffle(len(expert.up), seed)
        found_F = order(neurons(expert), neurons(permuted(expert, moved_F)), by=by)
        assert found_F.dtype == torch.int64 and torch.equal(found_F, moved_F.argsort())
        near_F = order(neurons(expert), neurons(noisy(permuted(expert, moved_F), 1e-3)), by=by)
        assert torch.equal(near_F, moved_F.argsort())


def test_merging_permuted_copies_loses_nothing_once_aligned(experts):
    x_TD = tokens(experts[0].up.shape[1], seed=3)
    for seed, expert in enumerate(experts):
        copy = permuted(expert, shuffle(len(expert.up), seed))
        aligned = permuted(copy, order(neurons(expert), neurons(copy), by="weights"))
        merged = combined(lambda a, b: 0.3 * a + 0.7 * b, expert, aligned)
        torch.testing.assert_close(outputs(merged, x_TD), outputs(expert, x_TD))
        unaligned = combined(lambda a, b: 0.3 * a + 0.7 * b, expert, copy)
        assert (outputs(unaligned, x_TD) - outputs(expert, x_TD)).abs().max() > 0.05


def naive_similarity(mine: Expert, theirs: Expert, by: str) -> list[list[float]]:
    """The similarity of every two neurons, number by number."""

    def described(expert: Expert) -> list[tuple[float, list[list[float]]]]:
        made = []
        for matrix, bias in ((expert.gate, expert.gate_bias), (expert.up, expert.up_bias)):
            if matrix is not None:
                extra = [[] for _ in matrix] if bias is None else [[v] for v in bias.tolist()]
                made.append([row + e for row, e in zip(matrix.tolist(), extra, strict=True)])
        made.append(expert.down.T.tolist())
        acted = activations(expert, tokens(expert.up.shape[1])).tolist()
        weights = [(1 / len(made), part) for part in made] if by != "activations" else []
        kinds = [*weights, *([(1.0, acted)] if by != "weights" else [])]
        return [(share / 2 if by == "both" else share, part) for share, part in kinds]

    width = len(mine.up)
    result = [[0.0] * width for _ in range(width)]
    for (share, a), (_, b) in zip(described(mine), described(theirs), strict=True):
        length = [sum(v * v for row in part for v in row) ** 0.5 for part in (a, b)]
        for i, j in itertools.product(range(width), repeat=2):
            result[i][j] += share * sum(p * q for p, q in zip(a[i], b[j], strict=True)) / (length[0] * length[1])
    return result


@pytest.mark.parametrize("by", BY)
def test_the_order_is_the_best_of_all(by, experts):
    """All 720 orders of six neurons."""
    small = [permuted(expert, torch.arange(4 * e, 4 * e + 6)) for e, expert in enumerate(experts[:4])]
    for mine, theirs in itertools.pairwise(small):
        table = naive_similarity(mine, theirs, by)
        best = max(itertools.permutations(range(6)), key=lambda p: sum(table[i][j] for i, j in enumerate(p)))
        found_F = order(neurons(mine), neurons(theirs), by=by)
        assert found_F.tolist() == list(best)
        expected = pytest.approx(sum(table[i][j] for i, j in enumerate(best)), rel=1e-5)
        assert total(neurons(mine), neurons(theirs), found_F, by) == expected


def test_gate_up_and_down_count_equally(experts):
    mine, theirs = experts[:2]
    scaled = Expert(
        theirs.gate, 1e3 * theirs.up, 1e-3 * theirs.down, theirs.gate_bias,
        None if theirs.up_bias is None else 1e3 * theirs.up_bias, theirs.down_bias,
    )  # fmt: skip
    expected = order(Neurons.of(mine), Neurons.of(theirs), by="weights")
    assert torch.equal(order(Neurons.of(mine), Neurons.of(scaled), by="weights"), expected)


def test_one_order_per_pair_serves_both_ways(experts):
    mine, theirs = neurons(experts[0]), neurons(experts[1])
    there, back = order(mine, theirs, by="both"), order(theirs, mine, by="both")
    assert torch.equal(there[back], torch.arange(mine.width))


@pytest.mark.parametrize("by", BY)
def test_silent_neurons_are_no_trouble(by, experts):
    keep_F = torch.ones(len(experts[0].up))
    keep_F[::3] = 0
    expert = experts[0]
    silent = Expert(
        *(None if t is None else t * keep_F[:, None] for t in (expert.gate, expert.up)),
        expert.down * keep_F,
        *(None if t is None else t * keep_F for t in (expert.gate_bias, expert.up_bias)),
        expert.down_bias,
    )
    moved_F = shuffle(len(expert.up))
    for other in (permuted(silent, moved_F), noisy(permuted(silent, moved_F), 1e-5)):
        found_F = order(neurons(silent), neurons(other), by=by)
        live = keep_F.bool()
        assert torch.equal(found_F[live], moved_F.argsort()[live]) and len(set(found_F.tolist())) == len(found_F)
    nothing = combined(torch.zeros_like, expert)
    for pair in ((nothing, expert), (expert, nothing), (nothing, nothing)):
        assert sorted(order(*map(neurons, pair), by=by).tolist()) == list(range(len(expert.up)))


def test_copies_are_exact_however_alike_their_neurons():
    """Neurons that differ in their last bits only: sums of float products cannot tell them apart."""
    row = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    steps = 1 + torch.finfo(torch.float32).eps * torch.arange(300)[:, None]
    expert = Expert(row * steps, row * steps, (row * steps).T)
    moved_F = shuffle(300)
    for by in BY:
        found_F = order(neurons(expert), neurons(permuted(expert, moved_F)), by=by)
        assert torch.equal(found_F, moved_F.argsort()), by


def test_half_precision_weights_are_matched_too():
    expert = combined(lambda t: t.bfloat16(), wide(40))
    moved_F = shuffle(40)
    for other in (permuted(expert, moved_F), combined(lambda t: t.float() + 1e-4, permuted(expert, moved_F))):
        assert torch.equal(order(Neurons.of(expert), Neurons.of(other), by="weights"), moved_F.argsort())


def test_copies_wider_than_the_exact_limit_are_exact():
    expert = wide(alignment.EXACT + 4)
    moved_F = shuffle(alignment.EXACT + 4)
    copy = permuted(expert, moved_F)
    for other in (copy, noisy(copy, 1e-4)):
        assert torch.equal(order(Neurons.of(expert), Neurons.of(other), by="weights"), moved_F.argsort())


def test_wide_experts_come_close_to_the_best_order(monkeypatch):
    mine, theirs = Neurons.of(wide(400, 32)), Neurons.of(wide(400, 32, seed=1))
    best = total(mine, theirs, order(mine, theirs, by="weights"), "weights")
    monkeypatch.setattr(alignment, "EXACT", 100)
    monkeypatch.setattr(alignment, "BLOCK", 100)
    found_F = order(mine, theirs, by="weights")
    assert sorted(found_F.tolist()) == list(range(400))
    close = total(mine, theirs, found_F, "weights")
    assert 0.95 * best < close <= best * (1 + 1e-6)
    monkeypatch.setattr(alignment, "BLOCK", 1)
    assert close > total(mine, theirs, order(mine, theirs, by="weights"), "weights")


def test_long_neurons_do_not_attract_all_others(monkeypatch):
    """Lengths from 1 to 1000, each neuron changed in proportion to its own."""
    monkeypatch.setattr(alignment, "EXACT", 50)
    monkeypatch.setattr(alignment, "BLOCK", 10)
    length_F = torch.logspace(0, 3, 200)
    moved_F = shuffle(200)

    def scaled(expert: Expert) -> Expert:
        return Expert(length_F[:, None] * expert.gate, length_F[:, None] * expert.up, expert.down * length_F)

    copy = permuted(scaled(noisy(wide(200, 32), 0.1)), moved_F)
    assert torch.equal(order(Neurons.of(scaled(wide(200, 32))), Neurons.of(copy), by="weights"), moved_F.argsort())


@pytest.mark.parametrize("rounds", [0, 1, 256])
def test_wide_experts_of_one_likeness_still_get_an_order(rounds, monkeypatch):
    for name, value in (("EXACT", 50), ("BLOCK", 50), ("ROUNDS", rounds)):
        monkeypatch.setattr(alignment, name, value)
    same = combined(lambda t: torch.ones_like(t), wide(130))
    for pair in ((same, wide(130)), (wide(130), same), (combined(torch.zeros_like, same), wide(130))):
        found_F = order(*map(Neurons.of, pair), by="weights")
        assert sorted(found_F.tolist()) == list(range(130))


def test_other_widths_are_refused():
    with pytest.raises(ValueError, match="experts of 24 and 20 neurons have no common order"):
        order(Neurons.of(wide(24)), Neurons.of(wide(20)), by="weights")


def test_activations_of_other_tokens_are_refused():
    pair = (Neurons.of(wide(24), torch.ones(24, samples)) for samples in (50, 49))
    with pytest.raises(ValueError, match=r"\(24, 50\) and \(24, 49\)"):
        order(*pair, by="both")


@pytest.mark.parametrize(
    ("by", "message"), [("weight", "allowed: weights, activations, both"), ("both", "activations")]
)
def test_unknown_or_missing_features_are_refused(by, message):
    with pytest.raises(ValueError, match=message):
        order(Neurons.of(wide(24)), Neurons.of(wide(24)), by=by)
    with pytest.raises(ValueError, match="weights"):
        order(*(Neurons(inner_FS=torch.ones(4, 3)) for _ in range(2)), by="weights")


def test_weights_that_are_no_numbers_are_refused():
    broken = wide(24)
    broken.up[3, 2] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        order(Neurons.of(wide(24)), Neurons.of(broken), by="weights")


GROUPS = ((1, 0, 5), (2,), (3, 4), (6,), (7,))


@pytest.mark.parametrize("by", BY)
def test_members_are_aligned_to_their_representatives_and_singletons_left_alone(by, experts):
    asked: list[int] = []

    def ask(expert: int) -> Expert:
        assert threading.current_thread() is threading.main_thread()
        asked.append(expert)
        return experts[expert]

    def inner(expert: int) -> Tensor:
        return neurons(experts[expert]).inner_FS

    found = align_groups(GROUPS, ask, inner, by)
    assert asked == [1, 0, 5, 3, 4]
    assert list(found) == [0, 5, 4]
    for member, first in ((0, 1), (5, 1), (4, 3)):
        assert torch.equal(found[member], order(neurons(experts[first]), neurons(experts[member]), by=by))
    assert align_groups(((0,), (1,)), ask, inner, by) == {} and len(asked) == 5


def test_the_number_of_workers_changes_nothing():
    layer = [wide(120, seed=seed) for seed in range(12)]
    groups = ((0, 1, 2, 3, 4, 5, 6), (8, 7, 9, 10, 11))
    one, many = (align_groups(groups, layer.__getitem__, workers=workers) for workers in (1, 3))
    assert list(one) == list(many) == [1, 2, 3, 4, 5, 6, 7, 9, 10, 11]
    assert all(torch.equal(one[member], many[member]) for member in one)


def test_a_group_of_other_widths_is_refused_as_a_whole():
    layer = [wide(24), wide(24), wide(20)]
    with pytest.raises(ValueError, match="24 and 20"):
        align_groups(((0, 1, 2),), layer.__getitem__, workers=2)
