"""Factorisation: the experts' matrices of a layer as factors that store less and, where experts share some, run less.

Every structure is solved in closed form, or by alternating closed forms, in the metric of what the experts multiply:
sum over experts of tr((W - W') H (W - W')'), H the sum of g^2 x x' over the tokens routed to an expert (g its gate).
docs/methods/factorise.md has the formulas and the papers. E experts, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from moe_compress.edits.factors import Part
from moe_compress.methods.factor_method import FactoredLayer, Factoring, LayerExperts, Shapes, Spectra
from moe_compress.methods.factorisation.alignment import align
from moe_compress.methods.factorisation.auto import Solution, best_structure
from moe_compress.methods.factorisation.objectives import anchored_target
from moe_compress.methods.factorisation.requested import (
    check_factorise,
    forms,
    linear_rank,
    projections_of,
    size_of,
    tried,
)
from moe_compress.methods.factorisation.settings import Solver
from moe_compress.methods.factorisation.sharing_out import share_out, spectra_of
from moe_compress.methods.factorisation.sizes import OWN_RANKS, Size, mask_share, parameters
from moe_compress.methods.factorisation.solve import errors, solve
from moe_compress.methods.factorisation.structures import Activation, Factors, Grams
from moe_compress.methods.registry import Need, weight_method
from moe_compress.models.moe import MoEView
from moe_compress.utils.choices import Means

Chosen = Literal["base_delta", "svd", "shared_basis", "basis_mixture", "wrapper", "sparse_low_rank", "auto"]


def _needs(parameters: Mapping[str, Any]) -> Need:
    return "nothing" if parameters["objective"] == "plain" else "input_grams"


def spectra(layer: LayerExperts, **own: Any) -> Spectra:
    """What further ranks of a layer's projections are worth."""
    return spectra_of(layer, _shared_out_as(own), _even(layer.shapes, layer.stored.itemsize, own))


def shared_out(
    spectra: Mapping[int, Spectra], shapes: Mapping[int, Shapes], itemsize: int, **own: Any
) -> dict[int, dict[Part, Size]]:
    """Sizes of all layers' projections out of one budget."""
    even = {index: _even(found, itemsize, own) for index, found in shapes.items()}
    structure = _shared_out_as(own)
    ratio = own["ratio"] - mask_share(structure, itemsize)
    return share_out(spectra, shapes, even, structure=structure, ratio=ratio, multiple=own["multiple"])


def _even(shapes: Shapes, itemsize: int, own: Mapping[str, Any]) -> dict[Part, Size]:
    """Sizes where nothing is shared out."""
    return {part: size_of(_shared_out_as(own), part, shape, itemsize, own) for part, shape in shapes.items()}


def _shared_out_as(own: Mapping[str, Any]) -> str:
    """The structure for which ranks are shared out: before one is chosen, that of low ranks alone."""
    return "svd" if own["structure"] == "auto" else str(own["structure"])


def order(view: MoEView, own: Mapping[str, Any]) -> Tensor | None:
    """The order of every expert's neurons [E, F] in which they are to be; None for the one that they have."""
    if not own["align"]:
        return None
    return align(view.expert, view.num_experts, workers=torch.get_num_threads())


