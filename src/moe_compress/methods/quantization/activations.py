"""Activations of 8 bits: what experts are sent over a network, or all that matrices multiply.

Weights of 8 bits with one scale a row (`quantize bits=8 group_size=0 format=packed`) are then multiplied with them as
whole numbers.
"""

from __future__ import annotations

from typing import Any, Literal

from moe_compress.calibration.model_statistics import ModelStatistics
from moe_compress.edits.edits import Edit, Plan, RoundActivations
from moe_compress.methods.registry import method
from moe_compress.models.shape import ModelShape

Where = Literal["sent", "experts", "all"]
# A token is sent as numbers of 16 bits, or as 8-bit codes and one scale of 32 bits.
SENT_BITS, CODE_BITS, SCALE_BITS = 16, 8, 32


def check_activations(shape: ModelShape, *, where: Where, **_: Any) -> Plan:
    """The edits; every layer can have them."""
    layers = range(shape.total) if where == "all" else [moe.layer for moe in shape.moe]
    edits: list[Edit] = [RoundActivations(layer, where) for layer in layers]
    return Plan(edits, {}, {"bytes_sent_per_token": sent_bytes(shape)})


def sent_bytes(shape: ModelShape) -> dict[str, float]:
    """Bytes by which a token reaches its experts in all layers, k * D numbers each, before and after.

    What comes `back` has 16 bits. Every expert counts as being elsewhere, as where each has a device of its own.
    """
    copies = [(moe.top_k if moe.active is None else moe.active, moe.width) for moe in shape.moe]
    before = sum(active * width * SENT_BITS / 8 for active, width in copies)
    after = sum(active * (width * CODE_BITS + SCALE_BITS) / 8 for active, width in copies)
    return {"before": before, "after": after, "back": before, "share_of_both_ways": (after + before) / (2 * before)}


@method(
    "model",
    group="slimming",
    paper="arXiv 2206.01861 (one scale a token)",
    check=check_activations,
    shown_in_names=("where",),
)
def activations(model: ModelStatistics, *, where: Where = "experts") -> Plan:
    """Round activations to 8 bits, each token with a scale of its own, measured as it passes.

    where: what experts are `sent` (on the way to experts elsewhere; router and shared experts see all of it), all that
    `experts` multiply, or the inputs of `all` linear maps but routers and gates.
    """
    return check_activations(model.shape, where=where)
