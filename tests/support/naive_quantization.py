"""Weight quantization computed the slow way: float64, one matrix, one group and one column at a time.

Nothing here uses the package. A matrix is [O, I], outputs by inputs, as in y = W x; its inputs are cut into groups of
`group` consecutive ones, and every (output, group) has one scale. Integers are signed and symmetric: b bits hold the
codes -2^(b-1) .. 2^(b-1) - 1, and a weight comes back as code * scale. A Gram matrix is X'X of the inputs. Letters
behind a name are its dimensions: O outputs, I inputs, G the inputs of one group, T tokens, D features.

Rounding to nearest takes each weight by itself; GPTQ (arXiv 2210.17323) goes from column to column and lets the later
ones make up for what rounding did (OBS); AWQ (arXiv 2306.00978) multiplies the inputs that matter before rounding.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Clip = Literal["max", "mse"]
SHRINK = [1 - 0.02 * n for n in range(41)]
WORD = 32


def limits(bits: int) -> tuple[int, int]:
    """The lowest and the highest code."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def codes_of(weight_OG: Tensor, scale_O: Tensor, bits: int) -> Tensor:
    """The nearest codes (half to even), int64."""
    low, high = limits(bits)
    return torch.round(weight_OG.double() / scale_O.unsqueeze(1)).clamp(low, high).to(torch.int64)


def scale_of(
    weight_OG: Tensor, bits: int, dtype: torch.dtype, clip: Clip, importance_G: Tensor | None = None
) -> Tensor:
    """The scale of each output in one group, [O]: what `dtype` holds of it, as float64.

    "max" reaches the largest weight; "mse" takes the share of that scale with the least weighted squared error, the
    largest share where several are equally good.
    """
    weight = weight_OG.double()
    largest = weight.abs().amax(1)
    full = torch.where(largest == 0, 1.0, largest / (2 ** (bits - 1) - 0.5))
    if clip == "max":
        return full.to(dtype).double()
    importance = torch.ones(weight.shape[1]) if importance_G is None else importance_G
    best = torch.full_like(full, torch.inf)
    chosen = full.to(dtype).double()
    for share in SHRINK:
        scale = (full * share).to(dtype).double()
        off = codes_of(weight, scale, bits) * scale.unsqueeze(1) - weight
        error = (importance.double() * off**2).sum(1)
        better = error < best
        best = torch.where(better, error, best)
        chosen = torch.where(better, scale, chosen)
    return chosen


