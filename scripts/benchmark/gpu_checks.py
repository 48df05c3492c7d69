"""What only a GPU can show: CUDA against CPU on tiny models, bf16, and one full-size layer's time and memory."""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear

import moe_compress
import tiny_families
from common import RESULTS, add_smoke, random_windows, save_figures
from moe_compress import zoo
from moe_compress.calibration.artefact import observers_for
from moe_compress.calibration.expert_statistics import ExpertStatistics
from moe_compress.calibration.output_sample import OutputSampler
from moe_compress.checkpoints.reader import architecture_values, open_checkpoint
from moe_compress.data.windows import FOLDS
from moe_compress.engine.forward import forward_layers
from moe_compress.engine.layers import StreamedLayers
from moe_compress.engine.observer import BatchInfo, Observer
from moe_compress.methods.factorisation.sizes import size_for
from moe_compress.methods.factorisation.solve import errors, solve
from moe_compress.methods.factorisation.structures import STRUCTURES
from moe_compress.methods.pruning.prune import prune
from moe_compress.methods.quantization.gptq import gptq
from moe_compress.methods.quantization.grid import Clip
from moe_compress.methods.quantization.numbers import Integers
from moe_compress.methods.weight_method import MatrixGroup
from moe_compress.models import hf
from moe_compress.models.families import family_of
from moe_compress.models.modeling.packed_linear import PackedMatrix
from moe_compress.utils.devices import peak_memory_bytes, reset_peak_memory
from moe_compress.utils.files import gigabytes

CPU = torch.device("cpu")
FULL_SIZE = ("mistralai/Mixtral-8x7B-v0.1", "deepseek-ai/deepseek-moe-16b-base", "Qwen/Qwen3-30B-A3B")
PACKED = ("mixtral", "deepseek_v3", "gpt_oss", "qwen2_moe")


@dataclass(frozen=True)
class Size:
    """What is checked: families, matrices [outputs, inputs], how often a product is repeated, full-size layers.

    agreeing: of the matrices that are solved on both devices; shrunk: values of a full-size config that are replaced;
    timing: words for the speed harness.
    """

    device: torch.device
    families: tuple[str, ...] = tuple(tiny_families.CONFIGS)
    packed: tuple[str, ...] = PACKED
    agreeing: tuple[int, int] = (1024, 512)
    matrix: tuple[int, int] = (14336, 4096)
    repeats: int = 50
    full_size: tuple[str, ...] = FULL_SIZE
    tokens: int = 16_384
    length: int = 2048
    shrunk: tuple[tuple[str, int], ...] = ()
    timing: tuple[tuple[str, Any], ...] = (("quick", True),)


SMOKE = Size(
    CPU, ("mixtral", "jetmoe"), PACKED[:1], (128, 128), (128, 256), 1, FULL_SIZE[:1], 16, 8,
    (("hidden_size", 64), ("intermediate_size", 64), ("vocab_size", 96), ("head_dim", 16)),
    (("prompts", "8"), ("batches", "1"), ("tokens", 2), ("runs", 2), ("seconds", 0), ("starts", 1)),
)  # fmt: skip


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU still computes."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def same_on_device(family: str, place: Path, device: torch.device) -> dict[str, float]:
    """Largest relative difference of hidden states and scores, device against CPU, fp32; bf16 stays finite."""
    checkpoint = open_checkpoint(tiny_families.save(tiny_families.make(family), place / family))
    text = random_windows(tiny_families.VOCAB, 4, 16, first=3)
    found = []
    for where, dtype in ((CPU, torch.float32), (device, torch.float32), (device, torch.bfloat16)):
        layers = StreamedLayers(checkpoint, where, dtype)
        probed = family in tiny_families.EDITABLE
        observers = observers_for(checkpoint, layers, text, output_samples=True) if probed else []
        seen, hidden = forward_layers(layers, text, observers)
        found.append((hidden.float().cpu(), [part for layer in seen for part in layer if "norm" in part]))
    (cpu, cpu_sums), (gpu, gpu_sums), (rounded, _) = found
    worst = max([0.0, *(float((a["norm"] - b["norm"]).abs().max()) for a, b in zip(cpu_sums, gpu_sums, strict=True))])
    finite = bool(rounded.isfinite().all())
    return {"hidden": float((gpu - cpu).abs().max() / cpu.abs().max()), "norm_sums": worst, "bf16_finite": finite}


def solvable(size: Size) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of eight experts, and the mean outer product of what each sees, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    outputs, inputs = size.agreeing
    weight_BOI, x_BRI = (torch.randn(8, rows, inputs, generator=generator) for rows in (outputs, 2 * outputs))
    return weight_BOI, x_BRI.transpose(1, 2) @ x_BRI / x_BRI.shape[1]


