"""Parameters of which a representative part runs by default, and all of them with the slow tests."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
from _pytest.mark import ParameterSet

# Families of which no two are built alike: a plain one; groups, biases, a dense and shared layers; biases, interleaved
# and transposed weights; a block that runs its experts itself; experts without a gate, alone in their layers; layers of
# several kinds; a gated shared expert; a router of its own kind.
DIFFERENT = ("mixtral", "deepseek_v3", "gpt_oss", "llama4_text", "nemotron_h", "jamba", "qwen2_moe", "phimoe")


def slow_unless(fast: Callable[..., bool], *axes: Iterable[Any]) -> list[ParameterSet]:
    """Every combination of the axes' values, slow where `fast` does not say so of the values."""
    return [
        pytest.param(*values, marks=() if fast(*values) else pytest.mark.slow) for values in itertools.product(*axes)
    ]


def slow_families(families: Iterable[str], count: int = len(DIFFERENT)) -> list[ParameterSet]:
    """Families, slow unless among the first `count` of DIFFERENT."""
    return slow_unless(lambda family: family in DIFFERENT[:count], families)


def slow_after(count: int, cases: Sequence[Any]) -> list[ParameterSet]:
    """Cases (tuples, single values, or pytest.param), slow after the first `count`."""
    return [_case(case, () if number < count else (pytest.mark.slow,)) for number, case in enumerate(cases)]


def _case(case: Any, marks: tuple[Any, ...]) -> ParameterSet:
    if isinstance(case, ParameterSet):  # a tuple, too
        return pytest.param(*case.values, marks=(*case.marks, *marks), id=case.id)
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=marks)


def each_once(*axes: Sequence[Any]) -> Callable[..., bool]:
    """Whether a combination is one of the few in which every value of every axis occurs."""
    longest = max(map(len, axes))
    few = {tuple(axis[number % len(axis)] for axis in axes) for number in range(longest)}
    return lambda *values: values in few
