"""GPTQ against a plain column-by-column implementation, and packed experts against dense ones, as ratios of this run.

The plain GPTQ follows the paper: one matrix after the other, one column after the other, statistics of its own for
every matrix, weights as they are stored. Each time is the least of several, the two sides alternating.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import MixtralConfig, MixtralForCausalLM

import moe_compress
import pruning_speed
from common import RESULTS, add_smoke, fastest, save_figures
from moe_compress import zoo
from moe_compress.checkpoints.reader import open_checkpoint
from moe_compress.evaluation.speed.benchmark import Setting, compare_speed
from moe_compress.evaluation.speed.paired_timing import TimingBudget
from moe_compress.methods.quantization.gptq import gptq
from moe_compress.methods.quantization.grid import Clip, rtn
from moe_compress.methods.quantization.numbers import Integers
from moe_compress.models.modeling.activation_rounding import round_inputs
from moe_compress.models.modeling.bit_packing import dequantized
from moe_compress.models.modeling.expert_forward import experts_forward, separate
from moe_compress.models.modeling.packed_linear import PackedMatrix
from moe_compress.models.moe import moe_views
from moe_compress.utils.files import gigabytes
from pruning_speed import SHAPES, moments, sample

BLOCK, BITS, GROUP = 128, 4, 128
SETTING = Setting(prompts=(64,), batches=(1,), tokens=16, effort=TimingBudget(20, 0.0), dtype="bfloat16")
ROWS = (1, 32, 512)
QUANTIZED = (
    "bits=8 group_size=0",
    "bits=4 group_size=32",
    "bits=3 group_size=32",
    "bits=2 group_size=32",
    "bits=8 group_size=0 format=packed + activations",
)


@dataclass(frozen=True)
class Size:
    """The solver's shapes and tokens; widths and layers of models; rounds of timing; what is timed of whole models.

    models: how many of the shipped ones; recipes: in how many ways each is quantized.
    """

    solver: pruning_speed.Size
    width: int = 2048
    inner: int = 1024
    layers: int = 16
    calls: int = 20
    rounds: int = 10
    setting: Setting = SETTING
    models: int = 2
    recipes: int = len(QUANTIZED)


# Groups of 128 inputs need that many.
SMOKE = Size(
    pruning_speed.Size(64, 1, 1, rounds=1), 128, 128, 1, 1, 1,
    Setting(prompts=(8,), batches=(1,), tokens=2, effort=TimingBudget(2, 0.0), starts=1, dtype="bfloat16"), 1, 1,
)  # fmt: skip


# --- the plain side -----------------------------------------------------------------------------------------


def plain_scale(weight_OG: Tensor, importance_G: Tensor, clip: Clip) -> Tensor:
    """The scale of one group of every row: the full range, or the best of 41 shrunken ones."""
    best_O = weight_OG.abs().amax(1) / 7.5
    full_O, least_O = best_O.clone(), torch.full_like(best_O, torch.inf)
    for n in range(41 if clip == "mse" else 0):
        scale_O1 = (full_O * (1 - 0.02 * n)).unsqueeze(1)
        error_O = (((weight_OG / scale_O1).round().clamp(-8, 7) * scale_O1 - weight_OG).square() * importance_G).sum(1)
        best_O = torch.where(error_O < least_O, scale_O1[:, 0], best_O)
        least_O = torch.minimum(error_O, least_O)
    return best_O


def plain_gptq(weight_OI: Tensor, x_RI: Tensor, clip: Clip) -> tuple[Tensor, Tensor]:
    """Codes and scales of one matrix, as in the paper: blocks of columns, the inverse factorised again."""
    weight_OI, inputs = weight_OI.clone(), weight_OI.shape[1]
    gram_II = torch.zeros(inputs, inputs)
    for part_rI in x_RI.split(1024):
        gram_II += part_rI.T @ part_rI
    gram_II /= len(x_RI)
    diagonal_I = gram_II.diagonal().clone()
    gram_II.diagonal().add_(0.01 * diagonal_I.mean())
    inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(gram_II))
    factor_II = torch.linalg.cholesky(inverse_II, upper=True)
    codes_OI = torch.empty_like(weight_OI, dtype=torch.int8)
    scale_OG = weight_OI.new_empty(len(weight_OI), inputs // GROUP)
    for start in range(0, inputs, BLOCK):
        stop = start + BLOCK
        part_OB, here_BB = weight_OI[:, start:stop].clone(), factor_II[start:stop, start:stop]
        error_OB = torch.zeros_like(part_OB)
        scale_O = plain_scale(part_OB, diagonal_I[start:stop], clip)
        scale_OG[:, start // GROUP] = scale_O
        for i in range(BLOCK):
            column_O = part_OB[:, i]
            code_O = (column_O / scale_O).round().clamp(-8, 7)
            codes_OI[:, start + i] = code_O.to(torch.int8)
            error_OB[:, i] = (column_O - code_O * scale_O) / here_BB[i, i]
            part_OB[:, i:] -= error_OB[:, i : i + 1] @ here_BB[i : i + 1, i:]
        weight_OI[:, stop:] -= error_OB @ factor_II[start:stop, stop:]
    return codes_OI, scale_OG


# --- what is measured ---------------------------------------------------------------------------------------


def plain_stack(weight_BOI: Tensor, rows: Sequence[Tensor], clip: Clip) -> tuple[Tensor, Tensor]:
    """Codes and scales of one matrix of every expert."""
    solved = [plain_gptq(weight_OI, x_RI, clip) for weight_OI, x_RI in zip(weight_BOI, rows, strict=True)]
    return torch.stack([codes_OI for codes_OI, _ in solved]), torch.stack([scale_OG for _, scale_OG in solved])


def solver(name: str, clip: Clip, size: pruning_speed.Size) -> dict[str, Any]:
    """All matrices of one layer's experts, statistics included."""
    experts, inner, width = size.shape(name)
    both, down, seen, inside = sample(experts, inner, width, size.tokens)
    names = [f"expert {e}" for e in range(experts)]
    work = ((both, seen), (down, inside))
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def plain() -> None:
        found["plain"] = [plain_stack(w, rows, clip) for weights, rows in work for w in weights]

    def ours() -> None:
        found["ours"] = [
            pair[:2]
            for weights, rows in work
            for pair in gptq(weights, moments(rows), Integers(BITS), GROUP, torch.float32, names, clip=clip)[0]
        ]

    seconds = fastest({"plain": plain, "ours": ours}, size.rounds)
    pairs = list(zip(found["plain"], found["ours"], strict=True))
    same = min(float((a[0] == b[0]).float().mean()) for a, b in pairs)
    whole, inputs = [*both, *down], [seen, seen, inside]
    errors = {
        side: sum(_error(w, dequantized(*new), rows) for w, new, rows in zip(whole, matrices, inputs, strict=True))
        for side, matrices in found.items()
    }
    return {**seconds, "same_codes": same, "error_ratio": errors["ours"] / errors["plain"]}


