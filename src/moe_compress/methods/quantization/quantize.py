"""Quantization of weights to 2, 3, 4 or 8 bits: by rounding, by GPTQ, or by AWQ, all experts of a layer at once.

`rtn` rounds to the nearest; `gptq` (arXiv 2210.17323) lets the weights behind make up for each rounding; `awq`
(2306.00978) first makes the inputs that matter larger against the others (awq.py), then rounds. Grids are symmetric.
B experts, O outputs, I inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from moe_compress.methods.quantization.awq import awq_scale
from moe_compress.methods.quantization.bit_allocation import bit_cost_by_use, choose
from moe_compress.methods.quantization.gptq import Solved, gptq
from moe_compress.methods.quantization.grid import BITS, Clip, rtn
from moe_compress.methods.quantization.numbers import (
    AsymmetricIntegers,
    Fp4,
    Fp8,
    Integers,
    Numbers,
    nearest,
    nvfp4_divisor,
    nvfp4_full,
)
from moe_compress.methods.registry import Need, weight_method
from moe_compress.methods.weight_method import (
    NARROWEST,
    BitAllocation,
    GridOptions,
    InputRescaling,
    MatrixGroup,
    NewMatrices,
    QuantizedMatrices,
)
from moe_compress.models.matrices import Matrix, kinds_of
from moe_compress.models.modeling.bit_packing import dequantized
from moe_compress.utils.declarations import Registered

Way = Literal["rtn", "gptq", "awq"]
BitsWord = Literal["2", "3", "4", "8", "auto"]
FORMATS = Registered(
    "moe_compress.checkpoints.formats", "storage_format", first=("auto",), unless="written", last_by="fallback"
)
# More than any model's matrices have inputs.
WIDEST = 1 << 20
INTEGERS, NVFP4, MXFP4 = "int", "nvfp4", "mxfp4"
# What storage formats round to, by what they call it; of so many bits where these may differ.
NUMBERS: dict[str, Callable[[int], Numbers]] = {
    INTEGERS: Integers,
    "asymmetric": AsymmetricIntegers,
    "fp8": lambda _: Fp8(),
    "fp8 blocks": lambda _: Fp8(outputs=128),
    NVFP4: lambda _: Fp4(powers=False),
    MXFP4: lambda _: Fp4(powers=True),
}
# Formats in which something of the inputs is a number that text has to tell.
STATIC_INPUTS = ("nvfp4",)
NEEDS: dict[str, Need] = {"rtn": "input_squares", "gptq": "input_grams", "awq": "input_grams"}


def _needs(parameters: Mapping[str, Any]) -> Need:
    router = "router" in kinds_of(parameters["where"], parameters["spare"])
    blind = parameters["method"] == "rtn" and parameters["bits"] != "auto" and not router
    blind = blind and parameters["format"] not in STATIC_INPUTS
    return "nothing" if blind else NEEDS[parameters["method"]]


def check_quantize(
    layers: Mapping[int, Sequence[Matrix]],
    *,
    bits: BitsWord,
    budget: float | None,
    group_size: int,
    damping: float,
    where: str,
    spare: str,
    **_: Any,
) -> None:
    """Raise ValueError for a grid that these matrices cannot have."""
    if group_size < 0 or 0 < group_size < NARROWEST:
        raise ValueError(
            f"group_size={group_size}: the inputs that share a scale are 0 (a whole row) or {NARROWEST} up."
        )
    if group_size > WIDEST:
        raise ValueError(f"group_size={group_size}: no matrix has so many inputs; 0 means a scale for a whole row.")
    if not 0 < damping < math.inf:
        raise ValueError(f"damping={damping}: a share of the mean of the diagonal, above 0, is needed.")
    if bits == "auto" and (budget is None or not BITS[0] <= budget <= BITS[-1]):
        given = "." if budget is None else f", not {budget}."
        raise ValueError(f"bits=auto needs budget=, the mean bits a weight, from {BITS[0]} to {BITS[-1]}{given}")
    if bits == "auto" and kinds_of(where, spare) != ["experts"]:
        raise ValueError(
            f"bits=auto shares out bits among experts: where={where} spare={spare} has to leave just those."
        )


def _grid(parameters: Mapping[str, Any]) -> GridOptions:
    bits = None if parameters["bits"] == "auto" else int(parameters["bits"])
    wanted = {name: parameters[name] for name in ("budget", "group_size", "format")}
    return GridOptions(widths=BITS, bits=bits, **wanted)


def _rescaling(parameters: Mapping[str, Any]) -> InputRescaling | None:
    if parameters["method"] != "awq":
        return None
    return InputRescaling(search=awq_scale, keeps_routing=parameters["scales"] == "pow2")


def _bit_allocation(parameters: Mapping[str, Any]) -> BitAllocation | None:
    if parameters["bits"] != "auto":
        return None
    by, per, budget, clip = (parameters[name] for name in ("by", "per", "budget", "clip"))
    return BitAllocation(
        widths=BITS,
        rounded=lambda weight_BOI, bits, size, stored: dequantized(*rtn(weight_BOI, bits, size, stored, clip)),
        choose=lambda costs, sizes: choose(costs, sizes, per, budget),
        by_use=(lambda share_E: bit_cost_by_use(share_E, by == "rare")) if by in ("used", "rare") else None,
        by_gradient=by == "gradient",
    )


@weight_method(
    group="slimming",
    paper="arXiv 2210.17323 (GPTQ), 2306.00978 (AWQ)",
    needs=_needs,
    check=check_quantize,
    shown_in_names=("method", "bits"),
    goes_with={
        "budget": "bits=auto",
        "by": "bits=auto",
        "per": "bits=auto",
        "act_order": "method=gptq",
        "damping": "method=gptq",
        "experts_at_once": "method=gptq",
        "scales": "method=awq",
        "clip=signed": "format!=awq,asymmetric,fp8,fp8-dynamic,nvfp4,nvfp4a16,mxfp4,mxfp4a16",
    },
    selection_after="group_size",
    unseen=("rtn", "pooled", "error"),
    min_tokens=32,
    quantizes=True,
    grid=_grid,
    rescales_inputs=_rescaling,
    allocates_bits=_bit_allocation,
)
def quantize(  # noqa: PLR0913 - these are the recipe's parameters
    group: MatrixGroup,
    *,
    method: Way = "gptq",
    bits: BitsWord = "4",
    budget: float | None = None,
    by: Literal["error", "gradient", "used", "rare"] = "error",
    per: Literal["matrix", "expert", "layer"] = "matrix",
    group_size: int = 128,
    format: Annotated[str, FORMATS] = "auto",
    clip: Clip = "mse",
    act_order: bool = False,
    damping: float = 0.01,
    scales: Literal["pow2", "free"] = "pow2",
) -> NewMatrices:
    """Store weights in few bits: a code for each, and a scale for every group of inputs."""
    if not group.group_size:
        return NewMatrices(group.weights, {})
    widths = group.bits or [[int(bits)] * len(group.names) for _ in group.weights]
    how = _How(method, clip, act_order, damping, nvfp4_divisor(group.weights) if group.numbers == NVFP4 else None)
    if method == "gptq" and len({width for each in widths for width in each}) == 1:
        solved, damped = how.gptq(group, group.weights, widths[0][0])
        found = [how.stored(group, *each, widths[0]) for each in solved]
    else:
        parts = [how.by_width(group, weight_BOI, each) for weight_BOI, each in zip(group.weights, widths, strict=True)]
        found, damped = [part[0] for part in parts], [b for part in parts for b in part[1]]
    return NewMatrices([each.dense() for each in found], {"damped": sorted(set(damped))}, found)


@dataclass(frozen=True, slots=True)
class _How:
    """How weights are rounded."""

    method: Way
    clip: Clip
    act_order: bool
    damping: float
    divisor_B: Tensor | None = None

    def gptq(self, group: MatrixGroup, weights: Sequence[Tensor], bits: int) -> tuple[list[Solved], list[int]]:
        """All matrices of the group, which share one factorisation."""
        assert group.moment is not None
        return gptq(
            weights, group.moment, NUMBERS[group.numbers](bits), group.group_size, group.stored, group.names,
            clip=self.clip, act_order=self.act_order, damping=self.damping, divisor_B=self.divisor_B,
        )  # fmt: skip

    def nearest(self, group: MatrixGroup, weight_BOI: Tensor, bits: int, weighs_BI: Tensor | None) -> Solved:
        """Every weight of one stack rounded alone."""
        if group.numbers == INTEGERS and self.clip != "signed":
            codes, scale = rtn(weight_BOI, bits, group.group_size, group.stored, self.clip, weighs_BI)
            return codes, scale, None
        numbers = NUMBERS[group.numbers](bits)
        return nearest(numbers, weight_BOI, group.group_size, group.stored, self.clip, weighs_BI, self.divisor_B)

    def stored(
        self, group: MatrixGroup, codes: Tensor, scale: Tensor, zero: Tensor | None, widths: list[int]
    ) -> QuantizedMatrices:
        """Codes and scales as they will lie in a file; powers of two are held in fp32."""
        if self.divisor_B is not None:
            divided = (scale * self.divisor_B[:, None, None]).to(torch.float8_e4m3fn)
            inputs_B = None if group.reach_B is None else nvfp4_full(group.reach_B)
            return QuantizedMatrices(codes, divided, widths, divisor=self.divisor_B, input_divisor=inputs_B)
        scale = scale if group.numbers == MXFP4 else scale.to(group.stored)
        return QuantizedMatrices(codes, scale, widths, None if zero is None else zero.to(torch.int8))

    def by_width(
        self, group: MatrixGroup, weight_BOI: Tensor, widths: Sequence[int]
    ) -> tuple[QuantizedMatrices, list[int]]:
        """One matrix of every expert, experts of one width at a time; and for whom the damping was raised."""
        raised: list[int] = []
        parts: list[tuple[list[int], Solved]] = []
        for bits in sorted(set(widths)):
            mine = [b for b, width in enumerate(widths) if width == bits]
            part = replace(
                group, names=[group.names[b] for b in mine], moment=None if group.moment is None else group.moment[mine]
            )
            if self.method == "gptq":
                (solved,), damped = self.gptq(part, [weight_BOI[mine]], bits)
                raised += [mine[b] for b in damped]
            else:
                weighs = part.moment if self.method == "awq" else None
                diagonal = weighs if weighs is None else weighs.diagonal(dim1=1, dim2=2)
                solved = self.nearest(part, weight_BOI[mine], bits, diagonal)
            parts.append((mine, solved))
        order = torch.tensor([b for mine, _ in parts for b in mine], device=weight_BOI.device).argsort()
        codes, scale, zero = (
            None if any(each is None for each in column) else torch.cat(column)[order]
            for column in zip(*(solved for _, solved in parts), strict=True)
        )
        assert codes is not None and scale is not None
        return self.stored(group, codes, scale, zero, list(widths)), raised
