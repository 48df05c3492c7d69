"""Layerwise distillation: one layer at a time learns to give what the original's gives. One layer of memory."""

from __future__ import annotations

from typing import Annotated, Literal

from moe_compress.methods.recovery_method import ALPHA, RANK, LayerDistillation, parts_and_adapters
from moe_compress.methods.registry import recovery_method
from moe_compress.utils.choices import Added


@recovery_method(
    group="recovery",
    paper="ModelOpt's LayerwiseDistillationModel; AA-SVD (arXiv 2604.02119)",
    shown_in_names=("train",),
    lacks=("recompute", "keep", "holdout", "checkpoint_every", "keep_checkpoints", "log"),
)
def layerwise(
    *,
    train: str = "experts,routers",
    rank: Annotated[int, Added()] = RANK,
    alpha: Annotated[float, Added()] = ALPHA,
    inputs: Literal["student", "teacher"] = "student",
) -> LayerDistillation:
    """Train one layer after the other, each by itself, on what the original's layers give in its place.

    train: what of it, a comma-separated list of all, routers, experts, shared, attention, dense, norms and new
    (factors, and constants in place of experts), or lora: low-rank adapters; rank, alpha: of adapters; as for distill;
    inputs: what enters a layer while it learns, the hidden states that the compressed model has by then, so that
    earlier errors are made good, or the original's. steps: of each layer.
    """
    trains, adapters = parts_and_adapters(train, rank, alpha)
    return LayerDistillation(trains=trains, inputs=inputs, adapters=adapters)
