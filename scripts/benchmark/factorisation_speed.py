"""Factorisation beside plain ways of doing the same, as ratios measured in this one run.

The plain side is the first founding document's: a mean core and wrappers (I + Uo Vo') C (I + Ui Vi') of every expert,
held as whole matrices in the forward, 1,000 steps of Adam on the plain error. Processor time is of all threads.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import MixtralConfig, MixtralForCausalLM

from common import RESULTS, add_smoke, fastest, random_windows, save_figures
from moe_compress.calibration.input_moments import InputMomentCollector
from moe_compress.compression.weights.layer_grams import SOURCES, GramCollector
from moe_compress.edits.apply import apply_edits
from moe_compress.edits.edits import FactorExperts
from moe_compress.edits.factors import Form, Part
from moe_compress.engine.forward import LayerPass, forward_layers, walk_layers
from moe_compress.engine.layers import ResidentLayers
from moe_compress.evaluation.speed.paired_timing import TimingBudget, paired, summary
from moe_compress.methods.factorisation.sizes import Size as FactorSize
from moe_compress.methods.factorisation.sizes import parameters, size_for
from moe_compress.methods.factorisation.solve import solve
from moe_compress.methods.stage_options import WeightStageOptions
from moe_compress.models.families import family_of
from moe_compress.models.moe import learned_view
from moe_compress.utils.devices import peak_memory_bytes, reset_peak_memory
from moe_compress.utils.files import gigabytes

CPU = torch.device("cpu")
VOCAB, LENGTH = 256, 256
# experts, outputs, inputs, rank of the wrappers.
SHAPES = {"16 experts of (128, 256)": (16, 128, 256, 8), "8 experts of (512, 1024)": (8, 512, 1024, 32)}
KINDS = {"related": 0.5, "unrelated": 0.0}
# Layers, experts, and (outputs, inputs) of gate, up and down of Qwen3-30B-A3B; its wrappers' rank.
QWEN3 = (48, 128, ((768, 2048), (768, 2048), (2048, 768)))
RANK = 64


@dataclass(frozen=True)
class Setting:
    """Steps of Adam; how often shapes shrink, and experts at most; tokens; layers and width of the model that decodes.

    fresh: memory is measured in processes of their own.
    """

    steps: int = 1000
    shrunk: int = 1
    experts: int = 16
    tokens: int = 4096
    width: int = 512
    layers: int = 16
    decoded: int = 32
    rounds: int = 3
    fresh: bool = True


SMOKE = Setting(4, 8, 2, LENGTH, 64, 2, 2, 1, fresh=False)


def sample(experts: int, outputs: int, inputs: int, common: float) -> tuple[Tensor, Tensor]:
    """Experts whose spectra and inputs fall off as powers, `common` of each expert's energy the same for all; Grams."""
    generator = torch.Generator().manual_seed(0)

    def falling(rows: int, columns: int) -> Tensor:
        value = torch.arange(1, min(rows, columns) + 1) ** -0.5
        left, right = (torch.linalg.qr(torch.randn(n, len(value), generator=generator))[0] for n in (rows, columns))
        matrix = left * value @ right.T
        return matrix / matrix.square().mean().sqrt() * columns**-0.5

    shared = falling(outputs, inputs)
    own = torch.stack([falling(outputs, inputs) for _ in range(experts)])
    weight_EOI = common**0.5 * shared + (1 - common) ** 0.5 * own
    rows_ERI = torch.randn(experts, 2 * inputs, inputs, generator=generator) @ falling(inputs, inputs)
    return weight_EOI, rows_ERI.transpose(1, 2) @ rows_ERI


# --- the plain side -----------------------------------------------------------------------------------------


def plain_wrappers(weight_EOI: Tensor, rank: int, steps: int) -> Tensor:
    """The matrices [E, O, I] that a core in wrappers stands for after so many steps of Adam, lr 1e-3."""
    experts, outputs, inputs = weight_EOI.shape
    generator = torch.Generator().manual_seed(0)

    def wrapper(side: int) -> list[Tensor]:
        down = torch.randn(experts, side, rank, generator=generator) * rank**-0.5
        return [torch.zeros(experts, side, rank).requires_grad_(), down.requires_grad_()]

    core_OI = weight_EOI.mean(0).clone().requires_grad_()
    (u_out, v_out), (u_in, v_in) = wrapper(outputs), wrapper(inputs)
    adam = torch.optim.Adam([core_OI, u_out, v_out, u_in, v_in], lr=1e-3)

    def product() -> Tensor:
        return (torch.eye(outputs) + u_out @ v_out.mT) @ core_OI @ (torch.eye(inputs) + u_in @ v_in.mT)

    for _ in range(steps):
        adam.zero_grad()
        (product() - weight_EOI).square().mean().backward()
        adam.step()
    return product().detach()


