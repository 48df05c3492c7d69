"""Recovery beside plain ways of doing the same, as ratios measured in this one run.

The student is tiny-mixtral with half of its experts, its teacher the whole of it, beside it or in a cache. Times are
the processor's, the least of several, the two sides alternating; memory is that of processes of their own, above what
they begin with.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

import moe_compress
from common import RESULTS, add_smoke, save_figures
from moe_compress import zoo
from moe_compress.checkpoints.reader import Checkpoint, open_checkpoint
from moe_compress.compression.recovery.teachers import Teaching, teaching_of
from moe_compress.compression.recovery.trained_weights import trained_parameters
from moe_compress.compression.recovery.whole_model import WholeModel, chunked_loss, text_batch
from moe_compress.compression.recovery.whole_training import training_of
from moe_compress.methods import registry
from moe_compress.methods.recovery.divergences import forward_kl
from moe_compress.methods.recovery_method import Distillation
from moe_compress.methods.stage_options import TrainingOptions
from moe_compress.models import hf
from moe_compress.run import context
from moe_compress.run.context import Run
from moe_compress.run.options import Options
from moe_compress.utils.devices import peak_memory_bytes, reset_peak_memory, return_memory
from moe_compress.utils.files import gigabytes

CPU = torch.device("cpu")
MODEL, DROPPED = "tiny-mixtral", "expert_drop ratio=0.5"
LARGE = "Qwen/Qwen3-30B-A3B"
CACHES = ("none", "topk", "sampled")
TRAINED = {"routers": "routers", "experts and routers": "experts,routers"}


@dataclass(frozen=True)
class Setting:
    """Windows of text; steps of a curve; predicted tokens, vocabulary and width of a head; layers and width of a model.

    fresh: memory is measured in processes of their own.
    """

    windows: int = 64
    steps: int = 20
    tokens: int = 2048
    vocabulary: int = 150_000
    width: int = 384
    layers: tuple[int, int] = (8, 24)
    rounds: int = 16
    fresh: bool = True


SMOKE = Setting(2, 2, 8, 64, 32, (1, 2), 1, fresh=False)


# --- a teacher in a cache -----------------------------------------------------------------------------------


class Lesson:
    """A student with half of the experts that learns `train` from the whole model, as cache= says."""

    def __init__(self, student: Path, run: Run, setting: Setting, train: str, cache: str) -> None:
        task = registry.find("distill").run(train=train, cache=cache)
        assert isinstance(task, Distillation)
        self.source, self.task, self.run = open_checkpoint(student), task, run
        self.teacher: Checkpoint = open_checkpoint(zoo.path(MODEL), MODEL)
        self.windows = run.windows("calibration", self.teacher)
        self.taught: Teaching = teaching_of(task, self.teacher, self.windows, run, None)
        options = TrainingOptions(steps=setting.steps)
        self.training = training_of(task, options, self.source, self.taught, [], self.windows, run)

    def step(self, number: int) -> float:
        """One step; its loss."""
        losses, _ = self.training.step(number)
        self.training.optimiser.step(number)
        return losses["logits"]

    @torch.no_grad()
    def divergence(self, teacher: WholeModel) -> float:
        """KL of all of the text, of the whole vocabulary."""
        found: list[Tensor] = []
        for rows in torch.arange(len(self.windows)).split(8):
            batch = text_batch(self.windows, rows, CPU)
            theirs, ours = (
                hf.head(each.model, each.final(batch, each.states(batch))) for each in (teacher, self.training.student)
            )
            found.append(forward_kl(ours, theirs))
        return float(torch.cat(found).double().mean())


def processor_seconds(sides: Mapping[str, Lesson], rounds: int) -> dict[str, float]:
    """The least of a step of each, in turn: of this process alone, whatever else the machine does."""
    least = dict.fromkeys(sides, float("inf"))
    for number in range(rounds):
        for name, side in sides.items():
            started = time.process_time()
            side.step(number)
            least[name] = min(least[name], time.process_time() - started)
    return least


def lessons(place: Path, setting: Setting) -> dict[str, Any]:
    """Seconds of steps towards a teacher that runs and a cached one; losses along a curve, and what was learnt."""
    options = Options(model=MODEL, results=str(place), samples=setting.windows, eval=False)
    student = Path(str(moe_compress.compress(DROPPED, **options.model_dump()).folder))
    run = context.start(options.resolved())
    figures: dict[str, Any] = {"seconds": {}, "losses": {}}
    for name, train in TRAINED.items():
        online, cached = (Lesson(student, run, setting, train, cache) for cache in ("none", "topk"))
        figures["seconds"][name] = processor_seconds({"online": online, "cached": cached}, setting.rounds)
    for cache in CACHES:
        lesson = Lesson(student, run, setting, TRAINED["experts and routers"], cache)
        curve = [lesson.step(number) for number in range(setting.steps)]
        size = lesson.taught.cache.report()["bytes_per_token"] if lesson.taught.cache else 0
        teacher = lesson.taught.online or WholeModel(lesson.teacher, run, run.dtype)
        figures["losses"][cache] = {"curve": curve, "kl": lesson.divergence(teacher), "bytes_per_token": size}
    return figures


# --- memory -------------------------------------------------------------------------------------------------


def loss_memory(way: str, setting: Setting) -> int:
    """Bytes above models and hidden states while the KL of next tokens is found with its gradient at these states."""
    config = MixtralConfig(
        vocab_size=setting.vocabulary, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    student, teacher = (MixtralForCausalLM(config).eval().requires_grad_(False) for _ in range(2))
    hidden_PD = torch.randn(setting.tokens, config.hidden_size)
    hf.head(student, hidden_PD[:1])
    reset_peak_memory(CPU)
    before = peak_memory_bytes(CPU)
    if way == "plain":
        leaf_PD = hidden_PD.detach().requires_grad_()
        forward_kl(hf.logits(student, leaf_PD), hf.head(teacher, hidden_PD)).mean().backward()
    else:
        whole = cast(WholeModel, SimpleNamespace(model=student, logits=lambda hidden: hf.logits(student, hidden)))
        chunked_loss(
            whole,
            hidden_PD,
            lambda logits_PV, part: forward_kl(logits_PV, hf.head(teacher, hidden_PD[part])),
            1 / setting.tokens,
        )
    return peak_memory_bytes(CPU) - before


def model_of(layers: int, setting: Setting, place: Path) -> Path:
    """A random Mixtral with the tokenizer of the zoo."""
    config = MixtralConfig(
        vocab_size=open_checkpoint(zoo.path(MODEL)).text_config.vocab_size, hidden_size=setting.width,
        intermediate_size=2 * setting.width, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=4, num_local_experts=8,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(place)
    for file in zoo.path(MODEL).glob("tokenizer*"):
        shutil.copy(file, place)
    return place


def layerwise_memory(folder: str, _: Setting) -> int:
    """Bytes of a stage of layerwise training above those that a process begins with that has imported everything."""
    before = peak_memory_bytes(CPU)
    words: dict[str, Any] = {"data": "zoo", "samples": 16, "length": 64, "eval": False, "results": folder}
    student = moe_compress.compress(DROPPED, model=folder, **words).folder
    return_memory()
    reset_peak_memory(CPU)
    moe_compress.compress(f"layerwise steps=2 batch=8 teacher={folder}", model=str(student), **words)
    return peak_memory_bytes(CPU) - before


MEMORY = {"loss": loss_memory, "layerwise": layerwise_memory}


def memory(what: str, word: str, setting: Setting) -> int:
    """One of MEMORY, in a process of its own if the setting says so."""
    if not setting.fresh:
        return MEMORY[what](word, setting)
    command = [sys.executable, __file__, "--memory", what, word]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return int(json.loads(done.stdout.splitlines()[-1])["bytes"])


def layerwise_peaks(setting: Setting) -> dict[str, dict[str, int]]:
    """The memory of layerwise training of few layers and of many, and what the model takes."""
    found: dict[str, dict[str, int]] = {}
    for name, layers in zip(("few", "many"), setting.layers, strict=True):
        with tempfile.TemporaryDirectory() as scratch:
            folder = model_of(layers, setting, Path(scratch))
            found[name] = {
                "layers": layers,
                "bytes": memory("layerwise", scratch, setting),
                "model_bytes": open_checkpoint(folder).bytes,
            }
    return found


# --- what router_kd holds -----------------------------------------------------------------------------------


def routers_of(hub_id: str) -> dict[str, int]:
    """Numbers that router_kd trains of a well-known model, its moments' bytes, and the numbers of the whole model."""
    path = zoo.config_path(hub_id)
    assert path is not None and hub_id in zoo.known_configs()
    model = hf.skeleton(hf.config_from(json.loads(path.read_text(encoding="utf-8"))), torch.bfloat16)
    task = registry.find("router_kd").run()
    count = sum(each.numel() for each in trained_parameters(model, task.trains).values())
    # Two moments of each, in fp32.
    return {"trained": count, "optimiser_bytes": 8 * count, "all": sum(each.numel() for each in model.parameters())}


