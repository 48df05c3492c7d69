"""Summaries of the grid, from the records alone: results/summary.md, results/README.md, and what the README shows."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import paired_difference
from moe_compress.methods import registry
from moe_compress.reports import pareto
from moe_compress.reports.fronts import write_front
from moe_compress.reports.reading import load_records
from moe_compress.reports.record import Record
from moe_compress.reports.table import make_tables, one_row_each
from recipe_pairs import FACTORED_PAIRS, PAIRS, QUANTIZED_PAIRS
from recovery_tables import RECOVERED, conclusions, recovery

BEGIN, END = "<!-- results: made by scripts/benchmark/tables.sh -->", "<!-- end of results -->"
HEADING = """# Results

Every method on the models that ship with the package, beside the original on the same held-out text: change of the mean
NLL per token in nats with its 95 % interval over documents (of several calibration texts: mean, smallest to largest).
All of it is made from the records in `records/` by `bash scripts/benchmark/tables.sh --tables-only`; every column is in
[tables.md](tables.md).
"""
# What the README shows of one model: one recipe of each kind.
SHOWN_MODEL = "tiny-mixtral"
SHOWN = (
    "original",
    "expert_drop score=reap ratio=0.25",
    "expert_drop score=naee ratio=0.25",
    "expert_merge preset=ream ratio=0.25",
    "block_drop drop=1 mode=discrete",
    "prune method=sparsegpt sparsity=0.5",
    "quantize method=gptq bits=4 group_size=32",
    "expert_drop score=reap ratio=0.25 + quantize method=gptq bits=4 group_size=32",
)
METRIC = "delta_nll"
OTHERS = {"budget", "reverse", "protect", "unseen", "keep", "propagate", "novice"}
SCORE = "expert_drop"
# Recipes by the share of stored parameters that they remove.
SIZES = (
    ("About a quarter of the experts (5 % to 25 % of all parameters)", 0.05, 0.25),
    ("About half of the experts (25 % to 50 % of all parameters)", 0.25, 0.5),
)
BESIDE = ("score=reap", "score=naee", "score=random", "score=gate_mass", "score=aimer")
PRESETS = ("hc_smoe", "m_smoe", "ream")
# Recipes whose result no calibration text changes.
SEEDLESS = ("magnitude", "rtn")
Row = list[Record]


def cell(records: Row, note: str = "") -> str:
    """Change of NLL with its interval; several seeds: mean, smallest to largest."""
    found = [record.metrics[METRIC] for record in records]
    if not found:
        return ""
    if len(found) == 1:
        low, high = found[0].interval or (float("nan"),) * 2
        return f"{found[0].value:.3f} [{low:.3f}, {high:.3f}]{note}"
    values = [metric.value for metric in found]
    return f"{sum(values) / len(values):.3f} ({min(values):.3f} to {max(values):.3f}, {len(values)} seeds){note}"


def table(heading: str, grid: dict[str, dict[Any, Row]], columns: Sequence[Any], text: Callable[..., str]) -> str:
    """A table of the rows that have at least half of the columns: best mean first, then those with gaps."""
    shown = {name: found for name, found in grid.items() if 2 * len(found) >= len(columns)}

    def rank(name: str) -> tuple[int, float]:
        means = [_mean(found) for found in shown[name].values()]
        return len(columns) - len(means), sum(means) / len(means)

    order = sorted(shown, key=rank)
    titles = [" ".join(column) if isinstance(column, tuple) else column for column in columns]
    lines = [f"| {heading} | " + " | ".join(titles) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in order:
        cells = [text(shown[name][column]) if column in shown[name] else "" for column in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def scores(records: Sequence[Record]) -> str:
    """Rows: scores with a uniform budget; columns: model and ratio."""
    grid: dict[str, dict[Any, Row]] = {}
    for found in one_row_each(records):
        given = _given(found[0])
        if given.get("stage") != SCORE or "ratio" not in given or not OTHERS.isdisjoint(given):
            continue
        row = given["score"] + (f", {given['gate']} softmax" if "gate" in given else "")
        grid.setdefault(row, {})[found[0].model, f"{given['ratio']:.0%}"] = found
    columns = sorted({column for found in grid.values() for column in found}, key=lambda c: (int(c[1][:-1]), c[0]))
    return table("score", grid, columns, cell)


def trimming(records: Sequence[Record], low: float, high: float) -> str:
    """Rows: recipes that remove such a share of the stored parameters, a few scores among them; columns: models."""
    whole = _originals(records)
    grid: dict[str, dict[Any, Row]] = {}

    def removed(found: Row) -> float:
        return 1 - found[0].sizes["parameters"] / whole[found[0].model].sizes["parameters"]

    for found in one_row_each(records):
        given = _given(found[0])
        simple = given.get("stage") == SCORE and OTHERS.isdisjoint(given)
        if not given or not low <= removed(found) < high or (simple and not _name(given).endswith(BESIDE)):
            continue
        # What is kept in factors is no share of parameters alone, so that one name could stand for two sizes.
        grid.setdefault(_name(given, given["stage"] == "factorise"), {})[found[0].model] = found
    return table("recipe", grid, sorted(whole), lambda found: cell(found, f" at {-removed(found):.0%}"))


def active(records: Sequence[Record]) -> str:
    """Recipes that leave the stored parameters alone, one row a model: what they save per token."""
    whole = _originals(records)
    lines = ["| model | recipe | FLOPs per token | change of NLL |", "|---|---|---|---|"]
    rows = [found for found in one_row_each(records) if _given(found[0]).get("stage") in ("top_k", "skip")]
    for found in sorted(rows, key=lambda found: (found[0].model, _mean(found))):
        record = found[0]
        share = record.sizes["flops_per_token"] / whole[record.model].sizes["flops_per_token"] - 1
        lines.append(f"| {record.model} | {_name(_given(record), True)} | {share:+.0%} | {cell(found)} |")
    return "\n".join(lines) + "\n"


def pruning(records: Sequence[Record]) -> str:
    """Rows: recipes that set weights to zero; columns: models."""
    grid: dict[str, dict[Any, Row]] = {}
    for found in one_row_each(records):
        given = _given(found[0])
        if given.get("stage") == "prune":
            grid.setdefault(_name(given, True), {})[found[0].model] = found
    return table("recipe", grid, sorted(_originals(records)), cell)


def sized_by(records: Sequence[Record], method: str) -> str:
    """Rows: recipes with a stage of it, others beside it or not; columns: models; with the file's size."""
    grid: dict[str, dict[Any, Row]] = {}
    for found in one_row_each(records):
        if any(stage["method"] == method for stage in found[0].recipe) and not _rounds(found[0]):
            grid.setdefault(_stages(found[0]), {})[found[0].model] = found

    def sized(found: Row) -> str:
        return cell(found, f", {found[0].sizes['bytes'] / 2**20:.2f} MiB")

    return table("recipe", grid, sorted(_originals(records)), sized)


