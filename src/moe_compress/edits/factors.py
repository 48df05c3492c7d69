"""In which factors the experts' matrices of a projection are held: what an edit says of them, and what may be said.

W_e = core + left_e right_e + residue_e, or left_e basis (of down projections: basis right_e), or
left_e act(sum_n mix_en bases_n). O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict

from moe_compress.models.moe import MoEView

Part = Literal["gate", "up", "down"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """The factors of one projection, of which there is one kind: a rank, a basis or bases.

    rank: of left [O, rank] and right [rank, I] of every expert, one number where all have the same; core: whether a
    matrix of all experts is added; residue: nonzeros in every row of a sparse matrix that is added; basis: width of
    what experts share on one side, `in` or `out` (None: that of the model's width); bases: how many they mix, and the
    width of each; activation: of the mixture.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")
    rank: int | tuple[int, ...] = 0
    core: bool = False
    residue: int = 0
    basis: int = 0
    side: Literal["in", "out"] | None = None
    bases: tuple[int, int] | None = None
    activation: Literal["silu", "tanh"] | None = None

    def to_json(self) -> dict[str, Any]:
        """What differs from nothing."""
        given = {
            each.name: getattr(self, each.name) for each in fields(self) if getattr(self, each.name) != each.default
        }
        return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}

    @property
    def ranks(self) -> tuple[int, ...]:
        """Every rank that it names."""
        return self.rank if isinstance(self.rank, tuple) else (self.rank,)


def require_forms(view: MoEView, layer: int, forms: Mapping[Part, Form]) -> None:
    """Raise ValueError for factors that the experts of this layer cannot be held in."""
    shapes = {part: (stack_EOI.shape[1], stack_EOI.shape[2]) for part, stack_EOI in view.stacks().items()}
    if not forms:
        raise ValueError(f"layer {layer}: nothing is said of how its experts are held in factors.")
    for part, form in forms.items():
        if part not in shapes:
            raise ValueError(f"layer {layer}: its experts have no {part} projection; they have {', '.join(shapes)}.")
        fault = _fault(form, part, *shapes[part], view.num_experts)
        if fault:
            raise ValueError(f"layer {layer}: its {part} projections cannot be held so: {fault}.")


def _fault(form: Form, part: Part, outputs: int, inputs: int, experts: int) -> str:
    """What is wrong with the factors of a projection's matrices of this shape; empty for nothing."""
    kinds = [name for name, given in (("rank", form.rank), ("basis", form.basis), ("bases", form.bases)) if given]
    if len(kinds) != 1:
        return f"factors have a rank, a basis or bases, not {' and '.join(kinds) or 'none of them'}"
    if kinds != ["rank"] and (form.core or form.residue):
        return f"{'a core' if form.core else 'a residue'} is added to a product that has a rank"
    if form.side and not form.basis:
        return "a side is that of a basis"
    if form.activation and not form.bases:
        return "an activation is that of mixed bases"
    if isinstance(form.rank, tuple) and len(form.rank) != experts:
        return f"{len(form.rank)} ranks are given to {experts} experts"
    most = min(outputs, inputs)
    if form.basis:  # together, experts may span more than one of them does
        most = outputs if (form.side or ("out" if part == "down" else "in")) == "out" else inputs
    widths = {"rank": form.ranks, "basis": (form.basis,), "bases": (form.bases or ())[1:]}[kinds[0]]
    wrong = next((width for width in widths if not 1 <= width <= most), None)
    if wrong is not None:
        return f"matrices of {outputs} x {inputs} take a width from 1 to {most}, not {wrong}"
    if form.bases and not 1 <= form.bases[0] <= experts:
        return f"{experts} experts mix 1 to {experts} bases, not {form.bases[0]}"
    if not 0 <= form.residue <= inputs:
        return f"a row of {inputs} numbers has no {form.residue} nonzeros"
    return ""
