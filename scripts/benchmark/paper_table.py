"""Trimming x slimming: Table 3 of the paper (arXiv 2406.02500) on any models, by Snakemake, resumable.

The jobs are in paper_table.smk, the table is made by paper_rows.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moe_compress import zoo
from moe_compress.checkpoints.model_names import local_folder
from moe_compress.checkpoints.resolve import config_folder, layers_of
from moe_compress.cli.arguments import option_pairs
from moe_compress.compression.forecast import forecast
from moe_compress.evaluation.harnesses import HARNESSES
from moe_compress.evaluation.speed.report import setting_of
from moe_compress.evaluation.tasks import selection
from moe_compress.recipes.parser import parse
from moe_compress.run.option_uses import USED
from moe_compress.run.options import Options, make_options
from moe_compress.utils.choices import coerce
from moe_compress.utils.files import read_json, require_writable, write_json

HERE = Path(__file__).resolve().parent
MODELS, OUT, TABLE = "tiny-mixtral tiny-deepseek", "runs/paper_table", "paper_table.md"
AWQ = "quantize method=awq bits=4 group_size={group}"
TRIMMING = {
    "expert_drop": "expert_drop preset=paper ratio={ratio}",
    "layer_drop": "layer_drop drop={layers}",
    "block_drop": "block_drop drop={blocks}",
}
# As in the paper, what is quantized is trimmed, not the other way round.
BOTH = {f"{name}-awq": f"{AWQ} + {trimming}" for name, trimming in TRIMMING.items()}
RECIPES = {
    "awq": AWQ,
    **{name: text for pair in zip(TRIMMING.items(), BOTH.items(), strict=True) for name, text in pair},
}
TOKENS = 2048
DECIDED = ("model", "out", "name", "results", "eval", "revision")
PARENT_DEATH_SIGNAL = 1
# What is kept of a cell: a folder a kind, in it a file called NAME.json, NAME.done or NAME-SETTINGS.json.
KINDS = ("records", "flops", "speed", "tasks")
OUTPUT = re.compile(r"\.json|\.done|-[0-9a-f]{6}\.json")
# A run that was killed leaves snakemake's lock behind, and ours not.
SNAKEMAKE = ("--keep-going", "--rerun-incomplete", "--nolock", "--quiet", "host", "reason", "rules")


@dataclass(frozen=True)
class Sizes:
    """How much a model loses: MoE blocks, whole layers, a share of the experts; how many inputs share a scale."""

    layers: int
    blocks: int
    group: int
    ratio: float = 0.25


PAPER = {"mixtral-8x7b-v0.1": Sizes(8, 5, 128), "deepseek-moe-16b-base": Sizes(4, 4, 64)}


def sizes_of(model: str, given: Mapping[str, str]) -> Sizes:
    """The paper's for its models, the shares of its Mixtral for others; `given` words replace them."""
    found = PAPER.get(Path(model).name.lower())
    if found is None:
        layers = layers_of(model)
        layer_drop, block_drop = (max(1, round(layers * part / 32)) for part in (8, 5))
        found = Sizes(layer_drop, block_drop, 32 if zoo.descends_from(model) else 128)
    kinds = {"layers": int, "blocks": int, "group": int, "ratio": float}
    return replace(found, **{key: coerce(kind, given[key], key) for key, kind in kinds.items() if key in given})


def grid(models: Sequence[str], words: Mapping[str, str]) -> dict[str, Any]:
    """Models, cells, and the words of every job, as paper_table.smk wants them.

    Raises ValueError for models that are not there or share a name, for words that are unknown or wrong, and for
    recipes that a model cannot follow.
    """
    stems = {Path(os.path.abspath(model)).name: model for model in models}
    if not models or len(stems) < len(models):
        raise ValueError(f"MODEL={' '.join(models)!r}: models of different names are needed, separated by spaces.")
    small = all(zoo.descends_from(model) for model in models)
    cells: dict[str, dict[str, str]] = {}
    for stem, model in stems.items():
        filled = asdict(sizes_of(model, words))
        for name, text in RECIPES.items():
            cells[f"{stem}-{name}"] = {"model": stem, "cell": name, "recipe": text.format(**filled)}
    for cell in cells.values():
        model = stems[cell["model"]]
        forecast(parse(cell["recipe"], options={"model": model}), config_folder(model))
    threads = coerce(int, words.get("threads", 1 if small else os.cpu_count() or 1), "threads")
    return {
        "models": {stem: _source(model) for stem, model in stems.items()},
        "cells": cells,
        "words": _words(words, small),
        "threads": threads,
        "command": f"{shlex.quote(sys.executable)} -P -m moe_compress",
        "writer": f"{shlex.quote(sys.executable)} -P {shlex.quote(str(HERE / 'paper_rows.py'))}",
    }


def _source(model: str) -> dict[str, Any]:
    """A model as the command line takes it, and the files of a user's own that all of its cells depend on."""
    folder = local_folder(model)
    if folder is None or model in zoo.NAMES:
        return {"path": model, "files": []}
    return {"path": shlex.quote(str(folder)), "files": sorted(map(str, folder.glob("*.safetensors")))}


