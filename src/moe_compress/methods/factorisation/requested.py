"""What the words of a `factorise` recipe ask of a layer's projections: which of them, in which structure, how large.

E experts, O outputs, I inputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from moe_compress.edits.factors import Form, Part
from moe_compress.methods.factor_method import Shapes
from moe_compress.methods.factorisation.sharing_out import SHARED_OUT
from moe_compress.methods.factorisation.sizes import Size, SizeOptions, mask_share, size_for, smallest_ratio
from moe_compress.methods.pruning.masks import pattern_of
from moe_compress.models.matrices import Matrix

Own = Mapping[str, Any]
PARTS: tuple[Part, ...] = get_args(Part)
# Kinds of matrices that are held in factors.
FACTORED = ("experts", "shared")
# What auto tries: a wrapper is never nearer than the core and low rank that it is stored as.
TRIED = ("svd", "base_delta", "shared_basis", "basis_mixture", "sparse_low_rank")


def projections_of(text: str, there: Sequence[Part]) -> list[Part]:
    """The projections of `projections=`, in the order of a layer. ValueError for one that is not there."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    wrong = next((word for word in words if word != "all" and word not in there), None)
    if wrong is not None or not words:
        named = f"{wrong!r} is no projection of these experts" if wrong else "nothing is named"
        raise ValueError(f"projections={text}: {named}; they have {', '.join(there)} (all for each of them).")
    return [part for part in there if part in words or "all" in words]


def _options(part: Part, bases: int | None, sparse: float, pattern: str | None) -> SizeOptions:
    """What sizes depend on besides a rank; of a shared basis the side of the model's width is shared."""
    return SizeOptions(
        side="out" if part == "down" else "in", bases=bases, sparse=sparse, pattern=pattern_of(pattern or "")
    )


def size_of(structure: str, part: Part, shape: tuple[int, int, int], itemsize: int, own: Own) -> Size:
    """The size of a projection that the recipe's words ask for. ValueError for one that cannot be.

    itemsize: bytes of a number.
    """
    options = _options(part, own["bases"], own["sparse"], own["pattern"])
    words = {key: own[key] for key in ("ratio", "rank", "multiple")}
    return size_for(structure, *shape, **words, options=options, itemsize=itemsize)


def tried(part: Part, shape: tuple[int, int, int], itemsize: int, own: Own) -> dict[str, Size]:
    """The structures that can have a share of a projection's bytes, with the size of each; ValueError if none can.

    Where the loss mixes outputs there can be no residue.
    """
    options = _options(part, own["bases"], own["sparse"], own["pattern"])
    floors: dict[str, float] = {}
    found = {}
    for structure in TRIED:
        if own["objective"] == "two_sided" and structure == "sparse_low_rank":
            continue
        floors[structure] = smallest_ratio(structure, *shape, options) + mask_share(structure, itemsize)
        if floors[structure] <= own["ratio"]:
            found[structure] = size_of(structure, part, shape, itemsize, own)
    if not found:
        size_of(min(floors, key=lambda name: floors[name]), part, shape, itemsize, own)  # says why not
    return found


def forms(shapes: Shapes, itemsize: int, **own: Any) -> dict[Part, Form]:
    """How the projections of a layer will be held: as the recipe says, or (structure=auto, budget=) about as much."""
    found: dict[Part, Form] = {}
    for part in projections_of(own["projections"], list(shapes)):
        structure = own["structure"]
        if structure == "auto" and own["budget"] != "uniform":
            structure, size = "svd", size_of("svd", part, shapes[part], itemsize, own)  # what ranks are shared out for
        elif structure == "auto":
            structure, size = next(iter(tried(part, shapes[part], itemsize, own).items()))
        else:
            size = size_of(structure, part, shapes[part], itemsize, own)
        found[part] = _form(structure, size, shapes[part], own["activation"])
    return found


def _form(structure: str, size: Size, shape: tuple[int, int, int], activation: str) -> Form:
    if structure == "shared_basis":
        return Form(basis=size.rank)
    if structure == "basis_mixture":
        return Form(bases=(size.bases, size.rank), activation=_stored(activation))
    rank = 2 * size.rank if structure == "wrapper" else size.ranks[0]
    return Form(rank=rank, core=structure in ("base_delta", "wrapper"), residue=size.row_nonzeros(shape[2]))


def _stored(activation: str) -> Literal["silu", "tanh"] | None:
    return "silu" if activation == "silu" else "tanh" if activation == "tanh" else None


