"""Every trimming method at about 25 % and 50 % on the zoo's models: records, then tables and pictures.

What is already recorded is not run again.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import moe_compress
from common import RESULTS, add_smoke
from moe_compress import zoo
from moe_compress.checkpoints.folder import stage_folder
from moe_compress.cli.terminal import set_up_logging
from moe_compress.evaluation.harnesses import report_columns
from moe_compress.methods.score_registry import scores
from moe_compress.reports.html_report import make_report
from moe_compress.reports.reading import load_records
from moe_compress.reports.record import Failure, now
from moe_compress.reports.table import write_tables
from readme_tables import write_picture, write_summary
from recovery_tables import RECOVERED, RECOVERY_TEXT, recovered, run_name

README = RESULTS.parent / "README.md"
SMOKE = {"samples": 2, "length": 64, "eval_samples": 4, "eval_length": 64}
RATIOS = (0.25, 0.5)
RANDOM_SEEDS = range(5)
CONTROLS = (
    "expert_drop score=gate_mass gate=full ratio=0.25",
    "expert_drop score=gate_mass gate=full ratio=0.5",
    "expert_drop score=reap ratio=0.25 reverse=true",
    "expert_drop score=reap ratio=0.25 budget=global",
    "expert_drop score=reap ratio=0.5 budget=global",
    "expert_drop preset=paper",
    "expert_drop preset=paper ratio=0.5",
)
# Run at both ratios.
EXPERTS = (
    "expert_drop score=naee propagate=compressed",
    "expert_drop score=naee budget=global",
    "expert_drop score=reap propagate=compressed",
    "expert_drop score=reap novice=mean",
    "expert_drop score=reap budget=search",
    "expert_merge preset=hc_smoe",
    "expert_merge preset=hc_smoe router=centroid",
    "expert_merge preset=m_smoe",
    "expert_merge preset=m_smoe router=centroid budget=layer",
    "expert_merge preset=ream",
    "expert_merge preset=ream router=sum",
    "expert_merge grouping=hc_smoe by=logits average=saliency align=both router=sum",
)
LAYERS = (
    "layer_drop drop=1",
    "layer_drop drop=2",
    "layer_drop drop=3",
    "layer_drop drop=2 metric=without_norm",
    "layer_drop drop=1 part=attention",
    "block_drop drop=1",
    "block_drop drop=2",
    "block_drop drop=2 mode=consecutive",
    "skip share=0.5",
)
ACTIVE = {
    "tiny-mixtral": ("top_k k=1", "top_k mean=1.4", "top_k mean=1.4 on=noise"),
    "tiny-deepseek": ("top_k k=3", "top_k k=2", "top_k mean=3", "top_k mean=3 on=noise"),
}

# What decides the order of the ways to prune is run on three calibration texts.
ORDER_SEEDS = range(3)
ORDER = (
    "prune method=wanda sparsity=0.5",
    "prune method=sparsegpt sparsity=0.5",
    "prune method=wanda pattern=2:4",
    "prune method=sparsegpt pattern=2:4",
)
SLIMMING = (
    "prune method=magnitude sparsity=0.5",
    "prune method=magnitude pattern=2:4",
    "prune method=sparsegpt sparsity=0.5 propagate=original",
    "prune method=sparsegpt sparsity=0.75",
    "prune method=wanda sparsity=0.5 allocate=utilisation",
    "prune method=wanda sparsity=0.5 allocate=sensitivity",
    "prune method=wanda sparsity=0.5 allocate=both",
    "prune method=wanda sparsity=0.5 allocate=owl",
    "prune method=sparsegpt sparsity=0.5 allocate=both",
    "channels score=camera ratio=0.25",
    "channels score=camera ratio=0.5",
    "channels score=camera ratio=0.25 budget=global",
    "channels score=camera ratio=0.5 budget=global",
    "channels score=heapr ratio=0.25",
    "channels score=heapr ratio=0.5",
    "channels score=heapr ratio=0.25 budget=global",
    "channels score=heapr ratio=0.5 budget=global",
    "channels score=camera ratio=0.25 within=layer",
    "channels score=camera ratio=0.25 within=layer budget=global",
    "channels score=heapr ratio=0.25 within=layer",
    "channels score=heapr ratio=0.25 within=layer budget=global",
    "channels score=heapr ratio=0.5 within=layer budget=global",
    "channels score=wanda ratio=0.25",
    "channels score=magnitude ratio=0.25",
)
# What decides the order of the ways to quantize is run on three calibration texts, too.
QUANTIZED_ORDER = (
    "quantize method=gptq bits=2 group_size=32",
    "quantize method=gptq bits=3 group_size=32",
    "quantize method=gptq bits=4 group_size=32",
    "quantize method=awq bits=3 group_size=32",
)
QUANTIZED = (
    "quantize method=rtn bits=2 group_size=32",
    "quantize method=rtn bits=3 group_size=32",
    "quantize method=rtn bits=4 group_size=32",
    "quantize method=rtn bits=8 group_size=32",
    "quantize method=awq bits=2 group_size=32",
    "quantize method=awq bits=4 group_size=32",
    "quantize method=gptq bits=3 act_order=true group_size=32",
    "quantize method=gptq bits=auto budget=2.5 group_size=32",
    "quantize method=gptq bits=auto budget=3 group_size=32",
    "quantize method=gptq bits=auto budget=3 by=gradient group_size=32",
    "quantize method=gptq bits=auto budget=3 per=expert group_size=32",
    "quantize method=gptq bits=auto budget=3 per=layer group_size=32",
    "quantize method=gptq bits=auto budget=3 by=used group_size=32",
    "quantize method=gptq bits=auto budget=3 by=rare group_size=32",
    "quantize method=gptq bits=auto budget=2.5 by=used group_size=32",
    "quantize method=gptq bits=auto budget=2.5 by=rare group_size=32",
    "quantize method=gptq bits=4 group_size=32 where=all",
    "quantize method=gptq bits=4 group_size=32 where=experts,router",
    "quantize group_size=32 + expert_drop ratio=0.25",
    "expert_drop ratio=0.25 + quantize group_size=32",
    "quantize group_size=32 + layer_drop drop=1",
    "layer_drop drop=1 + quantize group_size=32",
    "quantize group_size=32 + block_drop drop=1",
    "block_drop drop=1 + quantize group_size=32",
    "prune method=sparsegpt pattern=2:4 + quantize group_size=32",
    "channels score=camera ratio=0.25 + quantize group_size=32",
)
# Whole numbers on both sides of the experts' products, or of all; and only what experts elsewhere would be sent.
ACTIVATIONS = (
    "activations where=sent",
    "activations where=experts",
    "activations where=all",
    "quantize method=rtn bits=8 group_size=0 format=packed + activations",
    "quantize group_size=32 format=packed + activations where=sent",
)
# What decides whether experts had better share something is run on three calibration texts on two of the models.
STRUCTURES = ("svd", "base_delta", "shared_basis", "basis_mixture", "wrapper", "sparse_low_rank", "auto")
KEPT = (0.75, 0.5)
FACTORED_ORDER = tuple(f"factorise structure={name} ratio={kept}" for name in STRUCTURES for kept in KEPT)
FACTORED = (
    "factorise structure=svd ratio=0.5 objective=plain",
    "factorise structure=svd ratio=0.5 objective=anchored",
    "factorise structure=svd ratio=0.5 objective=two_sided",
    "factorise structure=svd ratio=0.5 budget=layer",
    "factorise structure=svd ratio=0.5 budget=global",
    "factorise structure=svd ratio=0.5 budget=global weigh=uniform",
    "factorise structure=svd ratio=0.5 budget=global objective=two_sided",
    "factorise structure=svd ratio=0.5 grams=pooled",
    "factorise structure=svd ratio=0.5 propagate=original",
    "factorise structure=base_delta ratio=0.5 align=true",
    "factorise structure=base_delta ratio=0.5 objective=plain",
    "factorise structure=base_delta ratio=0.5 budget=global",
    "factorise structure=wrapper ratio=0.5 objective=plain solver=adam",
    "factorise structure=basis_mixture ratio=0.5 activation=silu",
    "factorise structure=shared_basis ratio=0.5 budget=global",
    "factorise structure=sparse_low_rank ratio=0.5 budget=global",
    "factorise structure=sparse_low_rank ratio=0.75 budget=global",
    "factorise structure=auto ratio=0.75 budget=global",
    "factorise structure=auto ratio=0.5 budget=global",
    "factorise structure=auto ratio=0.25 budget=global",
    "factorise structure=auto ratio=0.75 + quantize method=rtn bits=4 group_size=32",
    "expert_drop ratio=0.25 + factorise structure=auto ratio=0.75",
    "channels score=camera ratio=0.25 + factorise structure=auto ratio=0.75",
)
SHARED = {
    "tiny-mixtral": (),
    "tiny-deepseek": (
        "prune method=sparsegpt pattern=2:4 where=experts,shared",
        "prune method=sparsegpt pattern=2:4 where=experts,shared spare=shared",
    ),
}


def recipes(model: str) -> list[tuple[str, int]]:
    """(sentence, seed) of every run on one model."""
    grid = itertools.product(scores(), RATIOS)
    found = [(f"expert_drop score={score} ratio={ratio}", 0) for score, ratio in grid if score != "random"]
    found += [(f"expert_drop score=random ratio={r}", s) for r in RATIOS for s in RANDOM_SEEDS]
    found += [(f"{sentence} ratio={ratio}", 0) for sentence, ratio in itertools.product(EXPERTS, RATIOS)]
    family = model.removesuffix("-seed1")
    found += [
        (sentence, 0)
        for sentence in (*CONTROLS, *LAYERS, *ACTIVE[family], *SLIMMING, *QUANTIZED, *ACTIVATIONS, *SHARED[family])
    ]
    found += [(sentence, 0) for sentence in FACTORED]
    found += list(itertools.product((*ORDER, *QUANTIZED_ORDER), ORDER_SEEDS))
    found += itertools.product(FACTORED_ORDER, ORDER_SEEDS if model == family else (0,))
    return found


def run_model(model: str, results: Path, smoke: bool) -> None:
    """All recipes on one model (of a smoke run, the first on a little text); checkpoints are measured and removed."""
    for sentence, seed in recipes(model)[: 1 if smoke else None]:
        run_recipe(sentence, model, results, {"seed": seed, **(SMOKE if smoke else {})})
    students = results / RECOVERED / "students" / model
    for sentence, seed in [] if smoke else recovered():
        run_recipe(sentence, model, results / RECOVERED, {"seed": seed, **RECOVERY_TEXT}, students)
    shutil.rmtree(students, ignore_errors=True)


def run_recipe(
    sentence: str, model: str, results: Path, options: Mapping[str, Any], students: Path | None = None
) -> None:
    """One run that is not yet recorded. students: where what is recovered is made once for all that recovers it."""
    name = run_name(model, sentence, options["seed"])
    if (results / "records" / f"{name}.json").is_file():
        return
    out = results / "checkpoints" / name
    shutil.rmtree(out, ignore_errors=True)
    try:
        if students is not None and " + " in sentence:
            _begin_with_student(sentence.partition(" + ")[0], model, results, out, options, students)
        moe_compress.compress(sentence, model=model, name=name, out=str(out), results=str(results), **options)
    except ValueError as error:
        failure = Failure(name=name, model=model, recipe=sentence, reason=str(error), written=now())
        failure.save(results / "failures")
        return
    for folder in (out, stage_folder(out, 0)):
        shutil.rmtree(folder, ignore_errors=True)


def _begin_with_student(
    student: str, model: str, results: Path, out: Path, options: Mapping[str, Any], students: Path
) -> None:
    """Put what is recovered where the recipe's first stage would leave it."""
    place = students / f"{student.replace(' ', '-')}-seed{options['seed']}"
    moe_compress.compress(student, model=model, out=str(place), results=str(results), eval=False, **options)
    begun = stage_folder(out, 0)
    shutil.rmtree(begun, ignore_errors=True)
    shutil.copytree(place, begun)