def same_masks(size: Size) -> dict[str, float]:
    """Share of weights treated alike on the device and on the CPU; seconds for 8 full-size matrices."""
    weight_BOI, gram_BII = solvable(size)
    found = {}
    for way, moment in (("sparsegpt", gram_BII), ("wanda", gram_BII.diagonal(dim1=1, dim2=2))):
        for pattern in (None, "2:4"):
            sides = [
                prune(MatrixGroup([""] * 8, [weight_BOI.to(d)], moment.to(d)), method=way, pattern=pattern)
                .weights[0]
                .cpu()
                == 0
                for d in (CPU, size.device)
            ]
            found[f"{way} {pattern or 'unstructured'}"] = float((sides[0] == sides[1]).float().mean())
    outputs, inputs = size.matrix
    weight_BOI = torch.randn(8, outputs, inputs, device=size.device) * 0.02
    gram_BII = torch.eye(inputs, device=size.device).expand(8, -1, -1).contiguous()
    started = time.perf_counter()
    prune(MatrixGroup([""] * 8, [weight_BOI], gram_BII), method="sparsegpt", pattern="2:4")
    synchronize(size.device)
    return {**found, "seconds": time.perf_counter() - started}


@torch.no_grad()
def quantized(size: Size) -> dict[str, float]:
    """Share of GPTQ's codes that are the CPU's; seconds and peak bytes for Mixtral's gate and up of 8 experts."""
    weight_BOI, gram_BII = solvable(size)
    names, found = [""] * 8, {}
    for act_order in (False, True):
        sides = [
            gptq([weight_BOI.to(d)], gram_BII.to(d), Integers(4), 128, torch.bfloat16, names, act_order=act_order)[0][
                0
            ][0].cpu()
            for d in (CPU, size.device)
        ]
        found["act_order" if act_order else "in order"] = float((sides[0] == sides[1]).float().mean())
    outputs, inputs = size.matrix
    weights = [torch.randn(8, outputs, inputs, device=size.device) * 0.02 for _ in range(2)]
    gram_BII = torch.eye(inputs, device=size.device).expand(8, -1, -1).contiguous()
    clips: tuple[Clip, ...] = ("max", "mse")
    for clip in clips:
        reset_peak_memory(size.device)
        started = time.perf_counter()
        gptq(weights, gram_BII, Integers(4), 128, torch.bfloat16, names, clip=clip)
        synchronize(size.device)
        found[f"seconds, clip={clip}"] = time.perf_counter() - started
        found[f"peak_bytes, clip={clip}"] = peak_memory_bytes(size.device)
    return found


