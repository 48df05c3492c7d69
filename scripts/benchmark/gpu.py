"""What only a GPU can show: CUDA against CPU on tiny models, bf16, and one full-size layer's time and memory."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

import tiny
from moe_compress import zoo
from moe_compress.checkpoint.reader import architecture_values, open_checkpoint
from moe_compress.methods.slimming.prune import prune
from moe_compress.model import hf
from moe_compress.model.families import family_of
from moe_compress.runtime import atomic_write, gigabytes
from moe_compress.stream.calibration import observers_for
from moe_compress.stream.data import FOLDS, Windows
from moe_compress.stream.fold import StreamedLayers, fold
from moe_compress.stream.inputs import Group
from moe_compress.stream.observers import BatchInfo, ExpertSums, Observer
from moe_compress.stream.probe import ProbeObserver

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
        seen, hidden = fold(layers, text, observers)
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
                prune(Group([""] * 8, [weight_BOI.to(d)], moment.to(d)), method=way, pattern=pattern).weights[0].cpu()
                == 0
                for d in (torch.device("cpu"), device)
            ]
            found[f"{way} {pattern or 'unstructured'}"] = float((sides[0] == sides[1]).float().mean())
    weight_BOI = torch.randn(8, 14336, 4096, device=device) * 0.02
    gram_BII = torch.eye(4096, device=device).expand(8, -1, -1).contiguous()
    started = time.perf_counter()
    prune(Group([""] * 8, [weight_BOI], gram_BII), method="sparsegpt", pattern="2:4")
    torch.cuda.synchronize()
    return {**found, "seconds": time.perf_counter() - started}


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
    watching: dict[str, Observer | None] = {"plain": None, "scores": ExpertSums(family, config, FOLDS)}
    watching["probe"] = ProbeObserver(family, config, TOKENS)
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
    for hub_id in FULL_SIZE:
        found = full_size_layer(hub_id)
        figures[hub_id] = found
        ratios = ", ".join(f"{what} over plain {found[what] / found['plain']:.2f}" for what in ("scores", "probe"))
        print(f"{hub_id}: {ratios}, {gigabytes(found['peak_bytes'])}")
    atomic_write(given.out, (json.dumps(figures, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