def run_all(results: Path) -> None:
    """Each model in a process of its own, two at a time."""
    names = list(zoo.NAMES)
    for pair in (names[0::2], names[1::2]):
        command = [sys.executable, __file__, "--results", str(results), "--model"]
        running = [subprocess.Popen([*command, name]) for name in pair]
        failed = [process.args for process in running if process.wait() != 0]
        if failed:
            sys.exit(f"error: {failed} failed; run the same command again to go on.")


def rebuild(results: Path) -> None:
    """What follows from the records, and from the sums per document beside them, alone."""
    for folder in (results, results / RECOVERED):
        if (folder / "records").is_dir():
            for path in write_tables(moe_compress.table([folder / "records"]), folder):
                print(path)
    write_summary(results, README if results.resolve() == RESULTS else None)
    for path in write_picture(load_records(sorted((results / "records").glob("*.json"))), results):
        print(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is not yet recorded of all models, or of one; without --model, then make what is made from records."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=zoo.NAMES, help="run the recipes on this one only, and make no tables")
    parser.add_argument(
        "--tables-only", action="store_true", help="run nothing: only rebuild what is made from records"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    add_smoke(parser)
    given = parser.parse_args(arguments)
    set_up_logging(verbose=False)
    if given.smoke and given.results.resolve() == RESULTS:
        parser.error("--smoke needs --results, a folder that is not the shipped one.")
    if given.model:
        return run_model(given.model, given.results, given.smoke)
    if not given.tables_only:
        run_all(given.results)
    rebuild(given.results)
    if not given.tables_only:
        make_report([given.results / "records"], given.results, report_columns())
        for name in ACTIVE:
            moe_compress.analyze(name, results=str(given.results), out=given.results / "analysis" / name)


if __name__ == "__main__":
    main()
