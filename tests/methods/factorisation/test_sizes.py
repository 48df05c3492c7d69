"""Counts as the formulas have them, and the largest size within a share."""

from __future__ import annotations

import pytest

from moe_compress.methods.factorisation.sizes import (
    Size,
    SizeOptions,
    parameters,
    size_for,
    smallest_ratio,
)
from moe_compress.methods.factorisation.structures import STRUCTURES

MIXTRAL = (8, 4096, 14336)


def test_the_founding_document_s_example() -> None:
    size = size_for("wrapper", *MIXTRAL, rank=64)
    assert parameters("wrapper", size, *MIXTRAL) == 77_594_624
    assert parameters("wrapper", size, *MIXTRAL) / (8 * 4096 * 14336) == pytest.approx(0.16518, abs=1e-5)
    twice = size_for("base_delta", *MIXTRAL, rank=128)
    assert parameters("base_delta", twice, *MIXTRAL) == 77_594_624
    active = 4096 * 14336 + 2 * 2 * 64 * (4096 + 14336)
    assert active / (2 * 4096 * 14336) == pytest.approx(0.5402, abs=1e-4)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.9])
def test_no_larger_size_fits(structure: str, ratio: float) -> None:
    experts, outputs, inputs = 8, 96, 128
    size = size_for(structure, experts, outputs, inputs, ratio=ratio)
    stored = parameters(structure, size, experts, outputs, inputs)
    rank = size.rank or size.ranks[0]
    assert stored <= ratio * experts * outputs * inputs
    step = (stored - parameters(structure, _of(size, 0), experts, outputs, inputs)) / rank
    limit = {"wrapper": 48, "shared_basis": 128}.get(structure, 96)
    assert rank == limit or stored + step > ratio * experts * outputs * inputs


def _of(size: Size, rank: int) -> Size:
    ranks = [rank] * len(size.ranks)
    return Size(ranks=ranks, rank=rank, side=size.side, bases=size.bases, nonzeros=size.nonzeros, pattern=size.pattern)


def test_ranks_are_rounded_to_multiples_from_there_on() -> None:
    ranks = [size_for("svd", 4, 96, 128, ratio=ratio, multiple=16).ranks[0] for ratio in (0.1, 0.3, 0.9)]
    assert ranks == [5, 16, 48]


def test_options() -> None:
    assert size_for("basis_mixture", 8, 16, 24, rank=2).bases == 2
    assert size_for("basis_mixture", 8, 16, 24, rank=2, options=SizeOptions(bases=5)).bases == 5
    pattern = size_for("sparse_low_rank", 8, 16, 24, ratio=0.6, options=SizeOptions(pattern=(2, 8)))
    assert pattern.row_nonzeros(24) == 6 and pattern.ranks[0] == int((0.6 - 0.25) * 16 * 24 / 40)
    free = size_for("sparse_low_rank", 8, 16, 24, ratio=0.6, options=SizeOptions(sparse=0.25))
    assert free.nonzeros == int(0.15 * 24) and free.ranks[0] == int((0.6 * 16 * 24 - 3 * 16) / 40)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_ratio_below_the_floor_is_refused_with_the_floor(structure: str) -> None:
    with pytest.raises(ValueError, match=rf"structure={structure} keeps at least 0\.\d+ of 8 experts") as refused:
        size_for(structure, 8, 96, 128, ratio=0.001)
    floor = float(str(refused.value).split("at least ")[1].split()[0])
    size_for(structure, 8, 96, 128, ratio=floor)
    assert str(refused.value).endswith("): ratio=0.001 is less.")


@pytest.mark.parametrize("sparse", [0.1, 0.5, 0.9])
def test_a_residue_leaves_room_for_a_rank(sparse: float) -> None:
    options = SizeOptions(sparse=sparse)
    floor = smallest_ratio("sparse_low_rank", 8, 96, 128, options)
    for ratio in (floor, 0.05, 0.1, 0.5):
        size = size_for("sparse_low_rank", 8, 96, 128, ratio=ratio, options=options)
        assert min(size.ranks) >= 1 <= size.nonzeros
        assert parameters("sparse_low_rank", size, 8, 96, 128) <= ratio * 8 * 96 * 128 + 1e-3


def test_other_refusals() -> None:
    with pytest.raises(ValueError, match=r"keeps at least 0\.1290 of 8 experts \(its core and rank 1\): ratio=0\.1 is"):
        size_for("base_delta", 8, 512, 512, ratio=0.1)
    for rank in (0, 17):
        with pytest.raises(ValueError, match=rf"rank={rank} is not in 1..16"):
            size_for("svd", 8, 16, 24, rank=rank)
    with pytest.raises(ValueError, match="either ratio or rank"):
        size_for("svd", 8, 16, 24)
    with pytest.raises(ValueError, match=r"bases=9 is not in 1\.\.8"):
        size_for("basis_mixture", 8, 16, 24, rank=2, options=SizeOptions(bases=9))
    with pytest.raises(ValueError, match="pattern=2:5 does not divide 24"):
        size_for("sparse_low_rank", 8, 16, 24, rank=2, options=SizeOptions(pattern=(2, 5)))
    with pytest.raises(ValueError, match=r"sparse=1\.0"):
        size_for("sparse_low_rank", 8, 16, 24, rank=2, options=SizeOptions(sparse=1.0))