def _error(weight_BOI: Tensor, new_BOI: Tensor, rows: list[Tensor]) -> float:
    """Summed squared change of the outputs."""
    return sum(float(((new_BOI[e] - weight_BOI[e]) @ x_RI.T).double().square().sum()) for e, x_RI in enumerate(rows))


def config(layers: int, size: Size) -> MixtralConfig:
    """Experts of real proportions: hidden 2048, intermediate 1024."""
    return MixtralConfig(
        vocab_size=256, hidden_size=size.width, intermediate_size=size.inner, num_hidden_layers=layers,
        num_attention_heads=16, num_key_value_heads=4, num_local_experts=8, num_experts_per_tok=2,
        max_position_embeddings=256,
    )  # fmt: skip


@torch.inference_mode()
def products(size: Size) -> dict[str, float]:
    """Seconds of the experts of one token: dense in bf16 and fp32 as stock transformers runs them, packed in 4 bits."""
    token_TD, index_TK = torch.randn(1, size.width), torch.tensor([[2, 5]])
    gate_TK = torch.tensor([[0.6, 0.4]])
    runs: dict[str, Callable[[], object]] = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32), ("packed", torch.bfloat16)):
        model: Any = MixtralForCausalLM(config(1, size))
        (view,) = moe_views(model.to(dtype).eval()).values()
        if name == "packed":
            pack_experts(view.block, view.experts)
        arguments = token_TD.to(dtype), index_TK, gate_TK.to(dtype)
        forward = view.experts.forward if name != "packed" else lambda *x, m=view.experts: experts_forward(m, *x)

        def run(forward: Any = forward, arguments: Any = arguments) -> None:
            for _ in range(size.calls):
                forward(*arguments)

        runs[name] = run
    return {name: seconds / size.calls for name, seconds in fastest(runs, min(size.rounds, 5)).items()}


def pack_experts(block: Any, experts: Any) -> None:
    """Round all experts of a module to 4 bits and hold them packed."""
    separate(block, experts)
    for expert in experts.separate:
        for name, matrix in expert.items():
            codes, scale = rtn(matrix.weight[None], BITS, GROUP, torch.bfloat16, "max")
            expert[name] = PackedMatrix.of(codes[0], scale[0], BITS)


@torch.inference_mode()
def whole_numbers(size: Size) -> dict[str, dict[str, float]]:
    """Seconds of a product of 1024 x 2048, by rows: in fp32, and of 8-bit codes with rows rounded to 8 bits."""
    weight = torch.randn(size.inner, size.width)
    codes, scale = rtn(weight[None], 8, size.width, torch.float32, "max")
    matrix = PackedMatrix.of(codes[0], scale[0], 8)
    round_inputs(matrix)
    found = {}
    for rows in ROWS:
        x = torch.randn(rows, size.width)
        runs = {"fp32": functools.partial(linear, x, weight), "w8a8": functools.partial(matrix, x)}
        found[str(rows)] = fastest(runs, size.rounds)
    return found


