"""The Python functions behind the command line, one each, with the same names and the same words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from moe_compress.analysis.checkpoint_analysis import ModelAnalysis, analyse_checkpoint, write_analysis
from moe_compress.analysis.layer_analysis import SIMILAR, require_cosine
from moe_compress.checkpoints.load import load_model, load_packed, load_tokenizer, require_memory
from moe_compress.checkpoints.reader import Checkpoint, open_checkpoint
from moe_compress.checkpoints.resolve import config_folder, resolve_model
from moe_compress.compression import export as padding
from moe_compress.compression import failures
from moe_compress.compression.forecast import Forecast, forecast
from moe_compress.compression.pipeline import Outcome, apply_plan_file, compress_checkpoint
from moe_compress.data.prompts import prompt_windows, read_prompts
from moe_compress.evaluation import generations
from moe_compress.evaluation.generations import Comparison
from moe_compress.evaluation.harnesses import flops, routing, speed, tasks, verify
from moe_compress.evaluation.pair import open_pair, require_same_tokens
from moe_compress.evaluation.quality import evaluate as evaluation
from moe_compress.evaluation.saved_report import save_sealed
from moe_compress.hub.card import update_card
from moe_compress.hub.push import Upload, prepare, send
from moe_compress.recipes.parser import parse
from moe_compress.recipes.recipe import Recipe
from moe_compress.reports.html_report import report
from moe_compress.reports.reading import Places
from moe_compress.reports.record import Record
from moe_compress.reports.table import Table, read_tables
from moe_compress.run.context import Run, start
from moe_compress.run.options import Options, make_options
from moe_compress.run.progress import progress_bar
from moe_compress.utils.choices import coerce
from moe_compress.utils.devices import threads
from moe_compress.utils.logging import log

__all__ = [
    "Result", "analyze", "apply", "compare", "compress", "evaluate", "export", "flops", "load", "plan", "push",
    "report", "routing", "run_recipe", "speed", "start", "table", "tasks", "verify",
]  # fmt: skip


@dataclass(frozen=True)
class Result:
    """What a command made: the checkpoint's folder, its record and the original's (None where not evaluated)."""

    folder: Path | None
    record: Record | None
    original: Record | None


def compress(sentence: str, /, *overrides: str, **options: Any) -> Result:
    """Run a recipe (`"expert_drop score=reap keep=6"`, or a .yaml file) and evaluate the result.

    Options are those of `recipe.Options`: model, out, seed, data, samples, length, dtype, device, ...
    """
    return run_recipe(parse(sentence, overrides, options))


def run_recipe(parsed: Recipe) -> Result:
    """Compress, evaluate, save the records."""
    run = start(parsed.options)
    with threads(parsed.options.threads):
        outcome = compress_checkpoint(parsed, run)
        with failures.record_failure(parsed, parsed.options.name or outcome.folder.name, run):
            return _evaluated(outcome, run)


def apply(plan_file: str | Path, /, *, any_model: bool | str = False, **options: Any) -> Result:
    """Apply a saved plan, edited by hand or not, without calibration; then evaluate the result.

    any_model: also to a model that it was not made for.
    """
    given = make_options({"model": "", **options})
    run = start(given)
    with threads(given.threads):
        outcome = apply_plan_file(Path(plan_file), given, run, coerce(bool, any_model, "any_model"))
        return _evaluated(outcome, run)


def evaluate(checkpoint: str | Path, /, original: str | Path | None = None, **options: Any) -> Result:
    """Measure a checkpoint (zoo name, folder, hub id) against its original: the one it was made from, unless named."""
    opened, base, run = open_pair(checkpoint, original, options, "evaluate")
    with threads(run.options.threads):
        return _record(opened, base, run)


def _evaluated(outcome: Outcome, run: Run) -> Result:
    if not run.options.eval:
        return Result(outcome.folder, None, None)
    return _record(open_checkpoint(outcome.folder), outcome.source, run)


def _record(checkpoint: Checkpoint, base: Checkpoint, run: Run) -> Result:
    record, original = evaluation.evaluate_pair(checkpoint, base, run)
    if not (run.results("records") / f"{original.name}.json").is_file():
        original.save(run.results("records"))
    path = record.save(run.results("records"))
    update_card(checkpoint, base, record, original)
    run.log.event("evaluated", record=str(path), metrics=record.model_dump()["metrics"])
    return Result(checkpoint.folder, record, original)


def plan(sentence: str, /, *overrides: str, **options: Any) -> Forecast:
    """Validate a recipe and forecast sizes, FLOPs and memory from config.json alone."""
    parsed = parse(sentence, overrides, options)
    return forecast(parsed, config_folder(parsed.options.model, parsed.options.revision))


def analyze(
    model: str | Path,
    /,
    *,
    layers: str | Sequence[int] = "",
    prompts: str | Path = "",
    threshold: float = SIMILAR,
    out: str | Path = "",
    **options: Any,
) -> ModelAnalysis:
    """What the experts of the MoE layers (all, or `layers`) do, and which could go; also as files, in `out`.

    prompts: a file of prompts to use instead of the calibration text; threshold: cosine of outputs from which on two
    experts are alike. A calibration with probes that was made earlier is used again.
    """
    limit = require_cosine(coerce(float, threshold, "threshold"))
    run = start(_options_for(model, options, "analyze"))
    words = layers if isinstance(layers, str) else ",".join(map(str, layers))
    with threads(run.options.threads):
        found = analyse_checkpoint(run, words, str(prompts), limit)
    return write_analysis(found, Path(out) if out else run.results("analysis") / found.model)


def compare(
    before: str | Path,
    after: str | Path,
    /,
    *,
    prompts: str | Path = "default",
    max_tokens: int = generations.MAX_TOKENS,
    **options: Any,
) -> Comparison:
    """Greedy generations of two models side by side, and how close their predictions are.

    prompts: a file, whose text the predictions are compared on; `default`: a few prompts, and the evaluation text.
    """
    first, second = (resolve_model(str(model)) for model in (before, after))
    require_same_tokens(second, first)
    count = coerce(int, max_tokens, "max_tokens")
    positions = getattr(first.config, "max_position_embeddings", None) or count + 1
    if not 0 < count < positions:
        raise ValueError(f"max_tokens={count}: a number from 1 to {positions - 1} is needed for {first.name}.")
    run = start(_options_for(before, {**options, "resident": True}, "compare"))
    require_memory((first, second), run.dtype, run.device, "have to be whole to generate")
    if str(prompts) == "default":
        given, windows = list(generations.DEFAULT_PROMPTS), run.windows("heldout", first)
        tokenizer = load_tokenizer(first.folder, first.config.vocab_size)
    else:
        given, tokenizer = read_prompts(Path(prompts)), load_tokenizer(first.folder, first.config.vocab_size)
        windows = prompt_windows(given, tokenizer, Path(prompts).name)
        if windows.ids_NS.shape[1] < 2:
            raise ValueError(f"{prompts}: every prompt is a single token, which predicts nothing: give longer ones.")
    with threads(run.options.threads), progress_bar("comparing") as progress:
        one, other = (evaluation.layers_of(each, run).model for each in (first, second))
        found = generations.compare(one, other, tokenizer, given, windows, count, progress)
    names = {"before": Path(first.name).name, "after": Path(second.name).name}
    save_sealed(run.results("generations") / f"{names['before']}-{names['after']}.json", {**names, **asdict(found)})
    return found


def _options_for(model: str | Path, options: dict[str, Any], command: str) -> Options:
    if "model" in options:
        raise ValueError(f"{command} takes the model as a word of its own, without model=.")
    return make_options({**options, "model": model}).resolved()


def export(checkpoint: str | Path, /, out: str | Path = "", pad: bool = False) -> Path:
    """The plain equivalent of an edited checkpoint, where dead experts (`pad`) make one possible; else ValueError."""
    opened = resolve_model(str(checkpoint))
    if not pad:
        raise ValueError("export needs --pad: dead experts in uneven layers are the one way it makes a model plain.")
    target = Path(out) if out else opened.folder.with_name(f"{opened.folder.name}-padded")
    with progress_bar("writing") as progress:
        return padding.pad(opened, target, progress)


def push(
    checkpoint: str | Path,
    repo: str,
    /,
    *,
    private: bool | str = False,
    dry_run: bool | str = False,
    message: str = "",
    revision: str | None = None,
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


def load(model: str | Path, dtype: torch.dtype | None = None, **keywords: Any) -> PreTrainedModel:
    """A checkpoint (zoo name, folder or hub id), plain or edited, as an ordinary transformers model.

    Packed weights stay packed in memory, and run in torch's int4 and int8 kernels where the activations are bfloat16.
    """
    checkpoint = resolve_model(str(model))
    if not checkpoint.packed:
        return load_model(checkpoint.folder, dtype, **keywords)
    device = torch.device(str(keywords.pop("device_map", "cpu")))
    attn = keywords.pop("attn_implementation", None)
    if keywords:
        raise ValueError(
            f"{', '.join(keywords)}: a packed checkpoint is loaded with dtype=, device_map= (one device) and "
            "attn_implementation=; stock transformers takes everything else, and makes its weights dense."
        )
    return load_packed(checkpoint, dtype or checkpoint.stored_dtype, device, attn)