# --- what is measured ---------------------------------------------------------------------------------------


def error(weight_EOI: Tensor, found_EOI: Tensor, gram_EII: Tensor | None) -> float:
    """Relative squared error in float64, plain or as the inputs see it."""
    change, whole = (found_EOI - weight_EOI).double(), weight_EOI.double()
    if gram_EII is None:
        return float(change.square().sum() / whole.square().sum())
    gram = gram_EII.double()
    return float(((change @ gram) * change).sum() / ((whole @ gram) * whole).sum())


def beside_adam(experts: int, outputs: int, inputs: int, rank: int, common: float, steps: int) -> dict[str, float]:
    """Errors and processor seconds of Adam on wrappers and of base_delta of as many numbers, on the same experts."""
    weight_EOI, gram_EII = sample(experts, outputs, inputs, common)
    size = FactorSize(ranks=[2 * rank] * experts)
    found: dict[str, float] = {}

    def timed(run: Callable[[], Tensor]) -> tuple[float, Tensor]:
        started = time.process_time()
        result = run()
        return time.process_time() - started, result

    found["adam_seconds"], plain = timed(lambda: plain_wrappers(weight_EOI, rank, steps))
    for name, gram in (("plain", None), ("whitened", gram_EII)):
        found[f"adam_{name}"] = error(weight_EOI, plain, gram)
        seconds, ours = timed(functools.partial(in_closed_form, weight_EOI, gram, size))
        found |= {f"seconds_for_{name}": seconds, name: error(weight_EOI, ours, gram)}
    return found


def in_closed_form(weight_EOI: Tensor, gram_EII: Tensor | None, size: FactorSize) -> Tensor:
    """The matrices [E, O, I] that a core and low ranks stand for."""
    return solve("base_delta", weight_EOI, gram_EII, size)[0].dense()


def flops() -> dict[str, float]:
    """FLOPs for all of Qwen3-30B-A3B's experts: of 1,000 steps of Adam on wrappers, and of one sweep of base_delta.

    Of a sweep, torch counts the products of one expert more; an eigen-decomposition is taken for 9 n^3, a Cholesky
    factor with its products for n^3.
    """
    layers, experts, shapes = QWEN3
    found = {"adam": 0.0, "sweep": 0.0}
    for outputs, inputs in shapes:
        forward = 2 * (outputs**2 * inputs + outputs * inputs**2 + RANK * (outputs**2 + inputs**2))
        found["adam"] += 1000 * 3 * forward
        counted = [_products(count, outputs, inputs) for count in (1, 2)]
        found["sweep"] += counted[1] - counted[0] + 9 * min(outputs, inputs) ** 3 + (inputs < outputs) * inputs**3
    return {name: layers * experts * count for name, count in found.items()}


def _products(experts: int, outputs: int, inputs: int) -> int:
    """FLOPs of products in one sweep."""
    weight_EOI = torch.randn(experts, outputs, inputs)
    gram_EII = torch.eye(inputs).expand(experts, -1, -1)
    with FlopCounterMode(display=False) as counter:
        solve("base_delta", weight_EOI, gram_EII, FactorSize(ranks=[2 * RANK] * experts), sweeps=1)
    return int(counter.get_total_flops())


def model_of(experts: int, top_k: int, setting: Setting, layers: int = 1) -> MixtralForCausalLM:
    """A random Mixtral."""
    config = MixtralConfig(
        vocab_size=VOCAB, hidden_size=setting.width, intermediate_size=2 * setting.width, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=8, num_local_experts=experts, num_experts_per_tok=top_k,
    )  # fmt: skip
    return MixtralForCausalLM(config).eval().requires_grad_(False)


