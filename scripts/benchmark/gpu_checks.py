"""What only a GPU can show: CUDA against CPU on tiny models, bf16, and one full-size layer's time and memory."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

import moe_compress
import tiny
from moe_compress import zoo
from moe_compress.calibration.artefact import observers_for
from moe_compress.calibration.expert_statistics import ExpertStatistics
from moe_compress.calibration.output_sample import OutputSampler
from moe_compress.checkpoints.reader import architecture_values, open_checkpoint
from moe_compress.data.windows import FOLDS, Windows
from moe_compress.engine.forward import forward_layers
from moe_compress.engine.layers import StreamedLayers
from moe_compress.engine.observer import BatchInfo, Observer
from moe_compress.methods.pruning.prune import prune
from moe_compress.methods.quantization.gptq import gptq
from moe_compress.methods.weight_method import MatrixGroup
from moe_compress.models import hf
from moe_compress.models.families import family_of
from moe_compress.models.modeling.packed_linear import PackedMatrix
from moe_compress.utils.files import atomic_write, gigabytes

RESULTS = Path(__file__).resolve().parents[2] / "results"
CUDA = torch.device("cuda")
FULL_SIZE = ("mistralai/Mixtral-8x7B-v0.1", "deepseek-ai/deepseek-moe-16b-base", "Qwen/Qwen3-30B-A3B")
TOKENS, LENGTH = 16_384, 2048


def windows(vocab: int, rows: int, length: int) -> Windows:
    """Random token windows."""
    ids = torch.randint(3, vocab, (rows, length), generator=torch.Generator().manual_seed(0))
    number = torch.arange(rows)
    mask = torch.ones_like(ids, dtype=torch.bool)
    return Windows(ids, mask, number[:, None].expand_as(ids), torch.zeros_like(number), ("text",), "", {})


def same_on_cuda(family: str, place: Path) -> dict[str, float]:
    """Largest relative difference of hidden states and scores, CUDA against CPU, fp32; bf16 stays finite."""
    checkpoint = open_checkpoint(tiny.save(tiny.make(family), place / family))
    text = windows(tiny.VOCAB, 4, 16)
    found = {}
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.float32), ("cuda", torch.bfloat16)):
        layers = StreamedLayers(checkpoint, torch.device(device), dtype)
        probed = family in tiny.EDITABLE
        observers = observers_for(checkpoint, layers, text, probes=True) if probed else []
        seen, hidden = forward_layers(layers, text, observers)
        found[device, dtype] = hidden.float().cpu(), [part for layer in seen for part in layer if "norm" in part]
    (cpu, cpu_sums), (gpu, gpu_sums) = found["cpu", torch.float32], found["cuda", torch.float32]
    worst = max([0.0, *(float((a["norm"] - b["norm"]).abs().max()) for a, b in zip(cpu_sums, gpu_sums, strict=True))])
    finite = bool(found["cuda", torch.bfloat16][0].isfinite().all())
    return {"hidden": float((gpu - cpu).abs().max() / cpu.abs().max()), "norm_sums": worst, "bf16_finite": finite}


def same_masks(device: torch.device) -> dict[str, float]:
    """Share of weights treated alike on the device and on the CPU; seconds for 8 full-size matrices."""
    generator = torch.Generator().manual_seed(0)
    weight_BOI, x_BRI = (torch.randn(8, rows, 512, generator=generator) for rows in (1024, 2048))
    gram_BII = x_BRI.transpose(1, 2) @ x_BRI / x_BRI.shape[1]
    found = {}
    for way, moment in (("sparsegpt", gram_BII), ("wanda", gram_BII.diagonal(dim1=1, dim2=2))):
        for pattern in (None, "2:4"):
            sides = [
                prune(MatrixGroup([""] * 8, [weight_BOI.to(d)], moment.to(d)), method=way, pattern=pattern)
                .weights[0]
                .cpu()
                == 0
                for d in (torch.device("cpu"), device)
            ]
            found[f"{way} {pattern or 'unstructured'}"] = float((sides[0] == sides[1]).float().mean())
    weight_BOI = torch.randn(8, 14336, 4096, device=device) * 0.02
    gram_BII = torch.eye(4096, device=device).expand(8, -1, -1).contiguous()
    started = time.perf_counter()
    prune(MatrixGroup([""] * 8, [weight_BOI], gram_BII), method="sparsegpt", pattern="2:4")
    torch.cuda.synchronize()
    return {**found, "seconds": time.perf_counter() - started}


@torch.no_grad()
def quantized(device: torch.device) -> dict[str, float]:
    """Share of GPTQ's codes that are the CPU's; seconds and peak bytes for Mixtral's gate and up of 8 experts."""
    generator = torch.Generator().manual_seed(0)
    weight_BOI, x_BRI = (torch.randn(8, rows, 512, generator=generator) for rows in (1024, 2048))
    gram_BII = x_BRI.transpose(1, 2) @ x_BRI / x_BRI.shape[1]
    names, found = [""] * 8, {}
    for act_order in (False, True):
        sides = [
            gptq([weight_BOI.to(d)], gram_BII.to(d), 4, 128, torch.bfloat16, names, act_order=act_order)[0][0][0].cpu()
            for d in (torch.device("cpu"), device)
        ]
        found["act_order" if act_order else "in order"] = float((sides[0] == sides[1]).float().mean())
    weights = [torch.randn(8, 14336, 4096, device=device) * 0.02 for _ in range(2)]
    gram_BII = torch.eye(4096, device=device).expand(8, -1, -1).contiguous()
    for clip in ("max", "mse"):
        torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        gptq(weights, gram_BII, 4, 128, torch.bfloat16, names, clip=clip)
        torch.cuda.synchronize()
        found[f"seconds, clip={clip}"] = time.perf_counter() - started
        found[f"peak_bytes, clip={clip}"] = torch.cuda.max_memory_allocated()
    return found