def rounding(records: Sequence[Record]) -> str:
    """Rows: recipes with rounded activations; columns: models; with how much of a token's experts stays the same."""
    grid: dict[str, dict[Any, Row]] = {}
    for found in one_row_each(records):
        if _rounds(found[0]):
            grid.setdefault(_stages(found[0]), {})[found[0].model] = found

    def routed(found: Row) -> str:
        return cell(found, f", experts {found[0].metrics['routing_overlap'].value:.3f}")

    return table("recipe", grid, sorted(_originals(records)), routed)


def _rounds(record: Record) -> bool:
    return any(stage["method"] == "activations" for stage in record.recipe)


def _stages(record: Record) -> str:
    """All stages of a recipe as a sentence."""
    return " + ".join(_name({"stage": stage["method"], **stage["given"]}, True) for stage in record.recipe)


def loaded(results: Path) -> str:
    """Packed zoo models beside their originals, from scripts/benchmark/quantization.sh: memory and speed."""
    figures = json.loads((results / "quantization.json").read_text())
    lines = ["| model, rounded to the nearest | file | weights in memory | decoding |", "|---|---|---|---|"]
    for name, found in figures["speed"].items():
        share = found["variant"]["weight_bytes"] / found["original"]["weight_bytes"]
        low, high = found["speedup_interval"]
        size = f"{found['file_bytes'] / 2**20:.2f} MiB"
        lines.append(f"| {name} | {size} | {share:.2f} x | {found['speedup']:.2f} [{low:.2f}, {high:.2f}] x as fast |")
    return "\n".join(lines) + "\n"


