"""Packed matrices that are trained: their scales, or their codes as well, packed again in the same format afterwards.

O outputs, I inputs, G groups of inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint as recomputed
from transformers import PreTrainedModel

from moe_compress.checkpoints.folder import read_manifest
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
# What `quantize` stores as whole codes with scales of their own, in words of recipes.
TRAINABLE = "format=packed, compressed-tensors or gptq"
# Of codes, and of scales and numbers behind codes, in memory.
CODE_BYTES, FLOAT_BYTES = 1, 4


class TrainedMatrix(nn.Module):
    """A matrix of few bits whose scales learn, and whose codes do where `latent` is there: rounded straight through.

    Codes follow the numbers behind them, weight / scale, in whole steps; gradients of these numbers pass the rounding
    as if it were not there, and stop where it is clipped (as in LSQ, arXiv 1902.08153). Those of scales are what they
    are while no code changes: where training begins on the codes, LSQ's would be zero.

    On the way back it is made anew, so that between steps there is nothing of it but codes, scales and latent.
    pruned: codes that were zero stay so.
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
        self.pruned = is_pruned(codes_OI)

    def _rounded(self, scale_OG: Tensor) -> Tensor:
        """Codes [O, I] in fp32 under these scales, through which gradients go to what is behind them."""
        if self.latent is None:
            return self.codes.float()
        half = 2 ** (self.bits - 1)
        scale_OI = scale_OG.detach().repeat_interleave(self.in_features // scale_OG.shape[1], 1)
        real_OI = (self.latent / scale_OI).clamp(-half, half - 1)
        rounded_OI = real_OI + (real_OI.round() - real_OI).detach()
        return rounded_OI * (self.codes != 0) if self.pruned else rounded_OI

    def weight(self) -> Tensor:
        """The numbers that it stands for [O, I], in fp32."""
        scale_OG = away_from_zero(self.scales, self.scales.dtype)
        return dequantized(self._rounded(scale_OG), scale_OG)

    def _product(self, x_RI: Tensor) -> Tensor:
        return linear(x_RI, self.weight().to(x_RI.dtype), self.bias)

    def forward(self, x_RI: Tensor) -> Tensor:
        """The product with rows of inputs."""
        if not torch.is_grad_enabled():
            return self._product(x_RI)
        product: Tensor = recomputed(self._product, x_RI, use_reentrant=False, preserve_rng_state=False)
        return product

    @torch.no_grad()
    def coded(self, dtype: torch.dtype) -> CodedMatrix:
        """Its codes, and scales in the dtype that they are stored in. ValueError for NaN and infinity."""
        scale_OG = away_from_zero(self.scales.detach(), dtype)
        stored_OG = scale_OG.to(dtype)
        if not bool((stored_OG if dtype.itemsize > 1 else stored_OG.float()).isfinite().all()):
            raise ValueError("trained scales would hold NaN or infinity: nothing is written. A lower lr= helps.")
        return CodedMatrix(self._rounded(scale_OG).round().to(torch.int8), stored_OG, self.bits)


def away_from_zero(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales of at least the smallest normal number of a dtype, each with its sign; gradients pass as if unchanged."""
    held = scale.detach()
    return scale + (held.abs().clamp_min(torch.finfo(dtype).smallest_normal).copysign(held) - held)


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
    # Names alone: what is replaced is to be given up one after the other.
    packed = [name for name, each in model.named_modules() if isinstance(each, PackedMatrix)]
    if not packed:
        raise ValueError(
            f"train={','.join(sorted(parts))}: no matrix of this model is held in whole codes with scales of their "
            f"own: put it behind `quantize` with {TRAINABLE}."
        )
    for name in packed:
        outer, _, leaf = name.rpartition(".")
        matrix = model.get_submodule(name)
        assert isinstance(matrix, PackedMatrix)
        if matrix.groups > 1:
            raise ValueError(
                f"train={','.join(sorted(parts))}: groups of outputs of {name} have rows of their own, which is not "
                "trained in codes: quantize other parts (where=), or train routers."
            )
        trained = TrainedMatrix(matrix, with_codes=CODES in parts)
        setattr(model.get_submodule(outer), leaf, trained)
        if SCALES in parts:
            found[f"{name}.{SCALES}"] = trained.scales
        if trained.latent is not None:
            found[f"{name}.{LATENT}"] = trained.latent
    return found


def pruned_kinds(folder: Path) -> frozenset[str]:
    """Parts of a layer of which stages before pruned single weights, as a checkpoint and those it was made of say.

    As far as these are folders that are still there.
    """
    found, seen = set[str](), set[Path]()
    while folder not in seen and (manifest := read_manifest(folder)) is not None:
        for report in manifest["report"]:
            found |= {kind for kind, share in report.get("sparsity", {}).items() if share}
        seen.add(folder)
        folder = Path(manifest["base"]["model"])
    return frozenset(found)


@dataclass(frozen=True, slots=True)
class CodedNumbers:
    """Of a checkpoint's packed matrices: how many codes and scales, and the bytes of these as they are loaded."""

    codes: int
    scales: int
    packed_bytes: int

    def trained(self, parts: frozenset[str]) -> int:
        """How many numbers `release` would let be trained."""
        return (CODES in parts) * self.codes + (SCALES in parts) * self.scales

    def bytes(self, parts: frozenset[str]) -> int:
        """What they take once they are released."""
        return (CODE_BYTES + FLOAT_BYTES * (CODES in parts)) * self.codes + FLOAT_BYTES * self.scales


def coded_numbers(source: Checkpoint, dtype: torch.dtype) -> CodedNumbers:
    """The packed matrices of a checkpoint that is loaded in a dtype, in modules or as its config says."""
    matrices = [each for each in source.skeleton(dtype).modules() if isinstance(each, PackedMatrix)]
    sizes = [(each.weight_like.numel(), each.scales.numel(), each.words.nbytes) for each in matrices]
    sizes += [packed_size(source.tensors[key]) for key in source.packed]
    codes, scales, words = (sum(each) for each in zip(*sizes, strict=True)) if sizes else (0, 0, 0)
    return CodedNumbers(codes, scales, words + dtype.itemsize * scales)


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