@torch.no_grad()
def kernels(device: torch.device) -> dict[str, float]:
    """Packed matrices (4096 x 14336) against dense bf16 ones: largest relative difference, and speed by rows."""
    found: dict[str, float] = {}
    for bits, group in ((4, 128), (2, 128), (8, 14336)):
        codes = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (4096, 14336), dtype=torch.int8, device=device)
        scale = torch.rand(4096, 14336 // group, device=device).bfloat16() * 0.01
        packed = PackedMatrix.of(codes, scale, bits)
        dense = packed.dense()
        for rows in (1, 8, 64, 512):
            x = torch.randn(rows, 14336, device=device, dtype=torch.bfloat16)
            mine, theirs = packed(x), torch.nn.functional.linear(x, dense)
            seconds = {"dense": timed(lambda x=x, w=dense: torch.nn.functional.linear(x, w))}
            seconds["packed"] = timed(lambda x=x, m=packed: m(x))
            found[f"{bits} bits, {rows} rows: difference"] = float((mine - theirs).abs().max() / theirs.abs().max())
            found[f"{bits} bits, {rows} rows: times as fast"] = seconds["dense"] / seconds["packed"]
        found[f"{bits} bits: kernel"] = float(packed.kernel is not None)
        found[f"{bits} bits: codes are kept"] = float(torch.equal(packed.codes().cpu(), codes.cpu()))
    return found


def timed(work: Callable[[], object], repeats: int = 50) -> float:
    """Seconds of one call, the device waited for."""
    for _ in range(5):
        work()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / repeats


@torch.no_grad()
def packed_families(place: Path) -> dict[str, float]:
    """Packed tiny models on the GPU against the same on the CPU, fp32: largest relative difference of the logits."""
    found = {}
    for family in ("mixtral", "deepseek_v3", "gpt_oss", "qwen2_moe"):
        folder, out = place / f"{family}-whole", place / f"{family}-packed"
        tiny.save(tiny.make(family), folder)
        words = "quantize method=rtn bits=4 group_size=8"
        moe_compress.compress(words, model=str(folder), out=str(out), eval=False, results=str(place), device="cuda")
        ids = tiny.token_ids()
        sides = [
            moe_compress.load(out, torch.float32, device_map=where)(ids.to(where)).logits.cpu()
            for where in ("cpu", "cuda")
        ]
        found[family] = float((sides[0] - sides[1]).abs().max() / sides[0].abs().max())
    return found


@torch.no_grad()
def full_size_layer(hub_id: str) -> dict[str, float]:
    """Seconds and peak memory of one MoE layer in bf16: alone, with all scores, with a probe; 16,384 tokens."""
    folder = zoo.config_path(hub_id)
    assert folder is not None
    config = hf.config_from({**architecture_values(folder.parent), "num_hidden_layers": 2})
    model = hf.skeleton(config, torch.bfloat16)
    hf.use_experts_function(model)
    model.to_empty(device=CUDA)
    for parameter in model.parameters():
        parameter.normal_(std=0.02)
    text = windows(config.vocab_size, TOKENS // LENGTH, LENGTH)
    layer = hf.decoder_layers(model)[1]
    hidden, calls = hf.enter(model, text.ids_NS[:1].cuda(), None)
    family = family_of(config)
    watching: dict[str, Observer | None] = {"plain": None, "scores": ExpertStatistics(family, config, FOLDS)}
    watching["probe"] = OutputSampler(family, config, TOKENS)
    hf.run_layer(layer, hidden, calls[1])  # what the first call loads and compiles is none of the layer's time
    torch.cuda.reset_peak_memory_stats()
    seconds = {}
    for what, observer in watching.items():
        if observer is not None:
            observer.enter(1, layer)
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(TOKENS // LENGTH):
            if observer is not None:
                observer.begin(all_real(LENGTH))
            out = hf.run_layer(layer, hidden, calls[1])
            if observer is not None:
                observer.end(out)
        torch.cuda.synchronize()
        seconds[what] = time.perf_counter() - started
        if observer is not None:
            observer.leave()
    return {**seconds, "peak_bytes": torch.cuda.max_memory_allocated()}


def half_as_deep(place: Path) -> dict[str, object]:
    """The speed harness on CUDA (events, memory counters, energy where NVML is): a tiny model without two blocks."""
    words = {"results": str(place), "eval": False, "out": str(place / "half")}
    folder = moe_compress.compress("block_drop drop=2", model="tiny-mixtral", **words).folder
    report = moe_compress.speed(str(folder), quick=True, device="cuda", results=place)
    print(report.markdown())
    return report.found


def all_real(tokens: int) -> BatchInfo:
    """A batch of real tokens of one component."""
    return BatchInfo(
        torch.ones(tokens, dtype=torch.bool, device=CUDA), torch.zeros(tokens, dtype=torch.long, device=CUDA)
    )


def main() -> None:
    """Run all checks, print them, keep them as JSON; one line where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.json")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU here: the CUDA checks are skipped.")
        return
    figures: dict[str, object] = {"device": torch.cuda.get_device_name()}
    with tempfile.TemporaryDirectory() as place:
        for family in tiny.CONFIGS:
            figures[family] = same_on_cuda(family, Path(place))
            print(family, figures[family])
    figures["pruning"] = same_masks(CUDA)
    print("pruning", figures["pruning"])
    for what, found in (("quantization", quantized(CUDA)), ("kernels", kernels(CUDA))):
        figures[what] = found
        print(what, found)
    with tempfile.TemporaryDirectory() as place:
        figures["packed"] = packed_families(Path(place))
        print("packed", figures["packed"])
    with tempfile.TemporaryDirectory() as place:
        figures["speed"] = half_as_deep(Path(place))
    for hub_id in FULL_SIZE:
        found = full_size_layer(hub_id)
        figures[hub_id] = found
        ratios = ", ".join(f"{what} over plain {found[what] / found['plain']:.2f}" for what in ("scores", "probe"))
        print(f"{hub_id}: {ratios}, {gigabytes(found['peak_bytes'])}")
    atomic_write(given.out, (json.dumps(figures, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
