"""A model that is wholly in memory and run layer by layer as the engine runs it, with gradients.

B windows of S positions, D model width, P predicted tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed
from transformers import PreTrainedModel

from moe_compress.checkpoints.load import load_as_run, load_packed
from moe_compress.checkpoints.reader import Checkpoint
from moe_compress.compression.recovery.arithmetic import Arithmetic
from moe_compress.compression.recovery.shared_out import shard_layer
from moe_compress.data.windows import Windows
from moe_compress.models import hf
from moe_compress.run.context import Run

# Of so many tokens hidden states of all layers are held for the way back at the same time.
TOKENS_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class TextBatch:
    """Some windows: their numbers, tokens, padding mask (None: none), which tokens count, which predict one that does.

    counted_BS, where_P2: window and position.
    """

    rows: Tensor
    ids_BS: Tensor
    mask_BS: Tensor | None
    counted_BS: Tensor
    where_P2: Tensor

    @property
    def targets_P(self) -> Tensor:
        """The tokens that are predicted."""
        return self.ids_BS[self.where_P2[:, 0], self.where_P2[:, 1] + 1]


def silent(batch: TextBatch) -> TextBatch:
    """The same windows, of which nothing counts: for a process that has none left, but takes part in layers."""
    return replace(batch, counted_BS=torch.zeros_like(batch.counted_BS), where_P2=batch.where_P2[:0])


def text_batch(windows: Windows, rows: Tensor, device: torch.device) -> TextBatch:
    """The windows of these numbers."""
    mask_BS, counted_BS = windows.mask_NS[rows], windows.counted_NS[rows]
    where_P2 = (mask_BS[:, :-1] & counted_BS[:, 1:]).nonzero()
    padded = None if bool(mask_BS.all()) else mask_BS.long().to(device)
    return TextBatch(rows, windows.ids_NS[rows].to(device), padded, counted_BS.to(device), where_P2.to(device))


class WholeModel:
    """A checkpoint in memory; `states` is a forward up to the head."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        run: Run,
        dtype: torch.dtype,
        *,
        recompute: bool = False,
        model: PreTrainedModel | None = None,
    ) -> None:
        """model: where it is in memory already."""
        self.device, self.recompute = run.device, recompute
        if model is None:
            model = _loaded(checkpoint, run, dtype)
        self.model = model
        self.model.requires_grad_(False)
        self.arithmetic = Arithmetic(run.device)
        hf.remember_names(self.model, checkpoint.tensors)
        hf.use_experts_function(self.model)

    def states(self, batch: TextBatch) -> list[Tensor]:
        """What enters the first layer and leaves each, [B, S, D]; with gradients where they are enabled."""
        with self.arithmetic.running():
            hidden_BSD, calls = hf.entered(self.model, batch.ids_BS, batch.mask_BS)
        found, handed = [hidden_BSD.float() if self.arithmetic.mixed else hidden_BSD], None
        for layer, call in zip(hf.decoder_layers(self.model), calls, strict=True):
            if self.recompute and torch.is_grad_enabled():
                output = recomputed(self._layer_output, layer, found[-1], call, handed, use_reentrant=False)
            else:
                output = self._layer_output(layer, found[-1], call, handed)
            found.append(output.hidden_BSD)
            handed = output.handed
        return found

    def _layer_output(
        self, layer: nn.Module, hidden_BSD: Tensor, call: hf.LayerCall, handed: Tensor | None
    ) -> hf.LayerOutput:
        with self.arithmetic.layer(layer):
            return hf.layer_output(layer, hidden_BSD, call, handed)

    def logits(self, hidden_PD: Tensor) -> Tensor:
        """Logits [P, V] of final hidden states."""
        with self.arithmetic.running():
            return hf.logits(self.model, hidden_PD)

    def final(self, batch: TextBatch, states: list[Tensor]) -> Tensor:
        """The last states of the tokens that predict, [P, ...]."""
        return states[-1][batch.where_P2[:, 0], batch.where_P2[:, 1]]


def _loaded(checkpoint: Checkpoint, run: Run, dtype: torch.dtype) -> PreTrainedModel:
    """The model in memory; where layers are shared out, read one at a time, so that no process ever holds all."""
    mesh, attn = run.processes.mesh, run.options.attn
    if mesh is None:
        return load_as_run(checkpoint, dtype, run.device, attn)
    return load_packed(checkpoint, dtype, run.device, attn, placed=lambda layer: shard_layer(layer, mesh))


def chunked_loss(
    student: WholeModel, hidden_PD: Tensor, loss_of: Callable[[Tensor, slice], Tensor], scale: float
) -> tuple[float, Tensor]:
    """The sum of losses of predicted tokens, and its gradient times `scale` at their final hidden states.

    loss_of: logits [p, V] of some of the tokens, and which -> their losses [p]. Logits are made and left a chunk at a
    time, so that memory does not grow with tokens times vocabulary; gradients of the head itself add up meanwhile.
    Where gradients are not enabled, there are none.
    """
    gradient_PD = torch.zeros_like(hidden_PD)
    rows, total = hf.head_rows(student.model), 0.0
    for start in range(0, len(hidden_PD), rows):
        part = slice(start, start + rows)
        leaf_pD = hidden_PD[part].detach().requires_grad_()
        loss = loss_of(student.logits(leaf_pD), part).sum()
        total += float(loss.detach())
        if torch.is_grad_enabled():
            torch.autograd.backward(loss * scale)
            assert leaf_pD.grad is not None
            gradient_PD[part] = leaf_pD.grad
    return total, gradient_PD