def linear_rank(outputs: int, inputs: int, **own: Any) -> int:
    """The rank of a linear map beside the experts, which has nothing to share: at the same ratio, or of that rank."""
    words = {key: own[key] for key in ("ratio", "rank", "multiple")}
    return size_for("svd", 1, outputs, inputs, **words).ranks[0]


def check_factorise(layers: Mapping[int, Sequence[Matrix]], **parameters: Any) -> None:
    """Raise ValueError for words that do not fit together, or sizes that these experts cannot have."""
    _require_words(**parameters)
    routed = any(matrix.kind == "experts" for matrices in layers.values() for matrix in matrices)
    for key, others in (("budget", ("uniform",)), ("objective", ("activation", "plain"))):
        if not routed and parameters[key] not in others:
            raise ValueError(
                f"{key}={parameters[key]} is for routed experts alone: where={parameters['where']} names none of them."
            )
    for index, matrices in layers.items():
        if any(matrix.kind not in FACTORED for matrix in matrices):
            raise ValueError(
                f"where={parameters['where']}: factors are made of experts alone (where=experts, shared or both)."
            )
        shapes = {_part(matrix): _shape(matrix) for matrix in matrices if matrix.kind == "experts"}
        try:
            if shapes:
                forms(shapes, matrices[0].weight_BOI.element_size(), **parameters)
            for matrix in matrices:
                if matrix.kind == "shared":
                    linear_rank(*_shape(matrix)[1:], **parameters)
        except ValueError as error:
            raise ValueError(f"layer {index}: {error}") from error


def _require_words(*, structure: str, budget: str, **parameters: Any) -> None:
    """Raise ValueError for words that do not fit together, whatever the model."""
    if parameters["rank"] is None and not 0 < (parameters["ratio"] or 0) < 1:
        raise ValueError(f"ratio={parameters['ratio']}: the share of the experts that is kept is above 0 and below 1.")
    if parameters["rank"] is not None and (structure == "auto" or budget != "uniform"):
        word = "structure=auto compares structures" if structure == "auto" else f"budget={budget} shares out ranks"
        raise ValueError(f"{word} at the same bytes: say ratio= in place of rank=.")
    if budget != "uniform" and structure not in (*SHARED_OUT, "auto"):
        raise ValueError(f"budget={budget} is for structure={', '.join(SHARED_OUT)}, auto, not {structure}.")
    if min(parameters["multiple"], parameters["sweeps"]) < 1:
        raise ValueError(f"multiple={parameters['multiple']} sweeps={parameters['sweeps']}: at least 1 each.")
    _require_steps(**parameters)
    _require_objective(structure, budget=budget, **parameters)


def _require_steps(*, steps: int | None, lr: float | None, sparse: float, **_: Any) -> None:
    """Raise ValueError for numbers that no descent and no residue can have."""
    if steps is not None and steps < 1:
        raise ValueError(f"steps={steps}: at least 1.")
    if lr is not None and not 0 < lr < math.inf:
        raise ValueError(f"lr={lr}: a step size above 0 is needed, such as 0.001.")
    if not 0 < sparse < 1:
        raise ValueError(f"sparse={sparse}: the residue's share of what is stored is above 0 and below 1.")


def _require_objective(structure: str, *, objective: str, **parameters: Any) -> None:
    """Raise ValueError for words that do not fit what factors are to be near to."""
    if objective == "plain" and parameters["budget"] != "uniform" and parameters["weigh"] == "gradient":
        raise ValueError("objective=plain looks at no text, and weigh=gradient does: say weigh=uniform.")
    if objective == "anchored" and parameters["propagate"] == "original":
        raise ValueError(
            "objective=anchored makes up for what earlier layers lost, which propagate=original hides from it: use "
            "propagate=compressed."
        )
    if objective == "anchored" and parameters["grams"] == "pooled":
        raise ValueError("objective=anchored pairs each expert's own inputs: it goes with grams=expert.")
    if objective == "two_sided" and structure == "sparse_low_rank":
        raise ValueError("objective=two_sided mixes outputs, so structure=sparse_low_rank would not stay sparse.")


def _part(matrix: Matrix) -> Part:
    name = matrix.name.rpartition(".")[2]
    return next(part for part in PARTS if part == name)


def _shape(matrix: Matrix) -> tuple[int, int, int]:
    experts, outputs, inputs = matrix.weight_BOI.shape
    return experts, outputs, inputs