@weight_method(
    group="slimming",
    paper="arXiv 2503.12340 (SVD-LLM V2), 2502.17298 (D2-MoE), 2503.23100 (MoLAE), 2508.05257 (MoBE), "
    "2604.02119 (AA-SVD), 2604.00821 (OBD-LLM)",
    needs=_needs,
    check=check_factorise,
    factoring=Factoring(
        forms=forms,
        linear_rank=linear_rank,
        projections=lambda there, own: projections_of(own["projections"], there),
        order=order,
        pools=lambda own: own["grams"] == "pooled",
        crosses=lambda own: own["objective"] == "anchored",
        outputs=lambda own: own["objective"] == "two_sided",
        shares_out=lambda own: own["budget"] == "global",
        weighs=lambda own: own["budget"] != "uniform" and own["weigh"] == "gradient",
        spectra=spectra,
        share_out=shared_out,
    ),
    exclusive=(("rank", "ratio"),),
    shown_in_names=("structure", "rank", "ratio"),
    goes_with={
        "weigh": "budget!=uniform",
        "multiple": "rank=none",
        "align": "structure!=svd",
        "grams": "objective!=plain",
        "bases": "structure=basis_mixture,auto",
        "activation": "structure=basis_mixture,auto",
        "sparse": "structure=sparse_low_rank,auto and pattern=none",
        "pattern": "structure=sparse_low_rank,auto",
        "solver": "structure=wrapper",
        "steps": "solver=adam or activation!=linear",
        "lr": "solver=adam or activation!=linear",
        "sweeps": "structure!=svd and solver!=adam",
        "experts_at_once": "grams=expert",
    },
    selection_after="projections",
    unseen=("pooled", "plain", "error"),
)
def factorise(  # noqa: PLR0913 - its arguments are the recipe's parameters
    layer: LayerExperts,
    *,
    structure: Chosen = "base_delta",
    rank: int | None = None,
    ratio: float | None = 0.5,
    budget: Literal["uniform", "layer", "global"] = "uniform",
    weigh: Literal["gradient", "uniform"] = "gradient",
    projections: str = "all",
    align: bool = False,
    objective: Literal["activation", "plain", "anchored", "two_sided"] = "activation",
    grams: Literal["expert", "pooled"] = "expert",
    multiple: int = 1,
    bases: Annotated[int | None, Means("none: one for four experts")] = None,
    sparse: float = 0.5,
    pattern: str | None = None,
    activation: Activation = "linear",
    sweeps: int = 4,
    solver: Solver = "als",
    steps: Annotated[int | None, Means("none: as many as its solver takes")] = None,
    lr: Annotated[float | None, Means("none: its solver's own")] = None,
    seed: int = 0,
) -> FactoredLayer:
    """Hold experts' matrices in factors: low ranks, what experts share, sparse residues.

    structure: a core and low ranks (base_delta), low ranks (svd), a shared subspace (shared_basis), mixed bases
    (basis_mixture, with `bases` of them and an `activation`), the core in low-rank wrappers (wrapper, by solver=als or
    as published: adam, steps=1000 lr=0.001), low ranks and single weights (sparse_low_rank, `sparse` of the budget or
    pattern=2:4), or for each layer and projection the nearest of these at the same bytes (auto); rank, or ratio: the
    share of the factored projections' bytes that is kept; budget: the same rank for all, or ranks shared out in each
    layer or among all, in multiples of `multiple` (weigh: errors count as the gradient sees them, or alike);
    projections: gate, up, down or all; align: neurons of a layer's experts are put in one order first; objective: as
    the tokens routed to an expert see its matrix (activation), plain distance, the same made up for what earlier layers
    lost (anchored), or as the loss sees outputs (two_sided); grams: second moments of each expert's inputs, or pooled
    ones with each expert's own diagonal; sweeps: of alternating least squares. Linear maps of shared experts (where=)
    have nothing to share: whatever the structure, each becomes a low rank of the same ratio or rank.
    """
    own = {key: value for key, value in locals().items() if key != "layer"}
    sizes = _sizes(layer, own)
    found = {part: _projection(layer, part, sizes.get(part), own) for part in layer.weights}
    linears = {name: _linear(layer, name, own) for name in layer.linears}
    return FactoredLayer(
        factors={part: factors for part, (factors, _) in found.items()},
        report={name: said for each in (found, linears) for name, (_, said) in each.items()},
        linears={name: factors for name, (factors, _) in linears.items()},
    )


def _sizes(layer: LayerExperts, own: Mapping[str, Any]) -> Mapping[Part, Size]:
    """The sizes of a layer's projections; none where each structure that is tried has its own at the same bytes."""
    if layer.sizes or (own["structure"] == "auto" and own["budget"] == "uniform"):
        return layer.sizes
    if own["budget"] == "uniform":
        return _even(layer.shapes, layer.stored.itemsize, own)
    here = layer.layer
    return shared_out({here: spectra(layer, **own)}, {here: layer.shapes}, layer.stored.itemsize, **own)[here]