def grams(setting: Setting) -> dict[str, float]:
    """Gram matrices of one layer of 8 experts, against the forward pass alone."""
    model = model_of(8, 2, setting)
    layers, family = ResidentLayers(model), family_of(model.config)
    windows = random_windows(VOCAB, 4 * setting.tokens // LENGTH, LENGTH)

    def collected() -> None:
        forward_layers(layers, windows, [InputMomentCollector(family, ["experts"], "input_grams", None, by_gate=True)])

    return fastest({"forward": lambda: forward_layers(layers, windows), "collected": collected}, setting.rounds)


def peak(at_once: int, setting: Setting) -> int:
    """Bytes above the layer itself while its 64 experts are observed in turns, their sums kept on disk, and solved."""
    model = model_of(64, 4, setting)
    layers, family = ResidentLayers(model), family_of(model.config)
    windows = random_windows(VOCAB, setting.tokens // LENGTH, LENGTH)
    forward_layers(layers, windows)
    reset_peak_memory(CPU)
    before = peak_memory_bytes(CPU)
    with tempfile.TemporaryDirectory() as scratch:
        options = WeightStageOptions(experts_at_once=at_once)
        collector = GramCollector(family, options, False, Path(scratch), CPU, torch.float32)

        def visit(_index: int, layer: nn.Module, run: LayerPass) -> None:
            view = learned_view(layer, family)
            assert view is not None
            collector.collect(view, run, True)
            stacks = view.stacks()
            for part in get_args(Part):
                solve("svd", stacks[part], collector.found[SOURCES[part]], FactorSize(ranks=[8] * 64))

        walk_layers(layers, windows, visit)
    return peak_memory_bytes(CPU) - before


def measured(at_once: int, setting: Setting) -> int:
    """`peak`, in a process of its own if the setting says so."""
    if not setting.fresh:
        return peak(at_once, setting)
    command = [sys.executable, __file__, "--peak", str(at_once)]
    return int(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["bytes"])


@torch.no_grad()
def decoding(setting: Setting) -> dict[str, Any]:
    """One token after the other with a cache, fp32: a model of random numbers, and the same at 0.3 of its experts."""
    whole, factored = (model_of(8, 2, setting, setting.layers) for _ in range(2))
    outputs, inputs = 2 * setting.width, setting.width
    size = size_for("base_delta", 8, outputs, inputs, ratio=0.3)
    form = Form(rank=size.ranks[0], core=True)
    forms = dict.fromkeys(get_args(Part), form)
    apply_edits(factored, [FactorExperts(index, forms) for index in range(setting.layers)])
    for parameter in factored.parameters():
        parameter.normal_(0.0, 0.02)

    def decode(model: MixtralForCausalLM) -> float:
        ids, cache = torch.zeros(1, 1, dtype=torch.long), None
        started = time.perf_counter()
        for _ in range(setting.decoded):
            cache = model(ids, past_key_values=cache, use_cache=True).past_key_values
        return time.perf_counter() - started

    effort = TimingBudget(2, 0.0) if not setting.fresh else TimingBudget(20, 10.0)
    turns = paired(lambda: decode(whole), lambda: decode(factored), effort)
    kept = parameters("base_delta", size, 8, outputs, inputs) / (8 * outputs * inputs)
    return summary([turns], setting.decoded) | {"ratio": kept}


def report(setting: Setting) -> dict[str, Any]:
    """Measure, print the ratios; returns all figures."""
    figures: dict[str, Any] = {}
    for name, (experts, outputs, inputs, rank) in SHAPES.items():
        for kind, common in KINDS.items():
            shape = min(experts, setting.experts), outputs // setting.shrunk, inputs // setting.shrunk
            found = beside_adam(*shape, max(1, rank // setting.shrunk), common, setting.steps)
            figures[f"{name}, {kind}"] = found
            for error_name in ("plain", "whitened"):
                ratio = found["adam_seconds"] / found[f"seconds_for_{error_name}"]
                print(
                    f"{name}, {kind}: {error_name} error {found[error_name]:.4f} (Adam on wrappers: "
                    f"{found[f'adam_{error_name}']:.4f}) in {ratio:.0f} x less processor time (at least 100)"
                )
    counts = figures["flops"] = flops()
    print(
        f"Qwen3-30B-A3B at rank {RANK}: {counts['sweep'] / 1e15:.2f} PFLOP a sweep of base_delta, "
        f"{counts['adam'] / 1e15:.0f} PFLOP for 1,000 steps of Adam: {counts['adam'] / counts['sweep']:.0f} x"
    )
    pair = figures["grams"] = grams(setting)
    print(
        f"Gram matrices: {pair['collected'] / pair['forward']:.2f} x a plain forward of the same tokens (at most 1.6)"
    )
    peaks = figures["peak"] = {str(n): measured(n, setting) for n in (64, 16, 4)}
    shown = ", ".join(f"{gigabytes(count)} with experts_at_once={n}" for n, count in peaks.items())
    print(f"peak memory above a layer of 64 experts: {shown}")
    speed = figures["decoding"] = decoding(setting)
    low, high = speed["speedup_interval"]
    print(
        f"decoding with {speed['ratio']:.2f} of the experts' parameters, {setting.layers} layers, fp32: "
        f"{speed['speedup']:.2f} x [{low:.2f}, {high:.2f}] as fast as the original"
    )
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the ratios, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "factorisation.json")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    add_smoke(parser)
    given = parser.parse_args(arguments)
    setting = SMOKE if given.smoke else Setting()
    if given.peak:
        print(json.dumps({"bytes": peak(given.peak, setting)}))
        return
    save_figures(report(setting), given.out, given.smoke)


if __name__ == "__main__":
    main()
