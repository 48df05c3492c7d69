"""Pruning against plain implementations of the same thing, as ratios measured in this one run.

The plain SparseGPT follows the paper: one matrix after the other, one column after the other, statistics of its own for
every matrix. Each time is the least of several, the two sides alternating.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from engine_speed import fastest, text
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

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
from moe_compress.utils.files import atomic_write, gigabytes

CPU = torch.device("cpu")
RESULTS = Path(__file__).resolve().parents[2] / "results"
BLOCK = 128
TOKENS = 4096
# experts, outputs of gate and up, inputs of gate and up.
SHAPES = {"16 experts of (128, 128)": (16, 128, 128), "8 experts of (512, 1024)": (8, 1024, 512)}


def sample(experts: int, inner: int, width: int) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Weights of gate, up and down, and for every expert what it sees and what its down projection sees."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(experts, inner, width, generator=generator) * width**-0.5 for _ in range(2)]
    weights.append(torch.randn(experts, width, inner, generator=generator) * inner**-0.5)
    rows = 2 * TOKENS // experts
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


def solver(experts: int, inner: int, width: int) -> dict[str, Any]:
    """All matrices of one layer's experts, statistics included."""
    both, down, seen, inside = sample(experts, inner, width)
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

    seconds = fastest({"plain": plain, "ours": ours}, 3)
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


def wanda() -> dict[str, float]:
    """Statistics and masks of one layer of 8 experts (512, 1024), against the forward pass alone."""
    config = MixtralConfig(
        vocab_size=256, hidden_size=512, intermediate_size=1024, num_hidden_layers=1, num_attention_heads=8,
        num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval().requires_grad_(False)
    layers, windows, family = ResidentLayers(model), text(4 * TOKENS), family_of(config)

    def pruned() -> None:
        observer = InputMomentCollector(family, ["experts"], "input_squares", None)
        forward_layers(layers, windows, [observer])
        for source, found in observer.found.items():
            stacks = [m.weight_BOI for m in layer_matrices(hf.decoder_layers(model)[0], family) if m.source == source]
            names = [f"expert {e}" for e in range(8)]
            prune(MatrixGroup(names, stacks, found.mean(0.0, found.count_B < 1, True)), method="wanda")

    return fastest({"forward": lambda: forward_layers(layers, windows), "pruned": pruned}, 3)


def peak(at_once: int) -> dict[str, int]:
    """In a fresh process: bytes above the layer itself while its 64 experts are observed and solved in parts."""
    config = MixtralConfig(
        vocab_size=256, hidden_size=512, intermediate_size=1024, num_hidden_layers=1, num_attention_heads=8,
        num_key_value_heads=8, num_local_experts=64, num_experts_per_tok=4,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval().requires_grad_(False)
    layers, windows, family = ResidentLayers(model), text(TOKENS), family_of(config)
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


def fresh(at_once: int) -> int:
    """`peak` in a process of its own."""
    command = [sys.executable, __file__, "--peak", str(at_once)]
    return int(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["bytes"])


def main() -> None:
    """Measure, print the ratios, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "pruning.json")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peak:
        print(json.dumps(peak(given.peak)))
        return
    figures: dict[str, Any] = {}
    for (name, shape), least in zip(SHAPES.items(), (5, 2.5), strict=True):
        found = figures[name] = solver(*shape)
        print(
            f"SparseGPT, {name}, {TOKENS} tokens: {found['plain'] / found['ours']:.1f} x as fast as column by column "
            f"and expert by expert (at least {least}); masks agree in {found['same_masks']:.2%} of the weights, error "
            f"{found['error_ratio']:.4f} of the plain one's"
        )
    pair = figures["wanda"] = wanda()
    print(f"Wanda: {pair['pruned'] / pair['forward']:.2f} x a plain forward pass over the same tokens (at most 1.3)")
    peaks = figures["peak"] = {str(n): fresh(n) for n in (64, 16, 4)}
    shown = ", ".join(f"{gigabytes(count)} with experts_at_once={n}" for n, count in peaks.items())
    print(f"peak memory above a layer of 64 experts: {shown}")
    atomic_write(given.out, (json.dumps(figures, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
