"""How much each layer, and each sub-layer of it, turns the stream: one minus the cosine of what goes in and comes out.

What hardly turns is what layer and block drop remove. T tokens, D model width, C components, L layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from moe_compress.engine.observer import BatchInfo, evenly_T

SAMPLE_BYTES = 2 << 30
PARTS = ("moe", "attention")


def cosine_distance(before_TD: Tensor, after_TD: Tensor) -> Tensor:
    """1 - cos of every token, [T]: half of |a/|a| - b/|b||^2, which does not cancel where the two are alike."""
    return (normalize(before_TD.float(), dim=-1) - normalize(after_TD.float(), dim=-1)).square().sum(-1) / 2


class BlockInfluence:
    """Sums over tokens of 1 - cos, per component, for every decoder layer.

    `stream_block`: what enters the layer and what leaves it; `stream_moe`, `stream_attention`: the stream before and
    after the sub-layer (paper's S^(NM)); `stream_moe_inner`, `stream_attention_inner`: the sub-layer's own input
    (after its norm) and output (S^(M)); `stream_tokens` [C]; `stream_sample` [P, D]: what enters the layer, for an
    even sample of tokens that is the same in every layer; the last layer also keeps what leaves it,
    `stream_sample_end`. arXiv 2406.02500.
    """

    def __init__(self, names: dict[str, Any], components: int, layers: int, real_tokens: int, width: int) -> None:
        self.names = names
        self.components = components
        self.layers = layers
        self.real_tokens = real_tokens
        self.sample = max(1, min(real_tokens, SAMPLE_BYTES // (4 * width * (layers + 1))))

    def enter(self, index: int, layer: nn.Module) -> None:
        """Listen to the layer, to its sub-layers and to the norms before them."""
        device = next(layer.parameters()).device
        self.index, self.seen_tokens = index, 0
        self.sums = {
            name: torch.zeros(self.components, dtype=torch.float64, device=device)
            for name in ("tokens", "block", *PARTS, *(f"{part}_inner" for part in PARTS))
        }
        self.samples: list[Tensor] = []
        self.end_samples: list[Tensor] = []
        children = dict(layer.named_modules())
        self.hooks = [layer.register_forward_pre_hook(self._keep("in"), with_kwargs=True)]
        # The stream before the MoE block is what its first norm is given, or the block where the norm comes behind it.
        for name in (*self.names["moe_norms"], self.names["block"]):
            if name in children:
                self.hooks.append(children[name].register_forward_pre_hook(self._keep("moe"), with_kwargs=True))
        for part, name in (("moe", self.names["block"]), ("attention", self.names["attention"])):
            if name in children:
                self.hooks.append(children[name].register_forward_pre_hook(self._keep(f"{part}_in"), with_kwargs=True))
                self.hooks.append(children[name].register_forward_hook(self._result(f"{part}_out")))
        for name in self.names["beside"]:
            if name in children:
                self.hooks.append(children[name].register_forward_hook(self._result("moe_out")))

    def begin(self, batch: BatchInfo) -> None:
        """Remember which tokens count."""
        self.batch = batch
        self.kept: dict[str, Tensor] = {}

    def _keep(self, key: str) -> Any:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            self.kept.setdefault(key, hidden)  # the first to be called sees the stream itself

        return hook

    def _result(self, key: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            before = self.kept.get(key)
            self.kept[key] = hidden if before is None else before + hidden.reshape(before.shape)

        return hook

    def end(self, hidden_BSD: Tensor) -> None:
        """Add up this batch."""
        kept = {key: self._real(value, hidden_BSD) for key, value in self.kept.items()}
        out_TD = self._real(hidden_BSD, hidden_BSD)
        pairs: dict[str, tuple[Tensor | None, Tensor | None]] = {
            "block": (kept["in"], out_TD),
            "moe": (kept.get("moe"), out_TD),
        }
        pairs["attention"] = (kept["in"], kept.get("moe"))
        for part in PARTS:
            pairs[f"{part}_inner"] = (kept.get(f"{part}_in"), kept.get(f"{part}_out"))
        component_T = self.batch.component_T[self.batch.real_T]
        self.sums["tokens"].index_add_(0, component_T, torch.ones_like(component_T, dtype=torch.float64))
        for name, (before, after) in pairs.items():
            if before is None or after is None or before.shape != after.shape:
                self.sums[name].fill_(torch.nan)
            else:
                self.sums[name].index_add_(0, component_T, cosine_distance(before, after).double())
        self._sample(kept["in"], out_TD)

    def _real(self, part: Tensor, hidden_BSD: Tensor) -> Tensor:
        """The rows of real tokens; several streams side by side (hyper-connections) are one."""
        tokens = hidden_BSD.shape[0] * hidden_BSD.shape[1]
        return part.reshape(tokens, -1)[self.batch.real_T]

    def _sample(self, in_TD: Tensor, out_TD: Tensor) -> None:
        chosen_T = evenly_T(self.seen_tokens, len(in_TD), self.sample, self.real_tokens, in_TD.device)
        self.seen_tokens += len(in_TD)
        self.samples.append(in_TD[chosen_T].float())
        if self.index == self.layers - 1:
            self.end_samples.append(out_TD[chosen_T].float())

    def leave(self) -> dict[str, Tensor]:
        """The layer's sums on the CPU."""
        for hook in self.hooks:
            hook.remove()
        found = {f"stream_{name}": value.cpu() for name, value in self.sums.items()}
        found["stream_sample"] = torch.cat(self.samples).cpu()
        if self.end_samples:
            found["stream_sample_end"] = torch.cat(self.end_samples).cpu()
        return found


def between_layers(samples: list[Tensor]) -> Tensor:
    """Mean 1 - cos between the stream before layer i and before layer j, [L+1, L+1], over the sampled tokens."""
    units = [normalize(sample_PD, dim=-1) for sample_PD in samples]
    found = torch.zeros(len(units), len(units), dtype=torch.float64)
    for i, one_PD in enumerate(units):
        for j in range(i + 1, len(units)):
            found[i, j] = found[j, i] = ((one_PD - units[j]).square().sum(-1) / 2).double().mean()
    return found