def one_point(found: dict[str, Any]) -> dict[str, Any]:
    """Decoding speed and the memory of the weights, loaded and at the peak of loading."""
    (point,) = found["points"]
    sides = {
        side: {"weight_bytes": point["memory"][side]["weights"], "peak_bytes": found[side]["load_peak_bytes"]}
        for side in ("original", "variant")
    }
    kept = ("original_seconds", "variant_seconds", "speedup", "speedup_interval")
    times = {key: point["decode"][key] for key in kept}
    return {"setting": found["setting"], **times, **sides}


def loaded(size: Size) -> dict[str, Any]:
    """Memory of experts that are loaded packed, and decoding speed, against the bf16 checkpoint."""
    with tempfile.TemporaryDirectory() as place:
        whole, small = Path(place) / "whole", Path(place) / "small"
        torch.manual_seed(0)
        MixtralForCausalLM(config(size.layers, size)).bfloat16().save_pretrained(whole)
        moe_compress.compress(
            "quantize method=rtn bits=4 group_size=128 clip=max", model=str(whole), out=str(small), eval=False,
            results=place,
        )  # fmt: skip
        found = one_point(compare_speed(whole, small, size.setting))
    experts = size.layers * 8 * 3 * size.width * size.inner * 2
    outside = found["original"]["weight_bytes"] - experts
    for side in ("original", "variant"):
        for kind in ("weight_bytes", "peak_bytes"):
            found[side][f"experts_{kind}"] = found[side][kind] - outside
    return {**found, "expert_bytes_in_bf16": experts}


def zoo_speed(size: Size) -> dict[str, Any]:
    """The shipped models quantized in several ways, beside their originals: too small for much, but measured."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        for name, sentence in itertools.product(zoo.NAMES[::2][: size.models], QUANTIZED[: size.recipes]):
            out = Path(place) / f"{name}-{len(found)}"
            moe_compress.compress(
                f"quantize method=rtn {sentence}", model=name, out=str(out), eval=False, results=place
            )
            measured = one_point(compare_speed(zoo.path(name), out, size.setting))
            found[f"{name}, {sentence}"] = {**measured, "file_bytes": open_checkpoint(out).bytes}
    return found


def report(size: Size) -> dict[str, Any]:
    """Measure, print the ratios; returns all figures."""
    figures: dict[str, Any] = {}
    clips: tuple[tuple[Clip, str], ...] = (("max", "scales of the full range"), ("mse", "scales searched"))
    for name, least in zip(SHAPES, (5, 2.5), strict=True):
        for clip, what in clips:
            found = figures[f"{name}, {what}"] = solver(name, clip, size.solver)
            print(
                f"GPTQ, {name}, {what}, {size.solver.tokens} tokens: {found['plain'] / found['ours']:.1f} x as fast as "
                f"column by column and expert by expert (at least {least}); {found['same_codes']:.2%} of the codes "
                f"agree, error {found['error_ratio']:.4f} of the plain one's"
            )
    times = figures["experts of one token"] = products(size)
    print(
        f"experts of one token, {size.width} x {size.inner}, 4 bits in groups of 128: "
        f"{times['bf16'] / times['packed']:.1f} x as fast as dense ones in bf16 and "
        f"{times['fp32'] / times['packed']:.1f} x in fp32 (at least 3)"
    )
    for rows, seconds in figures.setdefault("whole numbers", whole_numbers(size)).items():
        print(f"{rows} rows rounded to 8 bits times a matrix of 8 bits: {seconds['fp32'] / seconds['w8a8']:.1f} x fp32")
    memory = figures["loaded"] = loaded(size)
    share = memory["variant"]["experts_weight_bytes"] / memory["expert_bytes_in_bf16"]
    peak = memory["variant"]["experts_peak_bytes"] / memory["expert_bytes_in_bf16"]
    low, high = memory["speedup_interval"]
    print(
        f"a loaded 4-bit checkpoint ({gigabytes(memory['expert_bytes_in_bf16'])} of experts in bf16): experts take "
        f"{share:.2f} x of bf16, {peak:.2f} x at the peak of loading (at most 0.35); decoding "
        f"{memory['speedup']:.2f} [{low:.2f}, {high:.2f}] x as fast"
    )
    for name, each in figures.setdefault("speed", zoo_speed(size)).items():
        print(f"{name}: decoding {each['speedup']:.2f} x as fast")
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the ratios, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "quantization.json")
    add_smoke(parser)
    given = parser.parse_args(arguments)
    size = SMOKE if given.smoke else Size(pruning_speed.Size())
    save_figures(report(size), given.out, given.smoke)


if __name__ == "__main__":
    main()
