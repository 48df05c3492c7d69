"""Pruning against plain implementations of the same thing, as ratios measured in this one run.

The plain SparseGPT follows the paper: one matrix after the other, one column after the other, statistics of its own for
every matrix. Each time is the least of several, the two sides alternating.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from common import RESULTS, add_smoke, fastest, random_windows, save_figures
from moe_compress.calibration.input_moments import InputMomentCollector
from moe_compress.engine.forward import forward_layers
from moe_compress.engine.layers import ResidentLayers
from moe_compress.methods.pruning.prune import prune
from moe_compress.methods.pruning.sparsegpt import sparsegpt
from moe_compress.methods.weight_method import MatrixGroup
from moe_compress.models import hf
from moe_compress.models.families import family_of
from moe_compress.models.matrices import layer_matrices
from moe_compress.utils.devices import peak_memory_bytes, reset_peak_memory
from moe_compress.utils.files import gigabytes

CPU = torch.device("cpu")
BLOCK, VOCAB, LENGTH = 128, 256, 256
TOKENS = 4096
# experts, outputs of gate and up, inputs of gate and up.
SHAPES = {"16 experts of (128, 128)": (16, 128, 128), "8 experts of (512, 1024)": (8, 1024, 512)}


@dataclass(frozen=True)
class Size:
    """Tokens; experts of the solver's shapes and how often they shrink; widths of whole layers; rounds of timing.

    fresh: memory is measured in processes of their own.
    """

    tokens: int = TOKENS
    experts: int = 16
    shrunk: int = 1
    width: int = 512
    inner: int = 1024
    rounds: int = 3
    fresh: bool = True

    def shape(self, name: str) -> tuple[int, int, int]:
        """Of these experts, as many and as large as the size says."""
        experts, inner, width = SHAPES[name]
        return min(experts, self.experts), inner // self.shrunk, width // self.shrunk


SMOKE = Size(LENGTH, 2, 8, 64, 64, 1, fresh=False)


def sample(
    experts: int, inner: int, width: int, tokens: int
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Weights of gate, up and down, and for every expert what it sees and what its down projection sees."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(experts, inner, width, generator=generator) * width**-0.5 for _ in range(2)]
    weights.append(torch.randn(experts, width, inner, generator=generator) * inner**-0.5)
    rows = 2 * tokens // experts
    mix_DD = torch.randn(width, width, generator=generator) * width**-0.5
    seen = [torch.randn(rows, width, generator=generator) @ mix_DD for _ in range(experts)]
    inside = [torch.nn.functional.silu(x @ weights[0][e].T) * (x @ weights[1][e].T) for e, x in enumerate(seen)]
    return weights[:2], [weights[2]], seen, inside


# --- the plain side -----------------------------------------------------------------------------------------


def plain_sparsegpt(weight_OI: Tensor, x_RI: Tensor, sparsity: float) -> Tensor:
    """One matrix, pruned as in the paper."""
    weight_OI = weight_OI.clone()
    gram_II = torch.zeros(x_RI.shape[1], x_RI.shape[1])
    for part_rI in x_RI.split(1024):
        gram_II += part_rI.T @ part_rI
    gram_II /= len(x_RI)
    dead_I = gram_II.diagonal() == 0
    gram_II[dead_I, dead_I] = 1
    weight_OI[:, dead_I] = 0
    gram_II.diagonal().add_(0.01 * gram_II.diagonal().mean())
    inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(gram_II))
    factor_II = torch.linalg.cholesky(inverse_II, upper=True)
    for start in range(0, len(gram_II), BLOCK):
        stop = min(start + BLOCK, len(gram_II))
        part_OB, here_BB = weight_OI[:, start:stop].clone(), factor_II[start:stop, start:stop]
        score_OB = part_OB.square() / here_BB.diagonal().square()
        limit = score_OB.flatten().sort().values[int(score_OB.numel() * sparsity)]
        gone_OB, error_OB = score_OB < limit, torch.zeros_like(part_OB)
        for i in range(stop - start):
            column_O, diagonal = part_OB[:, i], here_BB[i, i]
            left_O = column_O.masked_fill(gone_OB[:, i], 0)
            error_OB[:, i] = (column_O - left_O) / diagonal
            part_OB[:, i:] -= error_OB[:, i : i + 1] @ here_BB[i : i + 1, i:]
            part_OB[:, i] = left_O
        weight_OI[:, start:stop] = part_OB
        weight_OI[:, stop:] -= error_OB @ factor_II[start:stop, stop:]
    return weight_OI


# --- what is measured ---------------------------------------------------------------------------------------


def moments(rows: list[Tensor]) -> Tensor:
    """Mean outer products of each expert's rows."""
    return torch.stack([x_RI.T @ x_RI / len(x_RI) for x_RI in rows])