def paper(folder: Path) -> str:
    """The table of scripts/benchmark/paper_table.sh, and its front of bytes for each model; links from beside it."""
    text = (folder / "paper_table.md").read_text(encoding="utf-8").partition("\n")[2].strip()
    parts = ["**Trimming x slimming**, the grid of Table 3 of arXiv 2406.02500 on the tiny models:"]
    parts.append(re.sub(r"^## (.*)$", r"\1:", text, flags=re.MULTILINE))
    where = folder.name
    parts.append(
        f"Everything behind these rows: [{where}/report.html]({where}/report.html), one page without a network."
    )
    pictures = sorted(path for key in ("bytes", "latency") for path in (folder / "plots").glob(f"*-{key}.png"))
    parts += [f"![{path.stem}]({where}/plots/{path.name})" for path in pictures]
    return "\n\n".join(parts) + "\n"


def orderings(records: Sequence[Record], documents: Path, pairs: Sequence[tuple[str, str]]) -> str:
    """Differences between recipes, paired by document, each side the mean of its seeds."""
    rows: dict[tuple[str, str], Row] = {}
    for found in one_row_each(records):
        rows[_name(_given(found[0]), True) if _given(found[0]) else "", found[0].model] = found
    lines = []
    for better, worse in pairs:
        cells = []
        for model in sorted(_originals(records)):
            first, second = (rows.get((name, model), []) for name in (better, worse))
            kept = all(_sums(record, documents).is_file() for record in (*first, *second))
            cells.append(_difference(first, second, documents) if first and second and kept else "")
        lines.append(f"| {better} - {worse.partition(' ')[2]} | " + " | ".join(cells) + " |")
    models = sorted(_originals(records))
    return "\n".join([f"| difference | {' | '.join(models)} |", "|---" * (len(models) + 1) + "|", *lines]) + "\n"


def _difference(better: Row, worse: Row, documents: Path) -> str:
    """Mean difference per token. Both sides have the same seeds, but where no seed changes anything."""
    given = [row[0].recipe[0]["parameters"] for row in (better, worse)]
    shared = {record.seed for record in better} & {record.seed for record in worse}
    fixed = any(parameters.get("method") in SEEDLESS for parameters in given)
    rows = [[record for record in row if fixed or record.seed in shared] for row in (better, worse)]
    first, second = ([_sums(record, documents) for record in row] for row in rows)
    return paired_difference(first, second)


def _sums(record: Record, documents: Path) -> Path:
    """Where a record's sums per document are kept."""
    return documents / f"{record.name}.safetensors"


def _originals(records: Sequence[Record]) -> dict[str, Record]:
    return {record.model: record for record in records if record.form == "original"}


def _given(record: Record) -> dict[str, Any]:
    """Method and given parameters of a recipe of one stage, a preset by its name; empty for any other recipe."""
    if len(record.recipe) != 1:
        return {}
    stage = record.recipe[0]
    given = {"stage": stage["method"], **stage["given"]}
    for name, values in registry.find(stage["method"]).presets.items():
        differing = {key for key, value in values.items() if stage["parameters"][key] != value}
        if name in PRESETS and differing <= {"router", "budget", "keep", "ratio"} and "score" not in values:
            left = {k: v for k, v in given.items() if k not in values or k in differing}
            changed = {key: stage["parameters"][key] for key in differing if key not in ("keep", "ratio")}
            return {"stage": stage["method"], "preset": name, **left, **changed}
    return given


def _name(given: dict[str, Any], whole: bool = False) -> str:
    """The recipe as a sentence, without how much it removes (unless the whole is wanted)."""
    hidden = {"stage", "seed"} | (set() if whole else {"ratio"})
    words = [f"{key}={value}" for key, value in given.items() if key not in hidden]
    return " ".join([given["stage"], *words])


def _mean(records: Row, metric: str = METRIC) -> float:
    return sum(record.metrics[metric].value for record in records) / len(records)


