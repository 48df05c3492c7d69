"""Shrink: a smaller MoE in several stages, each of which cuts experts and neurons and then distils."""

from __future__ import annotations

from typing import Annotated, Any

from moe_compress.methods.registry import stage_preset
from moe_compress.utils.choices import AtLeast

# What is cut at once is a share that its method rounds to whole experts and neurons: more digits say nothing.
DIGITS = 4


@stage_preset(
    group="presets of stages",
    paper="SlimMoE (arXiv 2506.18349); Minitron (2407.14679): prune and distil in turn",
)
def shrink(
    *,
    experts: float = 0.75,
    width: float = 0.5,
    stages: Annotated[int, AtLeast(1)] = 2,
    steps: Annotated[int, AtLeast(1)] = 200,
    train: str = "all",
    lr: float = 1e-3,
) -> list[tuple[str, dict[str, Any]]]:
    """Make a smaller MoE in stages: fewer experts and narrower ones, with distillation behind each cut.

    experts, width: the share of a layer's experts, and of an expert's neurons, that is left in the end (1: all); each
    of `stages` removes the same share of what there is, by expert_drop and channels; steps, train, lr: of the distill
    behind it, whose teacher is always the model that the recipe starts from.
    """
    for name, left in (("experts", experts), ("width", width)):
        if not 0 < left <= 1:
            raise ValueError(f"shrink.{name}={left}: the share that is left is above 0 and at most 1.")
    cuts = {"expert_drop": experts, "channels": width}
    ratios = {method: round(1 - left ** (1 / stages), DIGITS) for method, left in cuts.items()}
    cut = [(method, {"ratio": ratio}) for method, ratio in ratios.items() if ratio]
    if not cut:
        raise ValueError("shrink experts=1 width=1 would leave the model as it is: make one of the two smaller.")
    return [*cut, ("distill", {"steps": steps, "train": train, "lr": lr})] * stages
