"""Distillation: parts of the compressed model, or all of it, learn to say what the original says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated

from moe_compress.methods.recovery.divergences import Kind
from moe_compress.methods.recovery.kept_targets import Cache, towards_teacher
from moe_compress.methods.recovery_method import (
    ALPHA,
    LAYERED,
    RANK,
    Distillation,
    TeacherBits,
    Term,
    parts_and_adapters,
    weighted_terms,
)
from moe_compress.methods.registry import recovery_method
from moe_compress.utils.choices import Added


@recovery_method(
    group="recovery",
    paper="Distilling the Knowledge in a Neural Network (arXiv 1503.02531); GKD (arXiv 2306.13649)",
    shown_in_names=("train",),
    goes_with={"beta": "divergence=jsd", "top": "cache!=none", "cache=sampled": "divergence=forward"},
)
def distill(
    *,
    train: str = "experts,routers",
    rank: Annotated[int, Added()] = RANK,
    alpha: Annotated[float, Added()] = ALPHA,
    loss: str = "logits",
    divergence: Kind = "forward",
    temperature: float = 1.0,
    beta: float = 0.5,
    cache: Cache = "none",
    top: int = 64,
    teacher_bits: TeacherBits = "0",
) -> Distillation:
    """Train the compressed model on what the original says of the calibration text.

    train: what of it, a comma-separated list of all, routers, experts, shared, attention, dense, norms, new (factors,
    and constants in place of experts), and, of packed matrices, scales and codes; or lora: low-rank adapters on the
    matrices of experts and attention, or of those of experts, attention, shared and dense that are named beside it,
    added to them in the end; rank, alpha: of adapters, which are scaled by alpha / rank; loss: a comma-separated list,
    each with its weight behind a colon, of logits (next-token divergence), hidden (squared error of what leaves each
    layer), router (KL of the routing), experts (squared error of what each expert gives on the tokens that it is sent)
    and labels (cross-entropy of the text itself); divergence, temperature, beta: forward KL, reverse KL, or generalised
    Jensen-Shannon with the original's share beta, of logits divided by the temperature; cache: run the original once on
    the text, for every model that learns from it, and keep of each distribution the `top` likeliest tokens and what
    the others have together (topk), or half as many and draws from the others, which estimate the KL without bias
    (sampled); teacher_bits: hold the original's weights in so few bits while it teaches (0: as they are).
    """
    terms = weighted_terms(loss)
    if "logits" not in terms and (divergence != "forward" or temperature != 1.0):
        said = f"divergence={divergence} temperature={temperature:g}"
        raise ValueError(f"{said} would do nothing: loss={loss} has no logits.")
    if teacher_bits != "0" and terms.keys() == {"labels"}:
        raise ValueError(f"loss={loss} with teacher_bits={teacher_bits}: nothing is asked of the original.")
    if cache != "none":
        _require_kept(cache, loss, terms)
    trains, adapters = parts_and_adapters(train, rank, alpha)
    moved = trains | (adapters.parts if adapters is not None else frozenset())
    if "experts" in terms and not moved & {"all", "experts", "new"}:
        raise ValueError(f"loss={loss} would do nothing to train={train}: name experts there, or leave this loss out.")
    task = towards_teacher(
        trains, terms, divergence=divergence, temperature=temperature, beta=beta, cache=cache, top=top,
        teacher_bits=teacher_bits,
    )  # fmt: skip
    return replace(task, adapters=adapters)


def _require_kept(cache: Cache, loss: str, terms: Mapping[Term, float]) -> None:
    """Raise ValueError for losses that a cache holds nothing for, or that ask it for nothing."""
    if set(LAYERED) & terms.keys():
        raise ValueError(
            f"loss={loss} with cache={cache}: a cache holds next-token probabilities, and no hidden states, routing or "
            "experts; use loss=logits, or cache=none."
        )
    if "logits" not in terms:
        raise ValueError(f"loss={loss} with cache={cache}: nothing is asked of the original; use cache=none.")