@torch.no_grad()
def kernels(size: Size) -> dict[str, float]:
    """Packed matrices (4096 x 14336) against dense bf16 ones: largest relative difference, and speed by rows."""
    found: dict[str, float] = {}
    inputs, outputs = size.matrix
    for bits, group in ((4, 128), (2, 128), (8, inputs)):
        codes = torch.randint(
            -(1 << (bits - 1)), 1 << (bits - 1), (outputs, inputs), dtype=torch.int8, device=size.device
        )
        scale = torch.rand(outputs, inputs // group, device=size.device).bfloat16() * 0.01
        packed = PackedMatrix.of(codes, scale, bits)
        dense = packed.dense()
        for rows in (1, 8, 64, 512):
            x = torch.randn(rows, inputs, device=size.device, dtype=torch.bfloat16)
            work = {"dense": functools.partial(linear, x, dense), "packed": functools.partial(packed, x)}
            theirs, mine = (run() for run in work.values())
            seconds = {side: timed(run, size) for side, run in work.items()}
            found[f"{bits} bits, {rows} rows: difference"] = float((mine - theirs).abs().max() / theirs.abs().max())
            found[f"{bits} bits, {rows} rows: times as fast"] = seconds["dense"] / seconds["packed"]
        found[f"{bits} bits: kernel"] = float(packed.kernel is not None)
        found[f"{bits} bits: codes are kept"] = float(torch.equal(packed.codes().cpu(), codes.cpu()))
    return found


def factorised(size: Size) -> dict[str, float]:
    """Whitened error of every structure, device over CPU; seconds for low ranks of 8 full-size matrices."""
    weight_BOI, gram_BII = solvable(size)
    found: dict[str, float] = {}
    for structure in STRUCTURES:
        fitting = size_for(structure, *weight_BOI.shape, ratio=0.5)
        sides = []
        for place in (CPU, size.device):
            weight, gram = weight_BOI.to(place), gram_BII.to(place)
            sides.append(errors(weight, solve(structure, weight, gram, fitting, sweeps=2)[0], gram)[1])
        found[structure] = sides[1] / sides[0]
    outputs, inputs = size.matrix
    weight_BOI = torch.randn(8, outputs, inputs, device=size.device) * 0.02
    gram_BII = torch.eye(inputs, device=size.device).expand(8, -1, -1)
    started = time.perf_counter()
    solve("svd", weight_BOI, gram_BII, size_for("svd", *weight_BOI.shape, ratio=0.5))
    synchronize(size.device)
    return {**found, "seconds": time.perf_counter() - started}


def timed(work: Callable[[], object], size: Size) -> float:
    """Seconds of one call, the device waited for."""
    for _ in range(min(size.repeats, 5)):
        work()
    synchronize(size.device)
    started = time.perf_counter()
    for _ in range(size.repeats):
        work()
    synchronize(size.device)
    return (time.perf_counter() - started) / size.repeats


@torch.no_grad()
def packed_families(place: Path, size: Size) -> dict[str, float]:
    """Packed tiny models on the device against the same on the CPU, fp32: largest relative difference of the logits."""
    found = {}
    for family in size.packed:
        folder, out = place / f"{family}-whole", place / f"{family}-packed"
        tiny_families.save(tiny_families.make(family), folder)
        moe_compress.compress(
            "quantize method=rtn bits=4 group_size=8", model=str(folder), out=str(out), eval=False,
            results=str(place), device=size.device.type,
        )  # fmt: skip
        ids = tiny_families.token_ids()
        sides = [
            moe_compress.load(out, torch.float32, device_map=where)(ids.to(where)).logits.cpu()
            for where in ("cpu", size.device.type)
        ]
        found[family] = float((sides[0] - sides[1]).abs().max() / sides[0].abs().max())
    return found


@torch.no_grad()
def full_size_layer(hub_id: str, size: Size) -> dict[str, float]:
    """Seconds and peak memory of one MoE layer in bf16: alone, with all scores, with a sample; 16,384 tokens."""
    folder = zoo.config_path(hub_id)
    assert folder is not None
    config = hf.config_from({**architecture_values(folder.parent), "num_hidden_layers": 2, **dict(size.shrunk)})
    model: Any = hf.skeleton(config, torch.bfloat16)
    hf.use_experts_function(model)
    model.to_empty(device=size.device)
    for parameter in model.parameters():
        parameter.normal_(std=0.02)
    text = random_windows(config.vocab_size, size.tokens // size.length, size.length, first=3)
    layer = hf.decoder_layers(model)[1]
    hidden, calls = hf.enter(model, text.ids_NS[:1].to(size.device), None)
    family = family_of(config)
    watching: dict[str, Observer | None] = {"plain": None, "scores": ExpertStatistics(family, config, FOLDS)}
    watching["probe"] = OutputSampler(family, config, size.tokens)
    hf.run_layer(layer, hidden, calls[1])  # what the first call loads and compiles is none of the layer's time
    reset_peak_memory(size.device)
    seconds = {}
    for what, observer in watching.items():
        if observer is not None:
            observer.enter(1, layer)
        synchronize(size.device)
        started = time.perf_counter()
        for _ in range(size.tokens // size.length):
            if observer is not None:
                observer.begin(all_real(size.length, size.device))
            out = hf.run_layer(layer, hidden, calls[1])
            if observer is not None:
                observer.end(out.hidden_BSD)
        synchronize(size.device)
        seconds[what] = time.perf_counter() - started
        if observer is not None:
            observer.leave()
    return {**seconds, "peak_bytes": peak_memory_bytes(size.device)}


def half_as_deep(place: Path, size: Size) -> dict[str, Any]:
    """The speed harness on CUDA (events, memory counters, energy where NVML is): a tiny model without two blocks."""
    folder = moe_compress.compress(
        "block_drop drop=2", model="tiny-mixtral", results=str(place), eval=False, out=str(place / "half")
    ).folder
    report = moe_compress.speed(str(folder), device=size.device.type, results=place, **dict(size.timing))
    print(report.markdown())
    return dict(report.found)


def all_real(tokens: int, device: torch.device) -> BatchInfo:
    """A batch of real tokens of one component."""
    return BatchInfo(
        torch.ones(tokens, dtype=torch.bool, device=device), torch.zeros(tokens, dtype=torch.long, device=device)
    )


def report(size: Size) -> dict[str, Any]:
    """Run all checks and print them; returns all figures."""
    name = torch.cuda.get_device_name(size.device) if size.device.type == "cuda" else size.device.type
    figures: dict[str, Any] = {"device": name}
    with tempfile.TemporaryDirectory() as place:
        for family in size.families:
            figures[family] = same_on_device(family, Path(place), size.device)
            print(family, figures[family])
    for what, check in (
        ("pruning", same_masks),
        ("quantization", quantized),
        ("kernels", kernels),
        ("factors", factorised),
    ):
        figures[what] = check(size)
        print(what, figures[what])
    with tempfile.TemporaryDirectory() as place:
        figures["packed"] = packed_families(Path(place), size)
        print("packed", figures["packed"])
    with tempfile.TemporaryDirectory() as place:
        figures["speed"] = half_as_deep(Path(place), size)
    for hub_id in size.full_size:
        found = figures[hub_id] = full_size_layer(hub_id, size)
        ratios = ", ".join(f"{what} over plain {found[what] / found['plain']:.2f}" for what in ("scores", "probe"))
        print(f"{hub_id}: {ratios}, {gigabytes(found['peak_bytes'])}")
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all checks, print them, keep them as JSON; one line where there is no GPU (a smoke run needs none)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.json")
    add_smoke(parser)
    given = parser.parse_args(arguments)
    if not given.smoke and not torch.cuda.is_available():
        print("no GPU here: the CUDA checks are skipped.")
        return
    figures = report(SMOKE if given.smoke else Size(torch.device("cuda")))
    save_figures(figures, given.out, given.smoke)


if __name__ == "__main__":
    main()
