"""The Python functions behind the command line, one each, with the same names and the same words.

Harnesses (speed, tasks, routing, flops, verify) are functions of `evaluation`: see evaluation/harnesses.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from transformers import PreTrainedModel

from moe_compress.analysis.checkpoint_analysis import ModelAnalysis, analyse_checkpoint, write_analysis
from moe_compress.analysis.layer_analysis import SIMILAR, require_cosine
from moe_compress.calibration.imatrix import write_imatrix
from moe_compress.checkpoints.load import load_model, load_packed, load_tokenizer
from moe_compress.checkpoints.reader import Checkpoint, architecture_values, open_checkpoint
from moe_compress.checkpoints.resolve import config_folder, resolve_model, tokenizer_folder
from moe_compress.compression import failures
from moe_compress.compression.export import pad_experts
from moe_compress.compression.forecast import Forecast, forecast
from moe_compress.compression.full_matrices import in_factors, write_full_matrices
from moe_compress.compression.gguf_plan import cut_gguf
from moe_compress.compression.pipeline import Outcome, apply_plan_file, compress_checkpoint
from moe_compress.compression.recovery.assistance import assist
from moe_compress.data.show import ShownData, show
from moe_compress.evaluation.generations import MAX_TOKENS, Comparison, compare_checkpoints
from moe_compress.evaluation.harnesses import HARNESSES, report_columns
from moe_compress.evaluation.pair import open_pair
from moe_compress.evaluation.quality.evaluate import evaluate_pair
from moe_compress.evaluation.watching.watch import WatchWords, watch_training
from moe_compress.evaluation.watching.watched import Watched
from moe_compress.hub.card import update_card
from moe_compress.hub.push import Upload, prepare, send
from moe_compress.models import hf
from moe_compress.recipes.parser import parse
from moe_compress.recipes.recipe import Recipe
from moe_compress.reports.html_report import make_report
from moe_compress.reports.reading import Places
from moe_compress.reports.record import Record
from moe_compress.reports.table import Table, read_tables
from moe_compress.run.context import Run, start, text_spec
from moe_compress.run.options import Options, make_options, typed_words
from moe_compress.run.processes import joined
from moe_compress.run.progress import progress_bar
from moe_compress.utils.choices import AtLeast, Means, coerce
from moe_compress.utils.declarations import function_of
from moe_compress.utils.devices import threads
from moe_compress.utils.logging import log

if TYPE_CHECKING:
    from moe_compress.evaluation.flops.report import flops
    from moe_compress.evaluation.routing.report import routing
    from moe_compress.evaluation.speed.report import speed
    from moe_compress.evaluation.tasks.report import tasks
    from moe_compress.evaluation.verification.verify import verify

__all__ = [
    "Result", "analyze", "apply", "compare", "compress", "evaluate", "export", "export_gguf_plan", "export_imatrix",
    "flops", "load", "plan", "push", "report", "routing", "run_recipe", "show_data", "speed", "start", "table", "tasks",
    "verify", "watch",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in HARNESSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return HARNESSES[name].declaration.load()


@dataclass(frozen=True)
class Result:
    """What a command made: the checkpoint's folder, its record and the original's (None where not evaluated)."""

    folder: Path | None
    record: Record | None
    original: Record | None


def compress(sentence: str, /, *overrides: str, **options: Any) -> Result:
    """Run a recipe (`"expert_drop score=reap keep=6"`, or a .yaml file) and evaluate the result.

    Options are those of `run.options.Options`: model, out, seed, data, samples, length, dtype, device, ...
    """
    return run_recipe(parse(sentence, overrides, options))


def run_recipe(recipe: Recipe) -> Result:
    """Compress, evaluate, save the records. Of several processes (torchrun), the others help the first one train.

    What these get is empty.
    """
    with threads(recipe.options.threads):
        with joined(recipe.options.device) as processes:
            if processes.rank:
                assist(processes)
                return Result(None, None, None)
            run = start(recipe.options, processes)
            outcome = compress_checkpoint(recipe, run)
        with failures.record_failure(recipe, recipe.options.name or outcome.folder.name, run):
            return _evaluated(outcome, run)


def apply(plan_file: str | Path, /, *, any_model: bool = False, **options: Any) -> Result:
    """Apply a saved plan, edited by hand or not, without calibration; then evaluate the result.

    any_model: also to a model that it was not made for.
    """
    given = make_options({"model": "", **options})
    run = start(given)
    with threads(given.threads):
        outcome = apply_plan_file(Path(plan_file), given, run, coerce(bool, any_model, "any_model"))
        return _evaluated(outcome, run)


def evaluate(
    checkpoint: str | Path,
    /,
    original: Annotated[str | Path | None, Means("none: the one that it was made from")] = None,
    **options: Any,
) -> Result:
    """Measure a checkpoint (zoo name, folder, hub id) against its original: the one it was made from, unless named."""
    opened, base, run = open_pair(checkpoint, original, options, "evaluate")
    with threads(run.options.threads):
        return _record(opened, base, run)


def watch(  # noqa: PLR0913 - these are the command's words
    run_folder: str | Path,
    /,
    *,
    tasks: Annotated[str, Means("empty: none")] = "",
    limit: Annotated[Annotated[int, AtLeast(1)] | None, Means("none: all")] = None,
    every: Annotated[int, AtLeast(1)] = 1,
    best: Annotated[str, Means("empty: none is kept")] = "",
    once: bool = False,
    poll: float = 10.0,
    timeout: Annotated[float, Means("0: for ever")] = 3600.0,
    original: Annotated[str | None, Means("none: the one that it was made from")] = None,
    png: bool = False,
    log: Literal["jsonl", "wandb", "tensorboard"] = "jsonl",
    **options: Any,
) -> Watched:
    """Evaluate the checkpoints of a training as they appear, in a process of their own, until it has ended.

    run_folder: the training's out=; tasks, limit: as of the command tasks, and none without; every: only steps that
    this divides, and the last; best: a metric (kl, perplexity, accuracy, ...), whose best checkpoint is kept as
    RUN_FOLDER.best; once: what is there, and end; poll: seconds between two looks; timeout: seconds without a sign of
    life after which a training is given up; original: to compare with; png: the curve as PNG too; log: where metrics
    are shown besides.
    """
    given = {
        "tasks": tasks, "limit": limit, "every": every, "best": best, "once": once, "poll": poll, "timeout": timeout,
        "original": original, "png": png, "log": log,
    }  # fmt: skip
    typed = typed_words("watch", function_of(__name__, "watch"), {**given, **options})
    words = WatchWords(**{key: typed[key] for key in given})
    return watch_training(Path(run_folder), words, make_options({**options, "model": ""}))


def _evaluated(outcome: Outcome, run: Run) -> Result:
    if not run.options.eval:
        return Result(outcome.folder, None, None)
    return _record(open_checkpoint(outcome.folder), outcome.source, run)


def _record(checkpoint: Checkpoint, base: Checkpoint, run: Run) -> Result:
    record, original = evaluate_pair(checkpoint, base, run)
    if not (run.results("records") / f"{original.name}.json").is_file():
        original.save(run.results("records"))
    path = record.save(run.results("records"))
    update_card(checkpoint, base, record, original)
    run.log.event("evaluated", record=str(path), metrics=record.model_dump()["metrics"])
    return Result(checkpoint.folder, record, original)


def plan(sentence: str, /, *overrides: str, **options: Any) -> Forecast:
    """Validate a recipe and forecast sizes, FLOPs and memory from config.json alone."""
    recipe = parse(sentence, overrides, options)
    return forecast(recipe, config_folder(recipe.options.model, recipe.options.revision))


def analyze(
    model: str | Path,
    /,
    *,
    layers: Annotated[str | Sequence[int], Means("empty: all with experts")] = "",
    prompts: Annotated[str | Path, Means("empty: the calibration text")] = "",
    threshold: float = SIMILAR,
    out: Annotated[str | Path, Means("empty: a folder in results=")] = "",
    **options: Any,
) -> ModelAnalysis:
    """What the experts of the MoE layers (all, or `layers`) do, and which could go; also as files, in `out`.

    prompts: a file of prompts to use instead of the calibration text; threshold: cosine of outputs from which on two
    experts are alike. A calibration with output samples that was made earlier is used again.
    """
    limit = require_cosine(coerce(float, threshold, "threshold"))
    run = start(_options_for(model, options, "analyze"))
    words = layers if isinstance(layers, str) else ",".join(map(str, layers))
    with threads(run.options.threads):
        found = analyse_checkpoint(run, words, str(prompts), limit)
    return write_analysis(found, Path(out) if out else run.results("analysis") / found.model)


def show_data(model: str | Path, /, *, documents: int = 3, **options: Any) -> ShownData:
    """The first documents of every source of data=, as the tokenizer of a model gets them; needs no weights.

    documents: of each source. Conversations are written by the chat template; with assistant_only=true, what counts of
    them is shown as well.
    """
    count = coerce(int, documents, "documents")
    given = _options_for(model, options, "data show")
    folder = tokenizer_folder(given.model, given.revision)
    config = hf.config_from(architecture_values(folder))
    return show(
        text_spec(given, "calibration"),
        load_tokenizer(folder, config.get_text_config().vocab_size, given.trust_remote_code),
        count,
    )


def compare(
    before: str | Path,
    after: str | Path,
    /,
    *,
    prompts: Annotated[str | Path, Means("default: a few, and the evaluation text")] = "default",
    max_tokens: int = MAX_TOKENS,
    **options: Any,
) -> Comparison:
    """Greedy generations of two models side by side, and how close their predictions are.

    prompts: a file, whose text the predictions are compared on; `default`: a few prompts, and the evaluation text.
    """
    count = coerce(int, max_tokens, "max_tokens")
    pair = resolve_model(str(before)), resolve_model(str(after))
    given = _options_for(before, {**options, "resident": True}, "compare")
    return compare_checkpoints(*pair, given, str(prompts), count)


def _options_for(model: str | Path, options: dict[str, Any], command: str) -> Options:
    if "model" in options:
        raise ValueError(f"{command} takes the model as a word of its own, without model=.")
    return make_options({**options, "model": model}).resolved()


def export(
    checkpoint: str | Path, /, out: Annotated[str | Path, Means("empty: beside it")] = "", pad: bool = True
) -> Path:
    """The plain equivalent of an edited checkpoint, where dead experts in uneven layers make one possible.

    Of experts in factors: their whole matrices, which save no memory.


    pad: accepted for what was written earlier; padding is the one way there is.
    """
    coerce(bool, pad, "pad")
    opened = resolve_model(str(checkpoint))
    factored = in_factors(opened)
    ending = "full" if factored else "padded"
    target = Path(out) if out else opened.folder.with_name(f"{opened.folder.name}-{ending}")
    with progress_bar("writing") as progress:
        return (write_full_matrices if factored else pad_experts)(opened, target, progress)


def export_gguf_plan(
    plan_file: str | Path,
    file: str | Path,
    /,
    out: Annotated[str | Path, Means("empty: beside it")] = "",
    any_model: bool = False,
) -> Path:
    """What a saved plan leaves of a GGUF file of its model, byte for byte; of a split one, a folder of as many files.

    any_model: also of a file that calls itself otherwise than the plan's model.
    """
    named = coerce(bool, any_model, "any_model")
    return cut_gguf(Path(plan_file), Path(file), Path(out) if out else None, named)


def export_imatrix(
    model: str | Path, /, out: Annotated[str | Path, Means("empty: a file in results=")] = "", **options: Any
) -> Path:
    """What the inputs of a model's matrices weigh on the calibration text, for llama.cpp's quantization: an imatrix."""
    run = start(_options_for(model, options, "export imatrix"))
    with threads(run.options.threads):
        return write_imatrix(run, Path(out) if out else None)


def push(
    checkpoint: str | Path,
    repo: str,
    /,
    *,
    private: bool = False,
    dry_run: bool = False,
    message: Annotated[str, Means("empty: what was uploaded")] = "",
    revision: Annotated[str | None, Means("none: the default branch")] = None,
) -> Upload:
    """Upload a checkpoint of ours to the hub as user/name, in one commit, without paths of this machine.

    private: of a repository that is made for it; dry_run: only say what would be sent, without a network; message: of
    the commit; revision: the branch.
    """
    hidden, dry = coerce(bool, private, "private"), coerce(bool, dry_run, "dry_run")
    upload = prepare(resolve_model(str(checkpoint)), repo, hidden)
    return upload if dry else replace(upload, url=send(upload, message, revision))


def table(records: Places = "runs/records") -> list[Table]:
    """Tables of records (files, or folders of them), one per protocol and original model; broken ones are skipped.

    Runs that did not finish are rows as well: those that left a failure in the folder beside.
    """
    found, skipped = read_tables(records)
    for sentence in skipped:
        log.warning("skipped: %s.", sentence)
    return found


def report(records: Places = "runs/records", out: str | Path = "runs", *, png: bool = False) -> list[Path]:
    """Write out/report.html and out/plots/ of records, and of what harnesses left beside them; returns their paths.

    png: draw the fronts as PNG as well as SVG, which takes a second more.
    """
    return make_report(records, out, report_columns(), coerce(bool, png, "png")).files


def load(model: str | Path, dtype: torch.dtype | None = None, **keywords: Any) -> PreTrainedModel:
    """A checkpoint (zoo name, folder or hub id), plain or edited, as an ordinary transformers model.

    Packed weights stay packed in memory, and run in torch's int4 and int8 kernels where the activations are bfloat16.
    """
    checkpoint = resolve_model(str(model))
    if checkpoint.loads_as_stock:
        return load_model(checkpoint.folder, dtype, **keywords)
    device = torch.device(str(keywords.pop("device_map", "cpu")))
    attn = keywords.pop("attn_implementation", None)
    if keywords:
        raise ValueError(
            f"{', '.join(keywords)}: a packed checkpoint is loaded with dtype=, device_map= (one device) and "
            "attn_implementation=; stock transformers takes everything else, and makes its weights dense."
        )
    return load_packed(checkpoint, dtype or checkpoint.stored_dtype, device, attn)
