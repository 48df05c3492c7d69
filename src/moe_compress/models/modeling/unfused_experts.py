"""Experts held one by one, each with matrices of its own: of different widths, packed, or in factors.

Families fuse the experts of a layer into tensors [E, ...], all experts alike. Where they differ, the same module holds
`separate` instead, a list with `w_switch` (its gate), `w_up` and `w_down` of every expert, and runs them in turn.
Shipped inside edited checkpoints, so it needs torch alone. E experts, D model width, F inner width, R rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from .activation_rounding import rounded, rounding_of

UNFUSED = "separate"
# What an expert's matrices are called. No `gate`: checkpoints of some families are renamed wherever it occurs.
CHILDREN = {"gate": "w_switch", "up": "w_up", "down": "w_down"}


class ExpertMatrix(nn.Module):
    """One matrix of one expert, [out, in], with its bias."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_OI, requires_grad=False)
        self.bias = None if bias_O is None else nn.Parameter(bias_O, requires_grad=False)

    @property
    def out_features(self) -> int:
        """Outputs."""
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        """Inputs."""
        return self.weight.shape[1]

    def dense(self) -> Tensor:
        """The matrix as plain numbers [out, in]."""
        return self.weight.detach()

    def forward(self, x_RI: Tensor) -> Tensor:
        """The product with rows of inputs."""
        return linear(x_RI, self.weight, self.bias)


def is_separate(fused: nn.Module) -> bool:
    """Whether an experts module holds its experts one by one."""
    return UNFUSED in fused._modules


def expert_count(fused: Any) -> int:
    """Experts that the module holds."""
    return len(fused.separate) if is_separate(fused) else int(fused.down_proj.shape[0])


def stack_path(experts: str, name: str) -> str:
    """Which stack of the experts' matrices a name within the layer means: `up`, or its factor `up.left`; else empty."""
    path = name.removeprefix(f"{experts}.")
    return path if path != name and path.partition(".")[0] in CHILDREN else ""


def places(fused: Any, path: str) -> list[tuple[nn.Module, str]]:
    """Where the matrices of a stack are held, expert by expert: a module, and its child's name."""
    part, _, factor = path.partition(".")
    experts = [(expert, CHILDREN[part]) for expert in fused.separate]
    return [(expert[name], factor) for expert, name in experts] if factor else experts


def widths(fused: Any) -> list[int]:
    """Inner neurons of every expert."""
    if is_separate(fused):
        return [expert[CHILDREN["down"]].in_features for expert in fused.separate]
    return [int(fused.down_proj.shape[1 if _transposed(fused) else 2])] * expert_count(fused)


def model_width(fused: Any) -> int:
    """Width of what the experts return."""
    if is_separate(fused):
        return int(fused.separate[0][CHILDREN["down"]].out_features)
    return int(fused.down_proj.shape[2 if _transposed(fused) else 1])


def own_tensor(fused: Any) -> Tensor:
    """One of the experts' tensors, for their dtype and device."""
    return next(tensor for tensor in fused.parameters() if tensor.is_floating_point())


def _transposed(fused: Any) -> bool:
    return bool(getattr(fused, "is_transposed", True))


def stacks(fused: Any) -> dict[str, Tensor]:
    """The experts' matrices [E, out, in] by name (gate, where there is one, up, down).

    Views onto the storage, but copies filled up with zeros where experts are held one by one.
    """
    if is_separate(fused):
        found = {part: name for part, name in CHILDREN.items() if name in fused.separate[0]}
        return {part: _stacked([expert[name].dense() for expert in fused.separate]) for part, name in found.items()}

    def stack(name: str) -> Tensor:
        weight = getattr(fused, name)
        return weight.transpose(1, 2) if _transposed(fused) else weight

    if not getattr(fused, "has_gate", True):
        return {"up": stack("up_proj"), "down": stack("down_proj")}
    gate, up = halves(fused, stack("gate_up_proj"))
    return {"gate": gate, "up": up, "down": stack("down_proj")}


def _stacked(matrices: Sequence[Tensor]) -> Tensor:
    rows, columns = (max(matrix.shape[dim] for matrix in matrices) for dim in (0, 1))
    return torch.stack([pad(m, (0, columns - m.shape[1], 0, rows - m.shape[0])) for m in matrices])


