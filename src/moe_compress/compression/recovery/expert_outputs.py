"""loss=experts: what each expert gives on the tokens that it is sent, beside what those give that it was made of.

Only experts learn by it: what they are sent is taken as it is. R routed (token, expert) pairs, by expert, D model
width, M such pairs with one of the experts that an expert was made of, T tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe_compress.compression.recovery.lineage import Lineage
from moe_compress.compression.recovery.whole_model import TextBatch, WholeModel
from moe_compress.methods.recovery.relative_error import mean_by_token, relative_error
from moe_compress.models import hf
from moe_compress.models.moe import all_moe_views


class _Sent(NamedTuple):
    """What was sent to the experts of a layer."""

    token_R: Tensor
    expert_R: Tensor
    input_RD: Tensor


class ExpertOutputs:
    """Hears what the student's experts are sent in every forward, and compares what they make of it."""

    def __init__(self, student: WholeModel, teacher: WholeModel, kin: Lineage) -> None:
        self.student, self.dtype = student, teacher.model.dtype
        theirs = all_moe_views(teacher.model)
        self.views = all_moe_views(student.model)
        self.members = {layer: (theirs[kin.sources[layer]], kin.experts[layer]) for layer in self.views}
        self.sent: dict[int, _Sent] = {}
        for layer, view in self.views.items():
            hf.tap(view.block, view.experts, functools.partial(self._hear, layer))

    def _hear(self, layer: int, rows: hf.RoutedRows) -> None:
        self.sent[layer] = _Sent(rows.token_R, rows.expert_R, rows.input_RD.detach())

    def losses(self, batch: TextBatch) -> Iterator[Tensor]:
        """Each layer's share of the loss of the last forward, which was of this batch.

        The relative error by pair, its mean by token, summed over tokens that count, divided by the number of layers.
        """
        counted_T, layers = batch.counted_BS.flatten(), hf.decoder_layers(self.student.model)
        for layer, view in self.views.items():
            sent = self.sent.pop(layer)
            token_R, expert_R, input_RD = (each[counted_T[sent.token_R]] for each in sent)
            theirs_RD = self._wanted(layer, input_RD, expert_R)
            with self.student.arithmetic.layer(layers[layer]):
                ours_RD = hf.output_rows(view.experts, input_RD, expert_R)
            error_T = mean_by_token(relative_error(ours_RD, theirs_RD), token_R, len(counted_T))
            yield error_T.sum() / len(self.views)

    @torch.no_grad()
    def _wanted(self, layer: int, input_RD: Tensor, expert_R: Tensor) -> Tensor:
        """What the teacher's experts give for the same rows; of several that were merged, their weighted mean."""
        view, members = self.members[layer]
        row_M, expert_M, share_M = _by_member(expert_R, members)
        given_MD = hf.output_rows(view.experts, input_RD[row_M].to(self.dtype), expert_M).float()
        return input_RD.new_zeros(input_RD.shape, dtype=torch.float32).index_add_(0, row_M, given_MD * share_M[:, None])


def _by_member(expert_R: Tensor, members: Sequence[Mapping[int, float]]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows sorted by expert as rows sorted by what these were made of: which row, whose, and with what share."""
    ends = torch.bincount(expert_R, minlength=len(members)).cumsum(0).tolist()
    places = sorted((old, new, share) for new, each in enumerate(members) for old, share in each.items())
    rows = [torch.arange(ends[new - 1] if new else 0, ends[new]) for _, new, _ in places]
    count_P = torch.tensor([len(each) for each in rows])
    old_P, share_P = torch.tensor([old for old, _, _ in places]), torch.tensor([share for _, _, share in places])
    found = (torch.cat(rows), old_P.repeat_interleave(count_P), share_P.repeat_interleave(count_P))
    row_M, expert_M, share_M = (each.to(expert_R.device) for each in found)
    return row_M, expert_M, share_M