def _words(words: Mapping[str, str], small: bool) -> dict[str, str]:
    """For each command the words that are for it. ValueError for one that is for none, and for wrong values."""
    of_speed, of_tasks = (HARNESSES[name].declaration.parameters for name in ("speed", "tasks"))
    takers = {
        "run": tuple(Options.model_fields),
        "speed": tuple(key for key in of_speed if key not in ("original", "results")),
        "tasks": tuple(key for key in of_tasks if key != "original"),
        "sizes": tuple(vars(Sizes(1, 1, 1))),
    }
    known = [key for taker in takers.values() for key in taker if key not in DECIDED]
    for key in words:
        if key not in known:
            raise ValueError(f"unknown word {key!r}; known: out, {', '.join(dict.fromkeys(known))}. Models are MODEL=.")
    found = {name: {key: words[key] for key in taker if key in words} for name, taker in takers.items()}
    found["speed"] = ({"quick": "true"} if small else {"prompts": f"{TOKENS}", "batches": "1"}) | found["speed"]
    make_options(found["run"])
    setting_of(**found["speed"])
    asked = HARNESSES["tasks"].typed(found["tasks"])
    if "tasks" in words:
        selection.choose(words["tasks"], asked.get("fewshot", 0))
    found["run"].pop("threads", None)  # which Snakemake shares out
    of_run = {key: value for key, value in found["run"].items() if key in HARNESSES["tasks"].options}
    found["tasks"] = {"tasks": "local" if small else "paper"} | found["tasks"] | of_run
    found["evaluate"] = {key: value for key, value in found["run"].items() if key in USED["evaluate"]}
    found["flops"] = {"tokens": f"{TOKENS}", "context": f"{TOKENS}"}
    found["compress"] = {key: value for key, value in found["run"].items() if not key.startswith("eval_")}
    return {name: shlex.join(f"{key}={value}" for key, value in each.items()) for name, each in found.items()}


@contextlib.contextmanager
def alone(out: Path) -> Iterator[int]:
    """Hold a lock on the folder, which the system takes back when this process and its snakemake have ended."""
    handle = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield handle
    except BlockingIOError:
        raise ValueError(
            f"another run is writing {out}, perhaps jobs of one that was killed: wait until they have ended (pgrep -af "
            f"{out.name} shows them), or choose another out=."
        ) from None
    finally:
        os.close(handle)


def end_with_parent() -> None:
    """Called in snakemake's process before it begins: killed with this one, it starts no more jobs."""
    with contextlib.suppress(OSError, AttributeError):  # other systems than Linux
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGTERM)


def forget(out: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Remove what was measured under another recipe, of another model or with other words.

    Snakemake makes it anew, but until then, and where that fails, it would stand in the table for what is asked now.
    """
    changed = {what for what in new["words"] if old["words"].get(what) != new["words"][what]}
    for name, cell in old["cells"].items():
        model = cell["model"]
        same = new["cells"].get(name) == cell and old["models"][model] == new["models"].get(model)
        for kind in KINDS:
            if not same or not changed.isdisjoint(("run", kind)):
                for path in (out / kind).glob(f"{name}[.-]*"):
                    if path.is_file() and OUTPUT.fullmatch(path.name.removeprefix(name)):
                        path.unlink()
    for model in old["models"]:
        if old["models"][model] != new["models"].get(model) or not changed.isdisjoint(("run", "tasks")):
            for pattern in (f"{model}.original", f"records/{model}-original*.json", f"tasks/{model}-??????.json"):
                for path in out.glob(pattern):
                    path.unlink()


def run(out: Path, values: Mapping[str, Any], flags: Sequence[str], *, dry: bool = False) -> int:
    """Run what is missing or changed, then make the table of what there is; the first exit status that is not 0."""
    chosen = any(flag.startswith(("-c", "-j", "--cores", "--jobs", "--profile")) for flag in flags)
    cores = () if chosen else ("--cores", "all")
    base = (sys.executable, "-m", "snakemake", "--snakefile", str(HERE / "paper_table.smk"), "--directory", str(out))
    with alone(out) as handle:
        config = out / ("grid.dry.json" if dry else "grid.json")
        if not dry and config.is_file():
            forget(out, read_json(config), values)
        write_json(config, values)
        codes = [
            subprocess.run(
                [*base, "--configfile", str(config), *SNAKEMAKE, *cores, *flags, "--", target],
                check=False, pass_fds=(handle,), preexec_fn=end_with_parent,
            ).returncode
            for target in ("cells", "table")
        ]  # fmt: skip
    return next((code for code in codes if code), 0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Words are `key=value`; what begins with a dash, and all behind it, is for snakemake."""
    arguments = sys.argv[1:] if arguments is None else arguments
    dash = next((at for at, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    try:
        words = option_pairs(arguments[:dash])
        out = Path(os.path.abspath(words.pop("out", OUT)))
        values = grid(os.environ.get("MODEL", MODELS).split(), words)
        require_writable(out, f"out={out}")
        out.mkdir(parents=True, exist_ok=True)
        flags = arguments[dash:]
        dry = not {"-n", "--dry-run", "--dryrun"}.isdisjoint(flags)
        code = run(out, values, flags, dry=dry)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not dry and (out / TABLE).is_file():
        print((out / TABLE).read_text(encoding="utf-8"), end="")
    if code:
        print(f"error: not all jobs ended well; their logs are in {out / 'logs'}.", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