def solver(experts: int, inner: int, width: int, size: Size) -> dict[str, Any]:
    """All matrices of one layer's experts, statistics included."""
    both, down, seen, inside = sample(experts, inner, width, size.tokens)
    sparsity_B = torch.full((experts,), 0.5)
    names = [f"expert {e}" for e in range(experts)]
    found: dict[str, list[Tensor]] = {}

    def plain() -> None:
        found["plain"] = [
            torch.stack([plain_sparsegpt(weight_BOI[e], rows[e], 0.5) for e in range(experts)])
            for weights, rows in ((both, seen), (down, inside))
            for weight_BOI in weights
        ]

    def ours() -> None:
        found["ours"] = [
            new_BOI
            for weights, rows in ((both, seen), (down, inside))
            for new_BOI in sparsegpt(weights, moments(rows), sparsity_B, None, names)[0]
        ]

    seconds = fastest({"plain": plain, "ours": ours}, size.rounds)
    pairs = list(zip(found["plain"], found["ours"], strict=True))
    same = [float(((a == 0) == (b == 0)).float().mean()) for a, b in pairs]
    whole, inputs = [*both, *down], [seen, seen, inside]
    errors = {
        side: sum(_error(w, new, rows) for w, new, rows in zip(whole, matrices, inputs, strict=True))
        for side, matrices in found.items()
    }
    return {**seconds, "same_masks": min(same), "error_ratio": errors["ours"] / errors["plain"]}


def _error(weight_BOI: Tensor, new_BOI: Tensor, rows: list[Tensor]) -> float:
    """Summed squared change of the outputs."""
    return sum(float(((new_BOI[e] - weight_BOI[e]) @ x_RI.T).double().square().sum()) for e, x_RI in enumerate(rows))


def layer(experts: int, top_k: int, size: Size) -> MixtralForCausalLM:
    """A random Mixtral of one layer."""
    config = MixtralConfig(
        vocab_size=VOCAB, hidden_size=size.width, intermediate_size=size.inner, num_hidden_layers=1,
        num_attention_heads=8, num_key_value_heads=8, num_local_experts=experts, num_experts_per_tok=top_k,
    )  # fmt: skip
    return MixtralForCausalLM(config).eval().requires_grad_(False)


def wanda(size: Size) -> dict[str, float]:
    """Statistics and masks of one layer of 8 experts (512, 1024), against the forward pass alone."""
    model = layer(8, 2, size)
    layers, family = ResidentLayers(model), family_of(model.config)
    windows = random_windows(VOCAB, 4 * size.tokens // LENGTH, LENGTH)

    def pruned() -> None:
        observer = InputMomentCollector(family, ["experts"], "input_squares", None)
        forward_layers(layers, windows, [observer])
        for source, found in observer.found.items():
            stacks = [m.weight_BOI for m in layer_matrices(hf.decoder_layers(model)[0], family) if m.source == source]
            names = [f"expert {e}" for e in range(8)]
            prune(MatrixGroup(names, stacks, found.mean(0.0, found.count_B < 1, True)), method="wanda")

    return fastest({"forward": lambda: forward_layers(layers, windows), "pruned": pruned}, size.rounds)


def peak(at_once: int, size: Size) -> dict[str, int]:
    """Bytes above the layer itself while its 64 experts are observed and solved in parts."""
    model = layer(64, 4, size)
    layers, family = ResidentLayers(model), family_of(model.config)
    windows = random_windows(VOCAB, size.tokens // LENGTH, LENGTH)
    forward_layers(layers, windows)
    reset_peak_memory(CPU)
    before = peak_memory_bytes(CPU)
    for start in range(0, 64, at_once):
        experts = range(start, min(start + at_once, 64))
        observer = InputMomentCollector(family, ["experts"], "input_grams", experts)
        forward_layers(layers, windows, [observer])
        for source in list(observer.found):
            found = observer.found.pop(source)
            stacks = [m.weight_BOI for m in layer_matrices(hf.decoder_layers(model)[0], family) if m.source == source]
            names = [f"expert {e}" for e in experts]
            moment = found.mean(0.0, found.count_B < 1, True)
            prune(MatrixGroup(names, [w[experts.start : experts.stop] for w in stacks], moment), method="sparsegpt")
    return {"bytes": peak_memory_bytes(CPU) - before}


def measured(at_once: int, size: Size) -> int:
    """`peak`, in a process of its own if the size says so."""
    if not size.fresh:
        return peak(at_once, size)["bytes"]
    command = [sys.executable, __file__, "--peak", str(at_once)]
    return int(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["bytes"])


def report(size: Size) -> dict[str, Any]:
    """Measure, print the ratios; returns all figures."""
    figures: dict[str, Any] = {}
    for name, least in zip(SHAPES, (5, 2.5), strict=True):
        found = figures[name] = solver(*size.shape(name), size)
        print(
            f"SparseGPT, {name}, {size.tokens} tokens: {found['plain'] / found['ours']:.1f} x as fast as column by "
            f"column and expert by expert (at least {least}); masks agree in {found['same_masks']:.2%} of the weights, "
            f"error {found['error_ratio']:.4f} of the plain one's"
        )
    pair = figures["wanda"] = wanda(size)
    print(f"Wanda: {pair['pruned'] / pair['forward']:.2f} x a plain forward pass over the same tokens (at most 1.3)")
    peaks = figures["peak"] = {str(n): measured(n, size) for n in (64, 16, 4)}
    shown = ", ".join(f"{gigabytes(count)} with experts_at_once={n}" for n, count in peaks.items())
    print(f"peak memory above a layer of 64 experts: {shown}")
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the ratios, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "pruning.json")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    add_smoke(parser)
    given = parser.parse_args(arguments)
    size = SMOKE if given.smoke else Size()
    if given.peak:
        print(json.dumps(peak(given.peak, size)))
        return
    save_figures(report(size), given.out, given.smoke)


if __name__ == "__main__":
    main()