def _projection(
    layer: LayerExperts, part: Part, size: Size | None, own: Mapping[str, Any]
) -> tuple[Factors, dict[str, Any]]:
    """The factors of one projection, and what they are like: of those that are tried, the nearest."""
    weight_EOI, shape = layer.weights[part], layer.shapes[part]
    if size is None:
        sizes = tried(part, shape, layer.stored.itemsize, own)
    elif own["structure"] == "auto":
        shared = {**own, "ratio": parameters("svd", size, *shape) / weight_EOI.numel()}
        sizes = tried(part, shape, layer.stored.itemsize, shared)
        sizes |= _own_ranks(layer, part, sizes, shared)
    else:
        sizes = {str(own["structure"]): size}
    words = {key: own[key] for key in ("sweeps", "activation", "solver", "steps", "lr", "seed")}
    grams = layer.grams[part]
    found = best_structure(_target(layer, part), grams, sizes, layer.outputs.get(part), **words)
    said: dict[str, Any] = {
        "structure": found.structure,
        "parameters": found.factors.parameters,
        "parameters_before": weight_EOI.numel(),
    }
    if part in layer.crosses or part in layer.outputs:
        # Errors are those of every objective; what this one makes small comes beside them.
        said["plain"], said["whitened"] = errors(weight_EOI, found.factors, grams)
        least = min(found.losses)
        at_first = found.lost * found.losses[0] / least if least > 0 else found.lost
        said |= {"lost": found.lost, "lost_at_first": at_first}
    else:
        said |= {"plain": found.plain, "whitened": found.whitened}
        said["plain_at_first"], said["whitened_at_first"] = _at_first(weight_EOI, grams, found, sizes, own)
    return found.factors, {**said, **({"tried": found.tried} if len(sizes) > 1 else {})}


def _at_first(
    weight_EOI: Tensor, grams: Grams | None, found: Solution, sizes: Mapping[str, Size], own: Mapping[str, Any]
) -> tuple[float, float]:
    """Plain and whitened errors after the first sweep; of what one step or a descent solves, those at the end."""
    if found.structure == "svd" or own["solver"] == "adam" or own["sweeps"] == 1:
        return found.plain, found.whitened
    first, _ = solve(found.structure, weight_EOI, grams, sizes[found.structure], sweeps=1, seed=own["seed"])
    return errors(weight_EOI, first, grams)


def _linear(layer: LayerExperts, name: str, own: Mapping[str, Any]) -> tuple[Factors, dict[str, Any]]:
    """The low rank of one linear map beside the experts, and what it is like."""
    weight_1OI = layer.linears[name].unsqueeze(0)
    grams = layer.linear_grams[name].unsqueeze(0) if name in layer.linear_grams else None
    size = Size(ranks=[linear_rank(*layer.linears[name].shape, **own)])
    found = best_structure(weight_1OI, grams, {"svd": size})
    return found.factors, {
        "structure": found.structure,
        "parameters": found.factors.parameters,
        "parameters_before": weight_1OI.numel(),
        "plain": found.plain,
        "whitened": found.whitened,
        "plain_at_first": found.plain,
        "whitened_at_first": found.whitened,
    }


def _own_ranks(layer: LayerExperts, part: Part, sizes: Mapping[str, Size], own: Mapping[str, Any]) -> dict[str, Size]:
    """Of the structures with a rank for every expert, those of a projection shared out among its experts."""
    here, found = layer.layer, {}
    alone = replace(layer, weights={part: layer.weights[part]})
    for structure in (each for each in sizes if each in OWN_RANKS):
        worth = {here: spectra_of(alone, structure, {part: sizes[structure]})}
        ratio = own["ratio"] - mask_share(structure, layer.stored.itemsize)
        words = {"structure": structure, "ratio": ratio, "multiple": own["multiple"]}
        found[structure] = share_out(worth, {here: alone.shapes}, {here: {part: sizes[structure]}}, **words)[here][part]
    return found


def _target(layer: LayerExperts, part: Part) -> Tensor:
    """What factors are made of, [E, O, I]: the weights, or what stands for them on inputs that have changed."""
    weight_EOI, crosses, grams = layer.weights[part], layer.crosses.get(part), layer.grams[part]
    if crosses is None or grams is None:
        return weight_EOI
    return torch.stack([anchored_target(weight_OI, crosses[e], grams[e]) for e, weight_OI in enumerate(weight_EOI)])