def summary(records: Sequence[Record], documents: Path) -> str:
    """All tables with their headings."""
    parts = ["**Scores of Expert Drop**, equally many experts in every layer:", scores(records)]
    for title, low, high in SIZES:
        parts += [f"**{title}**, other ways of trimming beside a few scores; behind each cell what it removes:"]
        parts += [trimming(records, low, high)]
    parts += ["**Fewer active experts**, nothing removed from the file:", active(records)]
    parts += ["**Pruned weights**, the file as large as before:", pruning(records)]
    parts += ["Differences in pairs, of the mean over the calibration texts that both have; intervals over documents:"]
    parts += [orderings(records, documents, PAIRS)]
    parts += [
        "**Quantized experts**, groups of 32 inputs; behind each cell the size of the file:",
        sized_by(records, "quantize"),
    ]
    parts += ["Differences in pairs, as above:", orderings(records, documents, QUANTIZED_PAIRS)]
    parts += [
        "**Experts in factors**, `ratio` the share of their bytes that is kept; behind each cell the size of the file:"
    ]
    parts += [
        sized_by(records, "factorise"),
        "Differences in pairs, as above:",
        orderings(records, documents, FACTORED_PAIRS),
    ]
    parts += ["**Rounded activations**; behind each cell how much of a token's experts stays the same (Jaccard):"]
    parts += [rounding(records)]
    parts += [recovery(documents.parent / RECOVERED)]
    if (documents.parent / "quantization.json").is_file():
        where = "Loaded and run in bf16 on two CPU cores, where products in bf16 are slow, the original beside it;"
        parts += [f"{where} models this small have little to gain:", loaded(documents.parent)]
    if (documents.parent / "paper_table" / "paper_table.md").is_file():
        parts += [paper(documents.parent / "paper_table")]
    return "\n\n".join(part.rstrip() for part in parts if part) + "\n"


def shown(records: Sequence[Record]) -> str:
    """One recipe of each kind on one model: size, what it costs in quality, and what a token costs."""
    rows = {_sentence(found[0]): found for found in one_row_each(records) if found[0].model == SHOWN_MODEL}
    lines = ["| recipe | size | perplexity | change of NLL | same top token | FLOPs per token |", "|---" * 6 + "|"]
    for name in SHOWN:
        found = rows.get(name, [])
        if found:
            size, flops = (found[0].sizes[key] for key in ("bytes", "flops_per_token"))
            changed = [cell(found), f"{_mean(found, 'top1_agreement'):.3f}"] if name != "original" else ["", ""]
            cells = [f"{size / 2**20:.2f} MiB", f"{_mean(found, 'perplexity'):.2f}", *changed, f"{flops / 1e6:.2f} M"]
            lines.append(f"| {name if name == 'original' else f'`{name}`'} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _sentence(record: Record) -> str:
    """A record's recipe as the summaries name it."""
    if record.form == "original":
        return "original"
    return _name(_given(record), True) if len(record.recipe) == 1 else _stages(record)


def write_picture(records: Sequence[Record], results: Path) -> list[Path]:
    """Write pareto.png and pareto.svg: perplexity against size on disk of all that was made of one model."""
    table = next((each for each in make_tables(records) if each.title == SHOWN_MODEL), None)
    if table is None:
        return []
    fronts = pareto.make_fronts(table.cells.column("recipe"), table.rows, [results / "documents"])
    files = [write_front(results / "pareto", SHOWN_MODEL, each, png=True) for each in fronts if each.key == "bytes"]
    return [path for made in files for path in made]


def write_summary(results: Path, readme: Path | None) -> None:
    """Write summary.md and README.md beside the records, and a few rows between the markers of `readme`, if given."""
    records = load_records(sorted((results / "records").glob("*.json")))
    text, said = summary(records, results / "documents"), conclusions(results / RECOVERED)
    few = f"{shown(records)}\n{said}" if said else shown(records)
    (results / "summary.md").write_text(text, encoding="utf-8")
    # Links of the page lead from its own folder.
    page = f"{HEADING}\nOn {SHOWN_MODEL}, in short:\n\n{few}\n{text.replace('results/', '')}"
    (results / "README.md").write_text(page, encoding="utf-8")
    if readme is not None:
        fill(readme, few)


def fill(readme: Path, rows: str) -> None:
    """Put rows between the markers of a page; one without markers stays as it is."""
    before, begin, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        print(f"{readme} is as before, because it has no line {BEGIN!r} with {END!r} behind it.")
        return
    readme.write_text(f"{before}{BEGIN}\n\n{rows}\n{END}{after}", encoding="utf-8")