def dequantized(codes_OI: Tensor, scale: Tensor) -> Tensor:
    """The weights that codes and scales stand for, float64; scale: [O, I / group]."""
    group = codes_OI.shape[1] // scale.shape[1]
    columns = [codes_OI[:, i] * scale[:, i // group] for i in range(codes_OI.shape[1])]
    return torch.stack(columns, 1).double()


def rtn(
    weight_OI: Tensor,
    bits: int,
    group: int,
    dtype: torch.dtype,
    clip: Clip = "mse",
    importance_I: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Rounding to nearest: the codes [O, I], int64, and the scales [O, I / group], float64."""
    codes, scales = [], []
    for start in range(0, weight_OI.shape[1], group):
        part = weight_OI[:, start : start + group]
        importance = None if importance_I is None else importance_I[start : start + group]
        scale = scale_of(part, bits, dtype, clip, importance)
        codes.append(codes_of(part, scale, bits))
        scales.append(scale)
    return torch.cat(codes, 1), torch.stack(scales, 1)


def gptq(
    weight_OI: Tensor,
    gram_II: Tensor,
    bits: int,
    group: int,
    dtype: torch.dtype,
    clip: Clip = "mse",
    act_order: bool = False,
    damping: float = 0.01,
) -> tuple[Tensor, Tensor]:
    """The codes [O, I], int64, and the scales [O, I / group], float64, both in the order of the given columns.

    The inverse of what is left of the Hessian is brought up to date after every column by one step of elimination.
    Weights that are 0 at the start stay 0: what the updates made of one is handed on like a rounding error. A group is
    measured when its first column is reached, with all that is in it by then; with `act_order`, columns go by falling
    Gram diagonal, and all groups are measured beforehand.
    """
    w, hessian = weight_OI.double().clone(), gram_II.double().clone()
    kept = weight_OI != 0
    count = w.shape[1]
    importance = hessian.diagonal().clone()
    live = [float(number) for number in importance if number != 0]
    for i in range(count):
        if hessian[i, i] == 0:
            hessian[i, i] = sum(live) / len(live) if live else 1
    order = torch.argsort(importance, descending=True, stable=True) if act_order else torch.arange(count)
    inverse = torch.linalg.inv(hessian + damping * hessian.diagonal().mean() * torch.eye(count, dtype=torch.float64))

    codes = torch.zeros(w.shape, dtype=torch.int64)
    scales = rtn(w, bits, group, dtype, clip, importance)[1]
    for step, i in enumerate(order.tolist()):
        if not act_order and i % group == 0:
            members = slice(i, i + group)
            scales[:, i // group] = scale_of(w[:, members], bits, dtype, clip, importance[members])
        scale = scales[:, i // group]
        codes[:, i] = torch.where(kept[:, i], codes_of(w[:, [i]], scale, bits)[:, 0], 0)
        error = (w[:, i] - codes[:, i] * scale) / inverse[i, i]
        later = order[step + 1 :]
        w[:, later] -= torch.outer(error, inverse[i, later])
        inverse[later.unsqueeze(1), later] -= torch.outer(inverse[later, i], inverse[i, later]) / inverse[i, i]
    return codes, scales


def output_error(weight_OI: Tensor, other_OI: Tensor, gram_II: Tensor) -> float:
    """What differs in the outputs of two matrices, squared and summed over the tokens of the Gram matrix."""
    off = other_OI.double() - weight_OI.double()
    return float(torch.trace(off @ gram_II.double() @ off.T))


def awq_scale(
    weights: list[Tensor],
    grams: list[Tensor],
    pooled_diag_I: Tensor,
    bits: int,
    group: int,
    dtype: torch.dtype,
    steps: int = 20,
    pow2: bool = False,
) -> Tensor:
    """What to multiply the columns of all the matrices with (and divide their inputs by), [I].

    It is a power of how large the inputs are, the one with the least error in the outputs; the lowest where several
    are equally good. `pow2` rounds it to powers of two.
    """
    size = pooled_diag_I.double().sqrt()
    size = torch.maximum(size, 1e-4 * size.max())
    best, chosen = torch.inf, torch.ones_like(size)
    for n in range(steps):
        s = size ** (n / steps)
        s = s / (s.max() * s.min()).sqrt()
        if pow2:
            s = 2 ** torch.round(torch.log2(s))
        error = 0.0
        for weight, gram in zip(weights, grams, strict=True):
            rounded = dequantized(*rtn(weight.double() * s, bits, group, dtype, "max"))
            error += output_error(weight, rounded / s, gram)
        if error < best:
            best, chosen = error, s
    return chosen


def pack(codes_OI: Tensor, bits: int) -> Tensor:
    """The codes of each output as one string of bits, lowest first, cut into words: int32 [O, ceil(I * bits / 32)]."""
    packed = []
    for row in codes_OI.tolist():
        shifted = [code + 2 ** (bits - 1) for code in row]
        string = [code >> n & 1 for code in shifted for n in range(bits)]
        words = [sum(bit << n for n, bit in enumerate(string[at : at + WORD])) for at in range(0, len(string), WORD)]
        packed.append([word - 2**WORD if word >= 2 ** (WORD - 1) else word for word in words])
    return torch.tensor(packed, dtype=torch.int32)


def unpack(words: Tensor, bits: int, inputs: int) -> Tensor:
    """The codes that were packed, int64 [O, inputs]."""
    codes = []
    for row in words.tolist():
        string = [word >> n & 1 for word in row for n in range(WORD)]
        values = [sum(string[i * bits + n] << n for n in range(bits)) for i in range(inputs)]
        codes.append([value - 2 ** (bits - 1) for value in values])
    return torch.tensor(codes, dtype=torch.int64)