# --- the report ---------------------------------------------------------------------------------------------


def report(setting: Setting) -> dict[str, Any]:
    """Measure, print the ratios; returns all figures."""
    with tempfile.TemporaryDirectory() as scratch:
        figures = lessons(Path(scratch), setting)
    for name, pair in figures["seconds"].items():
        ratio = pair["cached"] / pair["online"]
        print(f"a step of {name}: {ratio:.2f} x as long with the teacher cached (at most 0.75)")
    online = figures["losses"]["none"]
    for cache in CACHES[1:]:
        found = figures["losses"][cache]
        off = [ours / theirs - 1 for ours, theirs in zip(found["curve"], online["curve"], strict=True)]
        print(
            f"cache={cache}, {found['bytes_per_token']:.0f} bytes a token: the loss is {100 * off[0]:+.2f} % off at "
            f"the first step, {100 * max(off, key=abs):+.2f} % at most along {len(off)}; the KL then left is "
            f"{found['kl']:.4f} ({online['kl']:.4f} with the teacher online)"
        )
    pair = figures["loss"] = {way: memory("loss", way, setting) for way in ("plain", "chunked")}
    shape = f"{setting.tokens:,} x {setting.vocabulary:,} logits"
    ratio = pair["chunked"] / max(1, pair["plain"])
    print(f"the loss of {shape}: {gigabytes(pair['chunked'])}, {ratio:.2f} x plain (at most 0.2)")
    peaks = figures["layerwise"] = layerwise_peaks(setting)
    few, many = peaks.values()
    print(
        f"layerwise: {gigabytes(many['bytes'])} beside a model of {gigabytes(many['model_bytes'])}, "
        f"{many['bytes'] / max(1, few['bytes']):.2f} x that of {gigabytes(few['model_bytes'])} (at most 1.1)"
    )
    large = figures["router_kd"] = routers_of(LARGE)
    print(
        f"router_kd of {LARGE}: {large['trained'] / 1e6:.1f} M of {large['all'] / 1e9:.1f} B numbers are trained, "
        f"{gigabytes(large['optimiser_bytes'])} of moments"
    )
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the ratios, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "recovery.json")
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    add_smoke(parser)
    given = parser.parse_args(arguments)
    setting = SMOKE if given.smoke else Setting()
    if given.memory:
        what, word = given.memory
        print(json.dumps({"bytes": MEMORY[what](word, setting)}))
        return
    save_figures(report(setting), given.out, given.smoke)


if __name__ == "__main__":
    main()
