"""Experts held in factors, and how a token meets what its experts share: once.

A matrix of an expert is W_e = core + left_e right_e + residue_e, or left_e basis (of down projections: basis right_e),
or left_e act(sum_n mix_en bases_n). Core, basis and bases belong to all experts of a layer. What the gate and up
projections share multiplies a token before it is sent anywhere; what the down projections share multiplies the sum of
what a token's experts leave for it. Shipped inside edited checkpoints, so it needs torch alone. T tokens, R rows,
E experts, O outputs, I inputs, K inner width of factors, N bases, S nonzeros of a row, X width of what is shared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import linear

from .bit_packing import parts_of_bytes
from .unfused_experts import CHILDREN, ExpertMatrix, inner_rows

# What all experts of a projection have in common, on the experts module, by the names of their matrices.
SHARED = "shared_parts"
CORE, BASIS, BASES = "core", "basis", "bases"
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": functional.silu, "tanh": torch.tanh}
ENTERED = (CHILDREN["gate"], CHILDREN["up"])


class SparseMatrix(nn.Module):
    """A matrix [O, I] with S nonzeros in every row: their values [O, S], and a bit for every weight [O, I / 8]."""

    def __init__(self, value_OS: Tensor, mask_OB: Tensor, inputs: int) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, value_OS.shape[0]
        self.values = nn.Parameter(value_OS, requires_grad=False)
        self.mask: Tensor
        self.register_buffer("mask", mask_OB)

    @classmethod
    def empty(cls, like_OI: Tensor, each: int) -> SparseMatrix:
        """Room for a matrix of this shape with so many nonzeros a row."""
        outputs, inputs = like_OI.shape
        mask_OB = torch.zeros(outputs, math.ceil(inputs / 8), dtype=torch.uint8, device=like_OI.device)
        return cls(like_OI.new_empty(outputs, each), mask_OB, inputs)

    def fill(self, dense_OI: Tensor) -> None:
        """Take the nonzeros of a matrix that has no more of them in any row; rows with fewer keep zeros beside them."""
        each = self.values.shape[1]
        if int((dense_OI != 0).sum(1).max()) > each:
            raise ValueError(f"a residue has {each} nonzeros in a row, and not more.")
        order_OI = (dense_OI != 0).to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        place_OS = order_OI[:, :each].sort(1).values
        self.values = nn.Parameter(dense_OI.gather(1, place_OS).to(self.values), requires_grad=False)
        kept_OI = torch.zeros_like(dense_OI, dtype=torch.uint8).scatter_(1, place_OS, 1)
        bit_OB8 = functional.pad(kept_OI, (0, -self.in_features % 8)).unflatten(-1, (-1, 8))
        place_8 = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=bit_OB8.device)
        self.mask = (bit_OB8 * place_8).sum(-1, dtype=torch.uint8).to(self.mask.device)

    def whole(self) -> Tensor:
        """The matrix with its zeros [O, I]."""
        kept_OI = parts_of_bytes(self.mask, 1)[:, : self.in_features].bool()
        zero_OI = torch.zeros(kept_OI.shape, dtype=self.values.dtype, device=self.values.device)
        return zero_OI.masked_scatter(kept_OI, self.values)

    def dense(self) -> Tensor:
        """The matrix as plain numbers [O, I]."""
        return self.whole().detach()

    def forward(self, x_RI: Tensor) -> Tensor:
        """The product with rows of inputs."""
        return linear(x_RI, self.whole())


class Mixture(nn.Module):
    """How one expert mixes N bases, each [K, I] and all of them one matrix [N * K, I]."""

    def __init__(self, weight_N: Tensor, activation: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_N, requires_grad=False)
        self.activation = activation

    def mixed(self, base_XI: Tensor) -> Tensor:
        """The matrix that the expert makes of the bases [K, I]."""
        mixed_KI = (base_XI.unflatten(0, (len(self.weight), -1)) * self.weight[:, None, None].to(base_XI)).sum(0)
        return ACTIVATIONS[self.activation](mixed_KI) if self.activation else mixed_KI

    def of_products(self, product_RX: Tensor) -> Tensor:
        """What rows give that all bases have multiplied already [R, K]."""
        return (product_RX.unflatten(-1, (len(self.weight), -1)) * self.weight.unsqueeze(-1)).sum(-2)

    def forward(self, x_RI: Tensor, base_XI: Tensor) -> Tensor:
        """The product of rows with the mixture [R, K]."""
        return linear(x_RI, self.mixed(base_XI))


class FactoredMatrix(nn.Module):
    """One matrix [O, I] of one expert in factors, with its bias; what it shares with others their module holds."""

    left: nn.Module | None
    right: nn.Module | None
    residue: SparseMatrix | None
    mix: Mixture | None
    shared: nn.ModuleDict

    def __init__(self, shape: tuple[int, int], shared: nn.ModuleDict, bias_O: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        for name in ("left", "right", "residue", "mix"):
            self.register_module(name, None)
        self.bias = None if bias_O is None else nn.Parameter(bias_O, requires_grad=False)
        self.__dict__["shared"] = shared  # no child: it would be stored with every expert

    @property
    def shares(self) -> str:
        """What it has in common with other experts; empty for nothing."""
        return next(iter(self.shared), "")

    def enters(self, tokens: int, top_k: int) -> bool:
        """Whether what is shared multiplies tokens before they are sent to experts.

        Mixed bases do where that takes no more multiply-adds; those of an activation are mixed before they multiply.
        """
        if self.mix is not None:
            return not self.mix.activation and (tokens == 1 or len(self.mix.weight) <= top_k)
        return self.shares == CORE or (self.shares == BASIS and self.left is not None)

    @property
    def leaves(self) -> bool:
        """Whether what is shared can multiply the sum of what experts leave for it."""
        return self.shares == CORE or (self.shares == BASIS and self.left is None)

    def parts(self, x_RI: Tensor, given_RX: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        """What the expert itself makes of its rows [R, O], and what is left for the shared part to multiply [R, X].

        given_RX: what the shared part made of the rows already; then nothing is left.
        """
        found, left_over = [], None
        if self.shares == CORE:
            found, left_over = ([], x_RI) if given_RX is None else ([given_RX], None)
        code_RK = self._code(x_RI, None if self.shares == CORE else given_RX)
        if self.left is None:
            left_over = code_RK
        else:
            found.append(self.left(code_RK))
        found += [] if self.residue is None else [self.residue(x_RI)]
        found += [] if self.bias is None else [self.bias.expand(len(x_RI), -1)]
        return (sum(found[1:], found[0]) if found else None), left_over

    def forward(self, x_RI: Tensor) -> Tensor:
        """The product with rows of inputs, for each row by itself."""
        own_RO, left_over_RX = self.parts(x_RI)
        if left_over_RX is None:
            assert own_RO is not None
            return own_RO
        shared_RO: Tensor = self.shared[self.shares](left_over_RX)
        return shared_RO if own_RO is None else own_RO + shared_RO

    def _code(self, x_RI: Tensor, given_RX: Tensor | None) -> Tensor:
        """What the left factor is given, or a shared output basis."""
        if self.right is not None:
            return self.right(x_RI)
        if self.shares == BASIS:
            return self.shared[BASIS](x_RI) if given_RX is None else given_RX
        assert self.mix is not None
        return self.mix(x_RI, _numbers(self.shared[BASES])) if given_RX is None else self.mix.of_products(given_RX)

    def dense(self) -> Tensor:
        """The matrix as plain numbers [O, I]."""
        factors = [each for each in (self.left, self.right) if each is not None]
        dtype = _numbers(factors[0]).dtype
        wide = torch.promote_types(dtype, torch.float32)
        held = [_numbers(each).detach().to(wide) for each in factors]
        shared = _numbers(self.shared[self.shares]).detach().to(wide) if self.shares else None
        if self.mix is not None and shared is not None:
            shared = self.mix.mixed(shared)
        if len(held) == 2:
            whole_OI = held[0] @ held[1] if shared is None else shared + held[0] @ held[1]
        else:
            assert shared is not None
            whole_OI = shared @ held[0] if self.left is None else held[0] @ shared
        return (whole_OI if self.residue is None else whole_OI + self.residue.dense().to(wide)).to(dtype).detach()


def _numbers(matrix: Any) -> Tensor:
    """A matrix as plain numbers, which gradients pass where it is held as such."""
    return matrix.weight if isinstance(matrix, ExpertMatrix | nn.Linear) else matrix.dense()


class FactoredLinear(nn.Module):
    """A linear map as two, left(right(x)), the bias with the left one: what sees linear maps sees both."""

    def __init__(self, left: nn.Linear, right: nn.Linear) -> None:
        super().__init__()
        self.left, self.right = left, right

    @classmethod
    def empty(cls, like: nn.Linear, rank: int) -> FactoredLinear:
        """Room for a map of these inputs and outputs; its bias stays."""
        left, right = (nn.Linear(1, 1, bias=False, device="meta") for _ in range(2))
        left.in_features, left.out_features, left.bias = rank, like.out_features, like.bias
        right.in_features, right.out_features = like.in_features, rank
        for each in (left, right):
            room_OI = like.weight.new_empty(each.out_features, each.in_features)
            each.weight = nn.Parameter(room_OI, requires_grad=False)
        return cls(left, right)

    def dense(self) -> Tensor:
        """The matrix as plain numbers [O, I]."""
        left, right = (_numbers(each).detach() for each in (self.left, self.right))
        wide = torch.promote_types(left.dtype, torch.float32)
        return (left.to(wide) @ right.to(wide)).to(left.dtype)

    def forward(self, x_I: Tensor) -> Tensor:
        """The product with inputs [..., I]."""
        found: Tensor = self.left(self.right(x_I))
        return found


# --- making room --------------------------------------------------------------------------------------------


def shared_room(like_OI: Tensor, form: Mapping[str, Any], down: bool) -> nn.ModuleDict:
    """Room for what all experts of a projection have in common; none where that is nothing."""
    outputs, inputs = like_OI.shape
    shapes: dict[str, tuple[int, int]] = {}
    if form.get(CORE):
        shapes[CORE] = (outputs, inputs)
    if width := form.get(BASIS):
        shapes[BASIS] = (outputs, width) if _shares_outputs(form, down) else (width, inputs)
    if form.get(BASES):
        shapes[BASES] = (math.prod(form[BASES]), inputs)
    return nn.ModuleDict({name: ExpertMatrix(like_OI.new_empty(shape), None) for name, shape in shapes.items()})


def factored_room(
    like_OI: Tensor, form: Mapping[str, Any], down: bool, number: int, shared: nn.ModuleDict, bias_O: Tensor | None
) -> FactoredMatrix:
    """Room for the factors of expert `number`."""
    outputs, inputs = like_OI.shape
    made = FactoredMatrix((outputs, inputs), shared, bias_O)
    ranks = form.get("rank", 0)
    rank = ranks if isinstance(ranks, int) else ranks[number]
    count, width = form.get(BASES) or (0, form.get(BASIS, 0))
    if rank or count or not _shares_outputs(form, down):
        made.left = ExpertMatrix(like_OI.new_empty(outputs, rank or width), None)
    if rank or made.left is None:
        made.right = ExpertMatrix(like_OI.new_empty(rank or width, inputs), None)
    if count:
        made.mix = Mixture(like_OI.new_empty(count), form.get("activation") or "")
    if form.get("residue"):
        made.residue = SparseMatrix.empty(like_OI, form["residue"])
    return made


def _shares_outputs(form: Mapping[str, Any], down: bool) -> bool:
    """Whether a basis is that of the outputs: unless it is said, the side of the model's width is shared."""
    return bool(down if form.get("side") is None else form["side"] == "out")


