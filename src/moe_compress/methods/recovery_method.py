"""What a method that recovers tells the engine: what of a compressed model changes, and towards what.

P predicted tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Generator, Tensor

# Parts of a model that train=, a comma-separated list, may name; `new`: factors, and constants in place of experts;
# `scales`, `codes`: of what is packed; `lora`: low-rank adapters.
TRAINED = ("all", "routers", "experts", "shared", "attention", "dense", "norms", "new", "scales", "codes", "lora")
LORA = "lora"
# Of these parts matrices may have adapters; `lora` alone means the first two.
ADAPTED = ("experts", "attention", "shared", "dense")
RANK, ALPHA = 8, 16.0
# Losses that loss=, a comma-separated list of `term` or `term:weight`, may name.
Term = Literal["logits", "hidden", "router", "experts", "labels"]
TERMS: tuple[Term, ...] = ("logits", "hidden", "router", "experts", "labels")
# Those for which teacher and student are held beside each other, layer by layer.
LAYERED: tuple[Term, ...] = ("hidden", "router", "experts")
# Bits that teacher_bits= may name; 0: the teacher's weights as they are.
TeacherBits = Literal["0", "8", "4"]
# Of logits [P, V] of the student and of the teacher, the loss of each token, [P].
Divergence = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Keeping:
    """What is kept of the teacher's logits, so that it runs once for many students, and the loss towards that.

    said: what tells it from other ways; keep: logits [P, V] -> tensors [P, ...]; divergence: of a student's logits from
    these, [P]; disagreement: of logits that should be those that were kept, [P], 0 if they are.
    """

    said: Mapping[str, Any]
    keep: Callable[[Tensor, Generator], dict[str, Tensor]]
    divergence: Callable[[Tensor, Mapping[str, Tensor]], Tensor]
    disagreement: Callable[[Tensor, Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """Matrices of these parts are held, and what is added to them learns: alpha / rank times B A, of this rank."""

    parts: frozenset[str]
    rank: int
    alpha: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Distillation:
    """The whole model learns to say what the teacher says.

    trains: parts of it; adapters: what others of its matrices are given, where any are; terms: the weight of each loss;
    divergence: what `logits` means; keeping: what is kept of the teacher instead of running it in every step;
    teacher_bits: in which its weights are held, 0 for as they are.
    """

    trains: frozenset[str]
    terms: Mapping[Term, float]
    divergence: Divergence
    keeping: Keeping | None = None
    teacher_bits: int = 0
    adapters: LowRank | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerDistillation:
    """Each layer learns by itself to give what the teacher's layers give in its place.

    trains: parts of it; adapters: what others of its matrices are given, where any are; inputs: what enters it
    meanwhile, the teacher's hidden states or those that the student has.
    """

    trains: frozenset[str]
    inputs: Literal["teacher", "student"]
    adapters: LowRank | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterFit:
    """Each router is fitted, in closed form, to the teacher's routing of the same tokens.

    ridge: how much the router that is there counts, as a share of the mean square of what it multiplies.
    """

    ridge: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebalancing:
    """Selection biases move until experts are used as evenly as the teacher's.

    rounds: at most so many over the text; rate: of the first step, in the units of the scores; tolerance: of the
    coefficient of variation.
    """

    rounds: int
    rate: float
    tolerance: float


Recovery = Distillation | LayerDistillation | RouterFit | Rebalancing


def trained_parts(text: str) -> frozenset[str]:
    """The parts of a comma-separated list. ValueError for one that there is not, or for none."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    strange = next((word for word in words if word not in TRAINED), None)
    if strange is not None or not words:
        raise ValueError(f"train={text}: a comma-separated list of {', '.join(TRAINED)} is needed.")
    return frozenset(words)


def parts_and_adapters(text: str, rank: int, alpha: float) -> tuple[frozenset[str], LowRank | None]:
    """The parts of a comma-separated list that are trained whole, and, where it says `lora`, the adapters of others.

    Matrices of the parts beside `lora` get them, else those of experts and attention; routers, norms and what is new
    beside it are trained whole. ValueError for words that do not go together.
    """
    words, said = trained_parts(text), f"rank={rank} alpha={alpha:g}"
    if LORA not in words:
        if (rank, alpha) != (RANK, ALPHA):
            raise ValueError(f"{said} would do nothing: adapters are asked for by train=lora.")
        return words, None
    strange = next((word for word in ("all", "codes", "scales") if word in words), None)
    if strange is not None:
        raise ValueError(
            f"train={text}: {strange} beside lora means nothing: it goes with {', '.join(ADAPTED)} (whose matrices get "
            "adapters), or routers, norms and new (which are trained whole)."
        )
    if rank < 1 or not 0.0 < alpha < float("inf"):
        raise ValueError(f"{said}: numbers above 0 are needed.")
    parts = words & frozenset(ADAPTED) or frozenset(ADAPTED[:2])
    return words - parts - {LORA}, LowRank(parts=parts, rank=rank, alpha=alpha)


def weighted_terms(text: str) -> dict[Term, float]:
    """`logits,hidden:0.1` -> weights. ValueError for a loss that there is not, twice the same, or a weight of none."""
    found: dict[Term, float] = {}
    for word in text.split(","):
        name, _, weight = word.strip().partition(":")
        term = next((each for each in TERMS if each == name), None)
        if term is None or term in found:
            raise ValueError(f"loss={text}: each of {', '.join(TERMS)} once, with its weight behind a colon.")
        try:
            found[term] = float(weight or 1.0)
        except ValueError:
            found[term] = 0.0
        if not 0.0 < found[term] < float("inf"):
            raise ValueError(f"loss={text}: the weight of {term} is a number above 0.")
    return found