def biases(fused: Any) -> dict[str, Tensor]:
    """The biases [E, out] by the same names; nothing where there are none or experts are held one by one."""
    if not getattr(fused, "has_bias", False) or is_separate(fused):
        return {}
    if not getattr(fused, "has_gate", True):
        return {"up": fused.up_proj_bias, "down": fused.down_proj_bias}
    gate, up = halves(fused, fused.gate_up_proj_bias)
    return {"gate": gate, "up": up, "down": fused.down_proj_bias}


def halves(fused: Any, both_EO: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and up of a fused tensor, [E, 2F, ...] -> [E, F, ...] each."""
    if getattr(fused, "is_concatenated", True):
        gate, up = both_EO.chunk(2, dim=1)
        return gate, up
    return both_EO[:, 0::2], both_EO[:, 1::2]


def narrow(fused: Any, widths: Sequence[int]) -> None:
    """Keep the first neurons of every expert, as many as `widths` says."""
    for expert, width in zip(fused.separate, widths, strict=True):
        for name, matrix in expert.items():
            dim = 1 if name == CHILDREN["down"] else 0
            matrix.weight = nn.Parameter(matrix.weight.detach().narrow(dim, 0, width).clone(), requires_grad=False)
            if dim == 0 and matrix.bias is not None:
                matrix.bias = nn.Parameter(matrix.bias.detach()[:width].clone(), requires_grad=False)


# --- running them ------------------------------------------------------------------------------------------


def gate_on_input(fused: nn.Module) -> bool:
    """Whether the gate weight multiplies what the experts see, not what they return (Llama-4)."""
    return not hasattr(fused, "_apply_gate")


def run_separate(fused: Any, input_RD: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Rows sorted by expert: inputs of the down projections [R, F], filled up with zeros, and outputs [R, D]."""
    inner, output, widest = [], [], max(widths(fused))
    for expert, x_RD in zip(fused.separate, input_RD.split(counts), strict=True):
        if len(x_RD):
            inner_RF = inner_rows(fused, expert, x_RD)
            inner.append(pad(inner_RF, (0, widest - inner_RF.shape[1])))
            output.append(expert[CHILDREN["down"]](inner_RF))
    if not inner:
        return input_RD.new_zeros(0, widest), input_RD.new_zeros(0, model_width(fused))
    output_RD = torch.cat(output)
    normed = getattr(fused, "has_post_expert_norm", False)
    return torch.cat(inner), fused.post_expert_norm(output_RD) if normed else output_RD


def run_one_token(fused: Any, hidden_1D: Tensor, chosen: Sequence[int], weight_K: Tensor) -> Tensor:
    """The weighted sum of one token's experts, without putting rows in order: what decoding spends its time on."""
    added = [torch.zeros_like(hidden_1D)]
    for k, number in enumerate(chosen):
        if number < len(fused.separate):
            expert = fused.separate[number]
            output_1D = expert[CHILDREN["down"]](inner_rows(fused, expert, hidden_1D))
            if getattr(fused, "has_post_expert_norm", False):
                output_1D = fused.post_expert_norm(output_1D)
            added.append(output_1D * weight_K[k])
    return torch.stack(added, 1).sum(1).to(hidden_1D.dtype)


def multiplied(fused: nn.Module, inner_RF: Tensor) -> Tensor:
    """Inputs of down projections as these multiply them."""
    return rounded(inner_RF) if rounding_of(fused) == "experts" else inner_RF


def inner_rows(fused: Any, expert: Any, x_RD: Tensor, given: Mapping[str, Tensor] | None = None) -> Tensor:
    """What the down projection of one expert is given.

    given: by the name of a matrix, what it shares with other experts has made of the rows already.
    """
    return multiplied(fused, _activated(fused, expert, x_RD, given or {}))


def _activated(fused: Any, expert: Any, x_RD: Tensor, given: Mapping[str, Tensor]) -> Tensor:
    up_RF = _product(expert, "up", x_RD, given)
    if CHILDREN["gate"] not in expert:
        return fused.act_fn(up_RF)
    gate_RF = _product(expert, "gate", x_RD, given)
    if gate_on_input(fused):
        return up_RF * fused.act_fn(gate_RF)
    together = torch.cat if getattr(fused, "is_concatenated", True) else _interleaved
    return fused._apply_gate(together([gate_RF, up_RF], -1))


def _product(expert: Any, part: str, x_RD: Tensor, given: Mapping[str, Tensor]) -> Tensor:
    name = CHILDREN[part]
    return expert[name].parts(x_RD, given[name])[0] if name in given else expert[name](x_RD)


def _interleaved(pair: Sequence[Tensor], _dim: int) -> Tensor:
    return torch.stack(list(pair), -1).flatten(-2)
