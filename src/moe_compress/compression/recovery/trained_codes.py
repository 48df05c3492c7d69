"""Packed matrices that are trained: their scales, or their codes as well, packed again in the same format afterwards.

O outputs, I inputs, G groups of inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from moe_compress.checkpoints.formats.edited_packed import matrix_module
from moe_compress.checkpoints.formats.registry import CodedMatrix, format_in
from moe_compress.checkpoints.formats.stored_weight import StoredWeight
from moe_compress.checkpoints.reader import Checkpoint, packed_size
from moe_compress.models import hf
from moe_compress.models.matrices import stored_matrices
from moe_compress.models.modeling.bit_packing import dequantized, pack
from moe_compress.models.modeling.packed_linear import PackedMatrix
from moe_compress.models.sublayers import block_names

CODES, SCALES = "codes", "scales"
# Numbers behind codes that are trained.
LATENT = "latent"
# Of so many inputs in a row, at least half are zero where a pattern such as 2:4 was pruned.
PATTERN = 4


class TrainedMatrix(nn.Module):
    """A matrix of few bits whose scales learn, and whose codes do where `latent` is there: rounded straight through.

    Codes follow the numbers behind them, weight / scale, in whole steps; gradients of these numbers pass the rounding
    as if it were not there, and stop where it is clipped (as in LSQ, arXiv 1902.08153). Those of scales are what they
    are while no code changes: where training begins on the codes, LSQ's would be zero.
    """

    codes: Tensor

    def __init__(self, matrix: PackedMatrix, *, with_codes: bool) -> None:
        super().__init__()
        self.bits, self.in_features, self.out_features = matrix.bits, matrix.in_features, matrix.out_features
        self.bias = matrix.bias
        codes_OI, scale_OG = matrix.codes(), matrix.scales.detach().float()
        self.register_buffer(CODES, codes_OI)
        self.scales = nn.Parameter(scale_OG, requires_grad=False)
        self.latent = nn.Parameter(dequantized(codes_OI, scale_OG), requires_grad=False) if with_codes else None
        self.alive = codes_OI != 0 if is_pruned(codes_OI) else None

    def _rounded(self) -> Tensor:
        """Codes [O, I] in fp32, through which gradients go to what is behind them, and to scales."""
        if self.latent is None:
            return self.codes.float()
        half = 2 ** (self.bits - 1)
        scale_OI = self.scales.repeat_interleave(self.in_features // self.scales.shape[1], 1)
        real_OI = (self.latent / scale_OI.detach()).clamp(-half, half - 1)
        rounded_OI = real_OI + (real_OI.round() - real_OI).detach()
        return rounded_OI if self.alive is None else rounded_OI * self.alive

    def weight(self) -> Tensor:
        """The numbers that it stands for [O, I], in fp32."""
        return dequantized(self._rounded(), self.scales)

    def forward(self, x_RI: Tensor) -> Tensor:
        """The product with rows of inputs."""
        return linear(x_RI, self.weight().to(x_RI.dtype), self.bias)

    @torch.no_grad()
    def coded(self, dtype: torch.dtype) -> CodedMatrix:
        """Its codes, and scales in the dtype that they are stored in. ValueError for NaN and infinity."""
        scale_OG = self.scales.detach().to(dtype)
        if not bool((scale_OG if dtype.itemsize > 1 else scale_OG.float()).isfinite().all()):
            raise ValueError("trained scales would hold NaN or infinity: nothing is written. A lower lr= helps.")
        return CodedMatrix(self._rounded().round().to(torch.int8), scale_OG, self.bits)


def is_pruned(codes_OI: Tensor) -> bool:
    """Whether at least half of every few inputs in a row are zero, as a pattern leaves them and rounding does not."""
    if codes_OI.shape[1] % PATTERN:
        return False
    return bool(((codes_OI == 0).unflatten(1, (-1, PATTERN)).sum(2) >= PATTERN // 2).all())


def release(model: PreTrainedModel, parts: frozenset[str]) -> dict[str, nn.Parameter]:
    """Let a model's packed matrices be trained, in place; the parameters that do, by their full names.

    parts: of train=, `scales`, `codes` or both. ValueError where nothing is held in codes.
    """
    found: dict[str, nn.Parameter] = {}
    packed = [(name, each) for name, each in model.named_modules() if isinstance(each, PackedMatrix)]
    if not packed:
        raise ValueError(
            f"train={','.join(sorted(parts))}: no matrix of this model is held in whole codes with scales of their "
            "own: put it behind `quantize` with format=packed, compressed-tensors, gptq or awq."
        )
    for name, matrix in packed:
        outer, _, leaf = name.rpartition(".")
        trained = TrainedMatrix(matrix, with_codes=CODES in parts)
        setattr(model.get_submodule(outer), leaf, trained)
        if SCALES in parts:
            found[f"{name}.{SCALES}"] = trained.scales
        if trained.latent is not None:
            found[f"{name}.{LATENT}"] = trained.latent
    return found


def coded_numbers(source: Checkpoint, parts: frozenset[str]) -> int:
    """How many numbers of a checkpoint's packed matrices `release` would let be trained."""
    skeleton = source.skeleton(torch.float32)
    matrices = (each for each in skeleton.modules() if isinstance(each, PackedMatrix))
    shapes = [(each.weight_like.numel(), each.scales.numel()) for each in matrices]
    shapes += [packed_size(source.tensors[key])[:2] for key in source.packed]
    return sum(CODES in parts and codes for codes, _ in shapes) + sum(SCALES in parts and each for _, each in shapes)


def packed_again(source: Checkpoint, model: PreTrainedModel) -> dict[str, Tensor | StoredWeight]:
    """What trained matrices are stored as, by the checkpoint's names, in the format that it has."""
    writer = format_in(source.values).writer
    if writer is None or writer.parts is None:
        return _as_modules(model, source.dense_dtype)
    found: dict[str, Tensor | StoredWeight] = {}
    skeleton = source.skeleton(source.stored_dtype)
    names = block_names(skeleton)
    for index, layer in enumerate(hf.decoder_layers(model)):
        for key, (name, number) in stored_matrices(skeleton, index).items():
            entry = source.tensors.get(key)
            matrix = matrix_module(layer, names, name, number) if isinstance(entry, StoredWeight) else None
            if isinstance(matrix, TrainedMatrix):
                with source.read([key]) as tensors:
                    scale_OG = tensors[key].packed()[1]
                found[key] = writer.parts(matrix.coded(scale_OG.dtype))
    return found


def _as_modules(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor | StoredWeight]:
    """The same where codes and scales are tensors of modules of an edited architecture."""
    state: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, TrainedMatrix):
            coded = module.coded(dtype)
            state |= {f"{name}.words": pack(coded.codes_OI, coded.bits), f"{name}.{SCALES}": coded.scale_OG}
    return dict(hf.checkpoint_tensors(model, state))
