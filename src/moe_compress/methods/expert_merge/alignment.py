"""Which neuron of one expert is which neuron of another. F neurons of an expert, D model width, S sampled tokens.

An expert computes the same whatever the order of its neurons, so a weighted mean of two experts makes sense only once
their neurons stand in the same order (weight matching of M-SMoE, arXiv 2310.01334, extended to gated experts;
activations and both as in REAM, arXiv 2604.04356).
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_compress.models.moe import Expert, MoEView, inner_width

By = Literal["weights", "activations", "both"]
Array = NDArray[np.floating]
Order = NDArray[np.int64]

# Widest experts whose neurons are matched exactly: time grows with F^3.
EXACT = 4096
BLOCK = 2048
# A round halves what is left, or matches few where some neurons are much longer than the others.
ROUNDS = 256


@dataclass(frozen=True, slots=True)
class Neurons:
    """What is known of one expert's neurons.

    weights: matrices [F, n] whose row i belongs to neuron i: gate rows and up rows (each with its bias), down columns;
    inner_FS: each neuron's activation (what enters the down projection) on the same S tokens for every expert.
    """

    weights: tuple[Tensor, ...] = ()
    inner_FS: Tensor | None = None

    def __post_init__(self) -> None:
        known = [*self.weights, *([] if self.inner_FS is None else [self.inner_FS])]
        assert len({len(part) for part in known}) == 1, "one row a neuron"

    @classmethod
    def of(cls, expert: Expert, inner_FS: Tensor | None = None) -> Neurons:
        """The neurons of an expert, gated or not."""
        gate = () if expert.gate is None else (_with_bias(expert.gate, expert.gate_bias),)
        return cls((*gate, _with_bias(expert.up, expert.up_bias), expert.down.detach().T), inner_FS)

    @property
    def width(self) -> int:
        """F."""
        return len(self.weights[0] if self.inner_FS is None else self.inner_FS)

    def parts(self, by: By) -> list[Tensor]:
        """Matrices [F, n], scaled so that the inner products of two experts' rows add up to their similarity.

        Each part has length 1 as a whole; gate, up and down count equally, weights count as much as activations.
        """
        if by not in get_args(By):
            raise ValueError(f"by={by}: allowed: {', '.join(get_args(By))}.")
        missing = "activations" if self.inner_FS is None else "weights"
        if (by != "weights" and self.inner_FS is None) or (by != "activations" and not self.weights):
            raise ValueError(f"by={by} needs the neurons' {missing}, which were not given.")
        kinds = [self.weights] if by != "activations" else []
        if by != "weights" and self.inner_FS is not None:
            kinds.append((self.inner_FS,))
        return [_unit(part) * (len(kind) * len(kinds)) ** -0.5 for kind in kinds for part in kind]


def order(reference: Neurons, other: Neurons, *, by: By) -> Tensor:
    """The permutation p, int64 [F], that puts `other` in the reference's order: p[i] matches the reference's neuron i.

    It maximises the sum of similarities, exactly (Hungarian method) up to F = EXACT; above, see `_nearly_best`. If
    `other` is the reference with its neurons permuted, bit by bit, p undoes just that, however much neurons resemble
    each other.
    """
    return torch.from_numpy(_prepared(reference, other, by)())


def align_groups(
    groups: Sequence[Sequence[int]],
    experts: Callable[[int], Expert],
    inner: Callable[[int], Tensor] | None = None,
    by: By = "weights",
    workers: int = 1,
) -> dict[int, Tensor]:
    """The order, int64 [F], of every member of every group relative to the group's first; groups of one are left out.

    experts, inner: expert id -> its matrices, its activations [F, S]; asked once per expert, from this thread.
    workers: threads that match at the same time (scipy's assignment lets go of the interpreter; nothing is copied, and
    no process has to start by importing its caller's script again). Their number does not change the result.
    """
    found: dict[int, Tensor] = {}
    waiting: deque[tuple[int, Future[Order]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for member, match in _pairs(groups, experts, inner, by):
            waiting.append((member, pool.submit(match)))
            if len(waiting) > workers:
                done, result = waiting.popleft()
                found[done] = torch.from_numpy(result.result())
        found |= {done: torch.from_numpy(result.result()) for done, result in waiting}
    return found


def aligned_order(
    groups: Sequence[Sequence[int]], view: MoEView, inner: Callable[[int], Tensor] | None = None, by: By = "weights"
) -> Tensor:
    """Neurons of every expert of a block in the order of its group's first member, int32 [E, F]."""
    order_EF = torch.arange(inner_width(view)).repeat(view.num_experts, 1)
    for expert, order_F in align_groups(groups, view.expert, inner, by, workers=torch.get_num_threads()).items():
        order_EF[expert] = order_F
    return order_EF.int()


def permuted(expert: Expert, order_F: Tensor) -> Expert:
    """The same function with its neurons in another order: neuron order_F[i] comes to place i."""

    def rows(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[order_F]

    return Expert(
        rows(expert.gate),
        expert.up[order_F],
        expert.down[:, order_F],
        rows(expert.gate_bias),
        rows(expert.up_bias),
        expert.down_bias,
    )


def _with_bias(rows_FD: Tensor, bias_F: Tensor | None) -> Tensor:
    rows_FD = rows_FD.detach()
    return rows_FD if bias_F is None else torch.cat([rows_FD, bias_F.detach()[:, None]], dim=1)


def _unit(part: Tensor) -> Tensor:
    """Scaled to length 1 as a whole; zeros stay zeros."""
    part = part.detach().float()
    return part / torch.linalg.vector_norm(part, dtype=torch.float64).float().clamp(min=torch.finfo(torch.float32).tiny)


def _pairs(
    groups: Sequence[Sequence[int]],
    experts: Callable[[int], Expert],
    inner: Callable[[int], Tensor] | None,
    by: By,
) -> Iterator[tuple[int, Callable[[], Order]]]:
    def neurons(expert: int) -> Neurons:
        return Neurons.of(experts(expert), None if inner is None else inner(expert))

    for first, *others in groups:
        if others:
            reference = neurons(first)
            yield from ((member, _prepared(reference, neurons(member), by)) for member in others)


def _prepared(reference: Neurons, other: Neurons, by: By) -> Callable[[], Order]:
    """The matching, with all that needs the experts done: what is left only needs the [F, F] similarities."""
    if reference.width != other.width:
        raise ValueError(
            f"experts of {reference.width} and {other.width} neurons have no common order: merge experts of one width."
        )
    pairs = list(zip(reference.parts(by), other.parts(by), strict=True))
    unlike = [(tuple(a.shape), tuple(b.shape)) for a, b in pairs if a.shape != b.shape]
    if unlike:
        raise ValueError(f"neurons described by {unlike[0][0]} and {unlike[0][1]} numbers cannot be compared.")
    copied = _copied(reference, other)
    if copied is not None:
        return lambda: copied
    similarity_FF = sum((a_FN @ b_FN.T).cpu() for a_FN, b_FN in pairs)
    assert isinstance(similarity_FF, Tensor)
    if not bool(similarity_FF.isfinite().all()):
        raise ValueError(f"the neurons cannot be matched by={by}: weights or activations are not finite.")
    table_FF = similarity_FF.numpy()
    return lambda: _best(table_FF) if len(table_FF) <= EXACT else _nearly_best(table_FF)


def _best(similarity_FF: Array) -> Order:
    from scipy.optimize import linear_sum_assignment  # here: to plan needs none of it, and should not wait for it

    chosen: Order = linear_sum_assignment(similarity_FF, maximize=True)[1]
    return chosen


def _nearly_best(similarity_FF: Array) -> Order:
    """Neurons that are each other's best first, then the Hungarian method inside blocks of those pairs, in two cuts.

    Copies are found by the first step: no product of two neurons exceeds both their squares, so the largest product
    left is always that of a neuron with its copy. No block can lose by the second.
    """
    order_F = _mutual(similarity_FF)
    width = len(order_F)
    cuts = -(-width // BLOCK)
    blocks = [np.arange(width)[k::cuts] for k in range(cuts)] + np.array_split(np.arange(width), cuts)
    for rows in blocks:
        columns = order_F[rows]
        order_F[rows] = columns[_best(similarity_FF[np.ix_(rows, columns)])]
    return order_F


def _mutual(similarity_FF: Array) -> Order:
    """Match those that are each other's best, again and again among the ones left; the rest as they stand."""
    order_F = np.full(len(similarity_FF), -1, dtype=np.int64)
    rows = columns = np.arange(len(similarity_FF))
    for _ in range(ROUNDS):
        if not len(rows):
            break
        best = similarity_FF.argmax(1)
        mutual = similarity_FF.argmax(0)[best] == np.arange(len(rows))
        order_F[rows[mutual]] = columns[best[mutual]]
        free = np.ones(len(columns), dtype=bool)
        free[best[mutual]] = False
        similarity_FF = similarity_FF[np.ix_(~mutual, free)]
        rows, columns = rows[~mutual], columns[free]
    order_F[rows] = columns
    return order_F


def _copied(reference: Neurons, other: Neurons) -> Order | None:
    """The order if `other` holds the reference's very neurons, bit by bit; else None."""
    if not reference.weights or any(
        not torch.equal(a[:, 0].sort().values, b[:, 0].sort().values)
        for a, b in zip(reference.weights, other.weights, strict=True)
    ):
        return None
    places: dict[bytes, deque[int]] = defaultdict(deque)
    for place, print_ in enumerate(_prints(other)):
        places[print_].append(place)
    found = [places[print_].popleft() if places[print_] else -1 for print_ in _prints(reference)]
    return None if -1 in found else np.array(found, dtype=np.int64)


def _prints(neurons: Neurons) -> Iterator[bytes]:
    """A fingerprint of every neuron's weights."""
    parts = [part.contiguous().cpu().view(torch.uint8).numpy() for part in neurons.weights]
    for row in range(neurons.width):
        digest = blake2b(digest_size=16)
        for part in parts:
            digest.update(part[row])
        yield digest.digest()
