"""Four different sizes of a model, from its skeleton alone, and a check of the FLOPs against torch's own counter.

What is counted how is said in components.py.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import flop_counter
from transformers import PreTrainedModel

from moe_compress.models import hf
from moe_compress.models.component_map import (
    NORMS,
    PROJECTIONS,
    SCORES,
    attentions_of,
    component_of_modules,
)
from moe_compress.models.components import components
from moe_compress.models.sizes import Sizes, sizes

__all__ = ["Agreement", "Sizes", "check", "sizes"]
TOLERANCE = 1e-3
aten: Any = torch.ops.aten


# --- beside torch's counter ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """One component in one phase (prefill or decode): FLOPs by our count and by torch's.

    compared: whether they should be the same. Scans need not be, nor experts of which the text decides how many run,
    nor what is not counted here at all (rotary tables).
    """

    component: str
    phase: str
    analytic: int
    counted: int
    compared: bool = True

    @property
    def difference(self) -> float:
        """How far they are apart, relative to torch's count."""
        return abs(self.analytic - self.counted) / max(self.counted, 1)

    @property
    def agrees(self) -> bool:
        """Whether they are the same to 0.1 %, where they should be."""
        return not self.compared or self.difference <= TOLERANCE


def check(model: PreTrainedModel, tokens: int) -> list[Agreement]:
    """Run `tokens` tokens and then one more under torch's FLOP counter, and lay its counts beside ours.

    No decode step where there is no attention left, whose cache it needs. The model has its weights on the CPU, or is a
    skeleton, which is left as it is. Raises ValueError for a skeleton of experts that run on weights alone.
    """
    skeleton, running = next(model.parameters()).is_meta, model
    if skeleton:  # the grouped matmul takes nothing but bf16 on the meta device; buffers have to be there as well
        copied: Any = copy.deepcopy(model)
        running = copied.to("meta", torch.bfloat16)
    ids = torch.zeros(1, tokens, dtype=torch.long, device=next(running.parameters()).device)
    cached = next(attentions_of(model), None) is not None
    try:
        prefill, output = _counted(running, ids, use_cache=cached)
        phases = [("prefill", prefill)]
        if cached:
            decode, _ = _counted(running, ids[:, :1], use_cache=True, past_key_values=output.past_key_values)
            phases.append(("decode", decode))
    except (NotImplementedError, RuntimeError) as error:
        if not skeleton:
            raise
        raise ValueError(
            f"torch cannot count {model.config.model_type} without weights ({str(error).splitlines()[0]}): "
            "check a checkpoint that has them."
        ) from error
    found = components(model, tokens, tokens + 1, 1, torch.float32, executed=True)
    return [
        Agreement(
            component=each.name,
            phase=phase,
            analytic=getattr(each, phase),
            counted=counted[each.name],
            compared=not each.estimate and each.name != NORMS,
        )
        for phase, counted in phases
        for each in found
        if getattr(each, phase) or counted[each.name]
    ]


@torch.no_grad()
def _counted(model: PreTrainedModel, ids: torch.Tensor, **keywords: Any) -> tuple[Counter[str], Any]:
    """FLOPs of one run by component: what a module computes itself, without its children, belongs to its own."""
    counter = flop_counter.FlopCounterMode(display=False, custom_mapping=MAPPING)
    with hf.quiet(), counter:
        output = model(ids, **keywords)
    root, place = type(model).__name__, component_of_modules(model)
    inclusive = {name: sum(kernels.values()) for name, kernels in counter.get_flop_counts().items()}
    total: Counter[str] = Counter()
    for name, count in inclusive.items():
        if not name.startswith(root):  # the counter's own sum
            continue
        path = name.removeprefix(root).removeprefix(".")
        total[_component(model, path, place[path])] += count
        caller = next((name[:end] for end in _ends(name) if name[:end] in inclusive), None)
        if caller is not None:
            above = caller.removeprefix(root).removeprefix(".")
            total[_component(model, above, place[above])] -= count
    return total, output


def _ends(name: str) -> list[int]:
    """Where the names of all modules around this one end, the nearest first (lists of modules are never called)."""
    return [end for end in range(len(name) - 1, 0, -1) if name[end] == "."]


def _component(model: PreTrainedModel, path: str, place: str) -> str:
    """An attention multiplies queries, keys and values itself, and leaves projections to its children."""
    mixing = place == PROJECTIONS and next(model.get_submodule(path).children(), None) is not None
    return SCORES if mixing else place


def _grouped(rows: Sequence[int], stack: Sequence[int], *_: Any, **__: Any) -> int:
    """Rows [R, I] by a stack [E, I, O]: each row meets one matrix."""
    return 2 * rows[0] * rows[1] * stack[-1]


def _attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """Queries [B, H, Q, D] by keys [B, H, K, D], and the scores by values [B, H, K, V]: the full square."""
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[-2] * (width + value[-1])


# Kernels that torch's counter does not know.
MAPPING = {aten._grouped_mm: _grouped, aten._scaled_dot_product_flash_attention_for_cpu: _attention}
