"""The engine's speed and memory as ratios, all measured in this one run on synthesised checkpoints.

Every measurement is a fresh process. A ratio of times takes the faster of several runs on each side, alternating.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, MixtralConfig

from moe_compress.calibration.expert_statistics import ExpertStatistics
from moe_compress.checkpoints.reader import Checkpoint, open_checkpoint
from moe_compress.checkpoints.writer import CheckpointWriter
from moe_compress.compression.surgery import rewrite
from moe_compress.data.windows import FOLDS, Windows
from moe_compress.edits.edits import KeepExperts
from moe_compress.edits.resulting_config import resulting_config
from moe_compress.engine.forward import TOKENS_PER_BATCH, forward_layers
from moe_compress.engine.layers import StreamedLayers
from moe_compress.models import hf
from moe_compress.models.families import family_of
from moe_compress.utils.devices import peak_memory_bytes
from moe_compress.utils.files import atomic_write, gigabytes

RESULTS = Path(__file__).resolve().parents[2] / "results"
CPU = torch.device("cpu")
WIDTH, INNER, EXPERTS, VOCAB, LENGTH = 768, 2688, 8, 256, 256


def synthesise(folder: Path, layers: int, width: int = WIDTH, inner: int = INNER) -> None:
    """A Mixtral-shaped bf16 checkpoint of random numbers, one shard a layer."""
    config = MixtralConfig(
        vocab_size=VOCAB, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=8, num_local_experts=EXPERTS, num_experts_per_tok=2,
        max_position_embeddings=4096, architectures=["MixtralForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    model = hf.skeleton(config, torch.bfloat16)
    names = hf.checkpoint_tensors(
        model, {k: torch.empty(t.shape, device="meta") for k, t in model.state_dict().items()}
    )
    shards: dict[int | None, dict[str, torch.Tensor]] = {}
    for name, tensor in names.items():
        shards.setdefault(hf.layer_of(name), {})[name] = tensor
    index = {}
    for layer, tensors in shards.items():
        file = f"model-{0 if layer is None else layer + 1:05d}-of-{len(shards):05d}.safetensors"
        made = {k: _random(tuple(t.shape)) for k, t in tensors.items()}
        save_file(made, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(made, file)
    atomic_write(
        folder / "model.safetensors.index.json",
        json.dumps({"metadata": {"total_size": 0}, "weight_map": index}).encode(),
    )


def _random(shape: tuple[int, ...]) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return (torch.randn(shape) * shape[-1] ** -0.5).to(torch.bfloat16)


def text(tokens: int) -> Windows:
    """Random token windows."""
    ids = torch.randint(0, VOCAB, (tokens // LENGTH, LENGTH), generator=torch.Generator().manual_seed(0))
    number = torch.arange(len(ids))
    mask = torch.ones_like(ids, dtype=torch.bool)
    return Windows(ids, mask, number[:, None].expand_as(ids), torch.zeros_like(number), ("text",), "", {})


# --- what a fresh process measures ----------------------------------------------------------------------------


def fold_peak(folder: Path, tokens: int) -> dict[str, float]:
    """Peak memory of a measuring pass above the process with everything imported."""
    checkpoint, windows = open_checkpoint(folder), text(tokens)
    _warm_up(checkpoint)
    bare = peak_memory_bytes(CPU)
    layers = StreamedLayers(checkpoint, CPU, torch.float32)
    forward_layers(layers, windows, [_scores(checkpoint)])
    layer = sum(t.numel() for t in hf.decoder_layers(layers.model)[0].state_dict().values()) * 4
    boundary = windows.ids_NS.numel() * WIDTH * 4
    return {"peak": peak_memory_bytes(CPU) - bare, "layer": layer, "boundary": boundary}


def _warm_up(checkpoint: Checkpoint) -> None:
    """Load what is loaded once, whatever the model: kernels, thread pools, lazily imported modules."""
    with tempfile.TemporaryDirectory() as place:
        synthesise(Path(place) / "warm", 1, 64, 64)
        small = open_checkpoint(Path(place) / "warm")
        forward_layers(StreamedLayers(small, CPU, torch.float32), text(LENGTH), [_scores(small)])


def _scores(checkpoint: Checkpoint) -> ExpertStatistics:
    return ExpertStatistics(family_of(checkpoint.config), checkpoint.config, FOLDS)


def forward_ratios(folder: Path, tokens: int) -> dict[str, float]:
    """Seconds of a plain forward, of the fold, and of the fold with all scores, on the same tokens and batches."""
    checkpoint, windows = open_checkpoint(folder), text(tokens)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    size = TOKENS_PER_BATCH // LENGTH

    @torch.no_grad()
    def plain() -> None:
        for batch in windows.batches(size):
            model.model(windows.ids_NS[batch], use_cache=False)

    streamed = StreamedLayers(checkpoint, CPU, torch.float32)
    runs: dict[str, Callable[[], object]] = {
        "plain": plain,
        "fold": lambda: forward_layers(streamed, windows),
        "scores": lambda: forward_layers(streamed, windows, [_scores(checkpoint)]),
    }
    return fastest(runs, 3)


def copy_ratios(folder: Path, _: int) -> dict[str, float]:
    """Seconds of `cp`, of a pass-through, of the identity through the model, and of surgery on every layer."""
    checkpoint = open_checkpoint(folder)
    place = Path(tempfile.mkdtemp(dir=folder.parent))
    edits = [KeepExperts(layer, tuple(range(EXPERTS - 2))) for layer in range(checkpoint.num_layers)]

    def run(edits: list[KeepExperts], through_model: bool) -> None:
        out = place / "out"
        writer = CheckpointWriter(out, checkpoint, "benchmark")
        rewrite(checkpoint, edits, writer, through_model=through_model)
        writer.finish(resulting_config(checkpoint.values, edits).values, {})
        shutil.rmtree(out)

    def copy() -> None:
        subprocess.run(["cp", "-r", "--reflink=never", str(folder), str(place / "cp")], check=True)
        shutil.rmtree(place / "cp")

    seconds = fastest(
        {
            "cp": copy,
            "pass": lambda: run([], False),
            "identity": lambda: run([], True),
            "surgery": lambda: run(edits, False),
        },
        3,
    )
    shutil.rmtree(place)
    return {**seconds, "bytes": checkpoint.bytes}


def fastest(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Fewest seconds of each over alternating rounds."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - started)
    return best


MEASUREMENTS = {"fold_peak": fold_peak, "forward_ratios": forward_ratios, "copy_ratios": copy_ratios}


def measured(name: str, folder: Path, tokens: int) -> dict[str, float]:
    """Run one measurement in a process of its own."""
    command = [sys.executable, __file__, "--measure", name, "--folder", str(folder), "--tokens", str(tokens)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def report(place: Path) -> dict[str, object]:
    """Synthesise, measure, print; returns all figures."""
    for layers in (8, 32):
        synthesise(place / f"{layers}", layers)
    figures: dict[str, object] = {}
    for layers in (8, 32):
        # Twice, because what the allocator keeps varies by a tenth from process to process.
        runs = [measured("fold_peak", place / f"{layers}", 16 * LENGTH) for _ in range(2)]
        found = min(runs, key=lambda run: run["peak"])
        above = found["peak"] - found["boundary"]
        size = gigabytes(open_checkpoint(place / f"{layers}").bytes)
        print(
            f"peak memory, {layers} layers ({size} on disk): {gigabytes(found['peak'])} above the bare process, of "
            f"which hidden states {gigabytes(found['boundary'])}; the rest is {above / found['layer']:.2f} x one "
            f"layer of {gigabytes(found['layer'])} (at most 2.5)"
        )
        figures[f"peak_{layers}"] = found
    few, many = (figures[f"peak_{n}"]["peak"] for n in (8, 32))  # type: ignore[index]
    print(f"peak memory of 32 layers over 8 layers: {many / few:.3f} (at most 1.10)")
    found = figures["forward"] = measured("forward_ratios", place / "8", 32 * LENGTH)
    print(f"fold over plain forward: {found['fold'] / found['plain']:.2f} (at most 1.15)")
    print(f"all scores over plain forward: {found['scores'] / found['plain']:.2f} (at most 1.5)")
    found = figures["copy"] = measured("copy_ratios", place / "8", 0)
    rate = found["bytes"] / found["surgery"]
    print(f"pass-through: {found['cp'] / found['pass']:.2f} x the speed of cp (at least 0.5)")
    print(f"identity through the model: {found['cp'] / found['identity']:.2f} x the speed of cp (at least 0.1)")
    print(f"surgery on every layer, no forward: {found['surgery']:.2f} s, {gigabytes(rate)}/s")
    return figures


def main() -> None:
    """Without --measure: everything, in a temporary folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", choices=MEASUREMENTS)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--tokens", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "engine.json")
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(MEASUREMENTS[given.measure](given.folder, given.tokens)))
        return
    with tempfile.TemporaryDirectory() as place:
        figures = report(Path(place))
    atomic_write(given.out, (json.dumps(figures, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