def is_factored(fused: nn.Module) -> bool:
    """Whether an experts module holds matrices in factors."""
    return SHARED in fused._modules


# --- running them -------------------------------------------------------------------------------------------


def shares_parts(fused: nn.Module) -> bool:
    """Whether experts have parts in common that a token need not meet in every one of them."""
    return is_factored(fused) and len(fused._modules[SHARED] or ()) > 0  # type: ignore[arg-type]


def entered(fused: Any, sent_TD: Tensor, top_k: int) -> dict[str, Tensor]:
    """What the shared parts of gate and up projections make of tokens [T, X], by the names of these matrices."""
    found = {}
    for name in ENTERED:
        if name in fused.shared_parts and fused.separate[0][name].enters(len(sent_TD), top_k):
            first = fused.separate[0][name]
            found[name] = first.shared[first.shares](sent_TD)
    return found


def contributions(
    fused: Any, input_RD: Tensor, counts: Sequence[int], given: Mapping[str, Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Of rows sorted by expert: what each adds by itself [R, D], and leaves for the down projections' shared part.

    given: what the shared parts of gate and up projections made of the rows. Either list may be empty, else the parts
    are those of all experts with rows.
    """
    split = {name: rows.split(list(counts)) for name, rows in given.items()}
    added, left_over = [], []
    for number, x_RD in enumerate(input_RD.split(list(counts))):
        if len(x_RD):
            known = {name: parts[number] for name, parts in split.items()}
            own_RD, rest_RX = _contribution(fused, fused.separate[number], x_RD, known)
            added += [] if own_RD is None else [own_RD]
            left_over += [] if rest_RX is None else [rest_RX]
    return added, left_over


def _contribution(
    fused: Any, expert: Any, x_RD: Tensor, given: Mapping[str, Tensor]
) -> tuple[Tensor | None, Tensor | None]:
    inner_RF, down = inner_rows(fused, expert, x_RD, given), expert[CHILDREN["down"]]
    if getattr(fused, "has_post_expert_norm", False):  # it is no linear map: nothing can be summed up before it
        return fused.post_expert_norm(down(inner_RF)), None
    return down.parts(inner_RF) if isinstance(down, FactoredMatrix) else (down(inner_RF), None)


def run_shared(
    fused: Any,
    input_RD: Tensor,
    counts: Sequence[int],
    given: Mapping[str, Tensor],
    add_up: Callable[[Tensor], Tensor],
) -> Tensor | None:
    """What the experts add to their tokens [T, D], the shared part of the down projections met once; None for no rows.

    add_up: rows sorted by expert, weighted and summed up by token.
    """
    added, left_over = contributions(fused, input_RD, counts, given)
    total_TD = add_up(torch.cat(added)) if added else None
    if not left_over:
        return total_TD
    shared_TD = _down(fused, add_up(torch.cat(left_over)).to(input_RD.dtype))
    return shared_TD if total_TD is None else total_TD + shared_TD


def run_shared_by_one_token(fused: Any, sent_1D: Tensor, chosen: Sequence[int], weight_K: Tensor) -> Tensor:
    """The same for one token, without putting rows in order."""
    given = entered(fused, sent_1D, len(chosen))
    added, left_over = [torch.zeros_like(sent_1D)], []
    for k, number in enumerate(chosen):
        if number < len(fused.separate):
            own_1D, rest_1X = _contribution(fused, fused.separate[number], sent_1D, given)
            added += [] if own_1D is None else [own_1D * weight_K[k]]
            left_over += [] if rest_1X is None else [rest_1X * weight_K[k]]
    total_1D = torch.stack(added).sum(0)
    if left_over:
        total_1D = total_1D + _down(fused, torch.stack(left_over).sum(0).to(sent_1D.dtype))
    return total_1D.to(sent_1D.dtype)


def _down(fused: Any, sum_TX: Tensor) -> Tensor:
    (shared,) = fused.shared_parts[CHILDREN["down"]].values()
    return shared(sum_TX)
