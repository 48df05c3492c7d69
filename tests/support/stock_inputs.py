"""What the matrices of a stock model multiply with: sums of squares in float64, from hooks, expert by expert."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from moe_compress.models import hf
from moe_compress.models.moe import moe_views


class StockSums:
    """Sums of squares [B, I] and counts [B, 1] by GGUF's names; names: GGUF's in a layer -> the layer's module."""

    def __init__(self, folder: Path, names: dict[str, str]) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model.set_experts_implementation("eager")
        self.model = model.double()
        self.sums: dict[str, Any] = defaultdict(float)
        self.counts: dict[str, Any] = defaultdict(float)
        for index, layer in enumerate(hf.decoder_layers(model)):
            modules = dict(layer.named_modules())
            for name, path in names.items():
                if path in modules:
                    modules[path].register_forward_pre_hook(self.linear(f"blk.{index}.{name}.weight"))
        for index, view in moe_views(model).items():
            view.experts.register_forward_pre_hook(self.experts(index, view))

    def run(self, ids: torch.Tensor) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """One window after the other."""
        with torch.no_grad():
            for row in ids:
                self.model(row[None])
        return {name: (sums.numpy(), self.counts[name].numpy()) for name, sums in self.sums.items()}

    def add(self, name: str, rows: list[torch.Tensor]) -> None:
        """The rows of each expert."""
        self.sums[name] += torch.stack([x_RI.square().sum(0) for x_RI in rows])
        self.counts[name] += torch.tensor([[len(x_RI)] for x_RI in rows])

    def linear(self, name: str) -> Any:
        return lambda _module, args: self.add(name, [args[0].flatten(0, -2)])

    def experts(self, index: int, view: Any) -> Any:
        """Inputs of all experts, and of their down projections where these are gated by SiLU."""

        def hook(module: Any, args: tuple[torch.Tensor, ...]) -> None:
            hidden_TD, index_TK = args[0].flatten(0, -2), args[1].flatten(0, -2)
            rows = [hidden_TD[(index_TK == expert).any(-1)] for expert in range(view.num_experts)]
            self.add(f"blk.{index}.ffn_up_exps.weight", rows)
            if type(module).__name__.startswith(("Mixtral", "Deepseek")):
                pairs = [(x_RD, view.expert(expert)) for expert, x_RD in enumerate(rows)]
                inner = [torch.nn.functional.silu(x_RD @ e.gate.T) * (x_RD @ e.up.T) for x_RD, e in pairs]
                self.add(f"blk.{index}.ffn_down_exps.weight", inner)

        return hook
