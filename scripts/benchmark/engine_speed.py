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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, MixtralConfig

from common import RESULTS, add_smoke, fastest, random_windows, save_figures
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

CPU = torch.device("cpu")
LAYERS, EXPERTS, VOCAB, LENGTH = (8, 32), 8, 256, 256


@dataclass(frozen=True)
class Size:
    """Widths of the models, windows of both texts, rounds of timing, and runs of the memory's measurement.

    fresh: every measurement in a process of its own.
    """

    width: int = 768
    inner: int = 2688
    memory_windows: int = 16
    speed_windows: int = 32
    rounds: int = 3
    runs: int = 2
    fresh: bool = True


SMOKE = Size(64, 64, 1, 1, 1, 1, fresh=False)


def synthesise(folder: Path, layers: int, width: int, inner: int) -> None:
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
    index: dict[str, str] = {}
    for layer, tensors in shards.items():
        file = f"model-{0 if layer is None else layer + 1:05d}-of-{len(shards):05d}.safetensors"
        made = {k: _random(t.shape) for k, t in tensors.items()}
        save_file(made, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(made, file)
    atomic_write(
        folder / "model.safetensors.index.json",
        json.dumps({"metadata": {"total_size": 0}, "weight_map": index}).encode(),
    )


def _random(shape: Sequence[int]) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.randn(shape).mul_(shape[-1] ** -0.5).to(torch.bfloat16)


def text(windows: int) -> Windows:
    """Random token windows."""
    return random_windows(VOCAB, windows, LENGTH)


# --- what a fresh process measures ----------------------------------------------------------------------------


def fold_peak(folder: Path, windows: Windows, _: int) -> dict[str, float]:
    """Peak memory of a measuring pass above the process with everything imported."""
    checkpoint = open_checkpoint(folder)
    _warm_up(checkpoint)
    bare = peak_memory_bytes(CPU)
    layers = StreamedLayers(checkpoint, CPU, torch.float32)
    forward_layers(layers, windows, [_scores(checkpoint)])
    layer = sum(t.numel() for t in hf.decoder_layers(layers.model)[0].state_dict().values()) * 4
    boundary = windows.ids_NS.numel() * checkpoint.config.hidden_size * 4
    return {"peak": peak_memory_bytes(CPU) - bare, "layer": layer, "boundary": boundary}


def _warm_up(checkpoint: Checkpoint) -> None:
    """Load what is loaded once, whatever the model: kernels, thread pools, lazily imported modules."""
    with tempfile.TemporaryDirectory() as place:
        synthesise(Path(place) / "warm", 1, 64, 64)
        small = open_checkpoint(Path(place) / "warm")
        forward_layers(StreamedLayers(small, CPU, torch.float32), text(1), [_scores(small)])


def _scores(checkpoint: Checkpoint) -> ExpertStatistics:
    return ExpertStatistics(family_of(checkpoint.config), checkpoint.config, FOLDS)


def forward_ratios(folder: Path, windows: Windows, rounds: int) -> dict[str, float]:
    """Seconds of a plain forward, of the fold, and of the fold with all scores, on the same tokens and batches."""
    checkpoint = open_checkpoint(folder)
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
    return fastest(runs, rounds)


def copy_ratios(folder: Path, _: Windows, rounds: int) -> dict[str, float]:
    """Seconds of `cp`, of a pass-through, of every layer through the model unchanged, and of surgery on every layer."""
    checkpoint = open_checkpoint(folder)
    place = Path(tempfile.mkdtemp(dir=folder.parent))
    everything, fewer = (
        [KeepExperts(layer, tuple(range(kept))) for layer in range(checkpoint.num_layers)]
        for kept in (EXPERTS, EXPERTS - 2)
    )

    def run(edits: list[KeepExperts]) -> None:
        out = place / "out"
        writer = CheckpointWriter(out, checkpoint, "benchmark")
        rewrite(checkpoint, edits, writer)
        writer.finish(resulting_config(checkpoint.values, edits).values, {})
        shutil.rmtree(out)

    def copy() -> None:
        subprocess.run(["cp", "-r", "--reflink=never", str(folder), str(place / "cp")], check=True)
        shutil.rmtree(place / "cp")

    seconds = fastest(
        {
            "cp": copy,
            "pass": lambda: run([]),
            "identity": lambda: run(everything),
            "surgery": lambda: run(fewer),
        },
        rounds,
    )
    shutil.rmtree(place)
    return {**seconds, "bytes": checkpoint.bytes}


MEASUREMENTS = {"fold_peak": fold_peak, "forward_ratios": forward_ratios, "copy_ratios": copy_ratios}


def measured(name: str, folder: Path, windows: int, size: Size) -> dict[str, float]:
    """Run one measurement, in a process of its own if the size says so."""
    words = ["--measure", name, "--folder", str(folder), "--windows", str(windows), "--rounds", str(size.rounds)]
    if not size.fresh:
        return MEASUREMENTS[name](folder, text(windows), size.rounds)
    done = subprocess.run([sys.executable, __file__, *words], check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def peaks(place: Path, size: Size) -> dict[str, dict[str, float]]:
    """Peak memory of models that differ in depth alone."""
    figures: dict[str, dict[str, float]] = {}
    for layers in LAYERS:
        # Several times, because what the allocator keeps varies by a tenth from process to process.
        runs = [measured("fold_peak", place / f"{layers}", size.memory_windows, size) for _ in range(size.runs)]
        found = min(runs, key=lambda run: run["peak"])
        above = found["peak"] - found["boundary"]
        on_disk = gigabytes(open_checkpoint(place / f"{layers}").bytes)
        print(
            f"peak memory, {layers} layers ({on_disk} on disk): {gigabytes(found['peak'])} above the bare process, of "
            f"which hidden states {gigabytes(found['boundary'])}; the rest is {above / found['layer']:.2f} x one "
            f"layer of {gigabytes(found['layer'])} (at most 2.5)"
        )
        figures[f"peak_{layers}"] = found
    few, many = (found["peak"] for found in figures.values())
    if few:
        print(f"peak memory of 32 layers over 8 layers: {many / few:.3f} (at most 1.10)")
    return figures


def report(place: Path, size: Size) -> dict[str, dict[str, float]]:
    """Synthesise, measure, print; returns all figures."""
    for layers in LAYERS:
        synthesise(place / f"{layers}", layers, size.width, size.inner)
    figures = peaks(place, size)
    small = place / f"{LAYERS[0]}"
    found = figures["forward"] = measured("forward_ratios", small, size.speed_windows, size)
    print(f"fold over plain forward: {found['fold'] / found['plain']:.2f} (at most 1.15)")
    print(f"all scores over plain forward: {found['scores'] / found['plain']:.2f} (at most 1.5)")
    found = figures["copy"] = measured("copy_ratios", small, 0, size)
    rate = found["bytes"] / found["surgery"]
    print(f"pass-through: {found['cp'] / found['pass']:.2f} x the speed of cp (at least 0.5)")
    print(f"every layer through the model: {found['cp'] / found['identity']:.2f} x the speed of cp (at least 0.1)")
    print(f"surgery on every layer, no forward: {found['surgery']:.2f} s, {gigabytes(rate)}/s")
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    """Without --measure: everything, in a temporary folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", choices=MEASUREMENTS)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--windows", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "engine.json")
    add_smoke(parser)
    given = parser.parse_args(arguments)
    if given.measure:
        print(json.dumps(MEASUREMENTS[given.measure](given.folder, text(given.windows), given.rounds)))
        return
    with tempfile.TemporaryDirectory() as place:
        figures = report(Path(place), SMOKE if given.smoke else Size())
    save_figures(figures, given.out, given.smoke)


if __name__ == "__main__":
    main()
