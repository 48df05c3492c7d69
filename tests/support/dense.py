"""MoE models that a dense one can equal: every token uses all experts, each with the same gate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from moe_compress.models.families import FAMILIES
from moe_compress.models.moe import moe_views
from support import readers, tiny

FAMILIES_MADE_DENSE = tuple(name for name in tiny.EDITABLE if FAMILIES[name].dense_as)
ACTIVE = {"hunyuan_v1_moe": "moe_topk", "ernie4_5_moe": "moe_k"}


def with_equal_gates(family: str, folder: Path) -> Path:
    """A tiny reader whose routers are zero, and give every token all experts."""
    overrides: dict[str, Any] = {ACTIVE.get(family, "num_experts_per_tok"): tiny.EXPERTS, "vocab_size": readers.VOCAB}
    overrides |= {"n_group": 1, "topk_group": 1} if family == "deepseek_v3" else {}
    model = tiny.make(family, **overrides)
    with torch.no_grad():
        for view in moe_views(model).values():
            view.router_rows_ED.zero_()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(("e_score_correction_bias", "shared_expert_gate.weight")):
                tensor.zero_()
    tiny.save(model, folder)
    readers.tokenizer().save_pretrained(folder)
    return folder
