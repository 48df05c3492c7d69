"""What each way to recover makes of the best of each kind of compression: the runs, and tables of their records."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path

from scipy.stats import kendalltau

from common import paired_difference
from moe_compress import zoo
from moe_compress.reports.reading import load_records
from moe_compress.reports.record import Record
from moe_compress.reports.table_formats import Cells, markdown, with_interval

# The folder in results/ of all that recovers.
RECOVERED = "recovered"
# All that the text has; the other rows see less, and so do not stand beside these.
RECOVERY_TEXT = {"samples": 512}
# One budget of training tokens for all that trains: steps of 8 windows of 256.
STEPS = 100
STUDENTS = {
    "A": "expert_drop score=reap budget=search ratio=0.25",
    "B": "expert_drop score=reap budget=search ratio=0.5",
    "C": "expert_merge grouping=hc_smoe by=logits average=saliency align=both router=sum ratio=0.25",
    "D": "factorise structure=auto ratio=0.5",
    "E": "block_drop drop=2",
    "F": "quantize method=gptq bits=2 group_size=32",
}
RECOVERIES = (
    "router_kd solver=ridge",
    f"router_kd steps={STEPS}",
    f"layerwise train=all steps={STEPS}",
    f"distill train=all steps={STEPS}",
)
# Codes are trained by stages of their own.
PACKED_RECOVERIES = (
    "router_kd solver=ridge",
    f"router_kd steps={STEPS}",
    f"qad steps={STEPS} lr=0.001",
    f"qad learns=codes steps={STEPS} lr=0.001",
)
# What is trained with two seeds.
SEEDED = "C"
# What is packed, and trained as such.
PACKED = "F"
METRIC = "delta_nll"


def recovered() -> list[tuple[str, int]]:
    """(sentence, seed) of every run that recovers, and of those beside which it stands."""
    return [(_sentence(letter, recovery), seed) for letter, recovery, seed in _runs()]


def run_name(model: str, sentence: str, seed: int) -> str:
    """What the record of a run is called."""
    words = sentence.replace("expert_drop ", "").replace(" ", "-").replace("=", "-").replace(":", ".")
    return f"{model}-{words.replace('+', 'then')}-seed{seed}"


def _runs() -> list[tuple[str, str, int]]:
    """What is recovered, how (empty: not), and the seed; of one student, every recovery with another seed as well."""
    runs = [(letter, recovery, 0) for letter in STUDENTS for recovery in ("", *_recoveries(letter))]
    return [*runs, *((SEEDED, recovery, 1) for recovery in ("", *RECOVERIES))]


def _sentence(letter: str, recovery: str) -> str:
    return f"{STUDENTS[letter]} + {recovery}" if recovery else STUDENTS[letter]


def _recoveries(letter: str) -> tuple[str, ...]:
    return PACKED_RECOVERIES if letter == PACKED else RECOVERIES


def recovery(folder: Path) -> str:
    """All tables of the records in `folder`, with their headings."""
    runs = Runs(folder)
    if not runs.found:
        return ""
    students = "; ".join(f"{letter} `{student}`" for letter, student in STUDENTS.items())
    parts = [
        f"**Recovery** of {students}. Change of NLL, and behind it the difference to no recovery, paired by document:",
        markdown(Cells.of(runs.changes())),
        f"{SEEDED} with two seeds, which draw the windows of the text and their order in training anew:",
        markdown(Cells.of(runs.seeds())),
        "What a recovery took, the median over what is recovered and over the models:",
        markdown(Cells.of(runs.costs())),
        "From best to worst, before and after, and how far the two orders agree (Kendall's tau, 1: wholly). Codes of F "
        "are trained by qad where others have layerwise (scales) and distill (codes):",
        markdown(Cells.of(runs.orders())),
    ]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def conclusions(folder: Path) -> str:
    """What the records say in five sentences, figures from the least to the most of the models; empty without all."""
    runs = Runs(folder)
    if len(runs.found) < len(zoo.NAMES) * len(_runs()):
        return ""
    ridge, routers, layers, whole = RECOVERIES
    unpacked = STUDENTS.keys() - {PACKED}
    behind, compared = runs.behind("C", "A")
    merged, dropped = runs.span("C", routers), runs.span("A", routers)
    said = [
        f"Router KD helps merging: {merged} comes back, {dropped} where as many experts were dropped.",
        f"Routers in closed form (`solver=ridge`) bring back {runs.span(STUDENTS, ridge)}.",
        f"All weights bring back {runs.span(unpacked, layers)} layer by layer, "
        f"{runs.span(unpacked, whole)} end to end.",
        f"In experts of 2 bits, scales bring back {runs.span(PACKED, layers)}, codes too {runs.span(PACKED, whole)}.",
        "The order of methods after recovery is much that before it (Kendall's tau "
        f"{runs.taus(routers)} after Router KD, {runs.taus(layers)} layer by layer, {runs.taus(whole)} end to end); "
        f"merging is behind dropping in {behind} of {compared} pairs.",
    ]
    heading = f"Recovered on {runs.median(whole, 'tokens'):,.0f} tokens, of the NLL that was lost:"
    return "\n".join([heading, "", *(f"- {sentence}" for sentence in said)]) + "\n"


class Runs:
    """The records in a folder by model, what is recovered, how, and seed; no recovery is an empty one."""

    def __init__(self, folder: Path) -> None:
        self.documents = folder / "documents"
        self.found: dict[tuple[str, str, str, int], Record] = {}
        for record in load_records(sorted((folder / "records").glob("*.json"))):
            for letter, recovery, seed in _runs():
                if record.name == run_name(record.model, _sentence(letter, recovery), seed):
                    self.found[record.model, letter, recovery, seed] = record
        self.models = sorted({model for model, *_ in self.found})

    def changes(self) -> list[dict[str, str]]:
        """A row for everything that is recovered, and for every recovery of it; columns: models."""
        rows = []
        for letter in STUDENTS:
            for recovery in ("", *_recoveries(letter)):
                row = {"recovery": f"**{letter}**" if not recovery else f"{letter} + {recovery}"}
                rows.append(row | {model: self._cell(model, letter, recovery) for model in self.models})
        return rows

    def _cell(self, model: str, letter: str, recovery: str) -> str:
        after, before = (self.found.get((model, letter, each, 0)) for each in (recovery, ""))
        if after is None or before is None:
            return ""
        metric = after.metrics[METRIC]
        said = with_interval(metric.value, metric.interval, ".3f")
        return f"{said}; {self._difference(after, before)}" if recovery else said

    def _difference(self, after: Record, before: Record) -> str:
        sums = [self.documents / f"{record.name}.safetensors" for record in (after, before)]
        return paired_difference(sums[:1], sums[1:])

    def seeds(self) -> list[dict[str, str]]:
        """A row for what is trained twice and every recovery of it; columns: models; cells: of both seeds."""
        rows = []
        for recovery in ("", *RECOVERIES):
            row = {"recovery": f"{SEEDED} + {recovery}" if recovery else f"**{SEEDED}**"}
            for model in self.models:
                values = [self._value(model, SEEDED, recovery, seed) for seed in (0, 1)]
                row[model] = " and ".join("" if value is None else f"{value:.3f}" for value in values)
            rows.append(row)
        return rows

    def _value(self, model: str, letter: str, recovery: str, seed: int = 0) -> float | None:
        record = self.found.get((model, letter, recovery, seed))
        return None if record is None else record.metrics[METRIC].value

    def costs(self) -> list[dict[str, str]]:
        """A row for every recovery: tokens it was trained on, or made of, and processor seconds."""
        rows = []
        for name in dict.fromkeys((*RECOVERIES, *PACKED_RECOVERIES)):
            tokens, seconds = (self.median(name, cost) for cost in ("tokens", "processor_seconds"))
            if tokens == tokens:
                rows.append({"recovery": name, "tokens": f"{tokens:,.0f}", "processor seconds": f"{seconds:.0f}"})
        return rows

    def orders(self) -> list[dict[str, str]]:
        """A row for no recovery and for every kind of it; columns: models; cells: letters from best to worst."""
        rows = []
        for name in ("", *RECOVERIES):
            row = {"recovery": name or "none"}
            for model in self.models:
                sides = self.sides(model, name)
                order = " ".join(sorted(sides, key=lambda letter: sides[letter][0]))
                row[model] = f"{order} ({_tau(sides):.2f})" if len(sides) > 1 else order
            rows.append(row)
        return rows

    def sides(self, model: str, recovery: str) -> dict[str, tuple[float, float]]:
        """What everything lost after a recovery (of what is packed: that in its place) and before, where both are."""
        found = {}
        for letter in STUDENTS:
            own = _recoveries(letter)[RECOVERIES.index(recovery)] if recovery else ""
            after, before = self._value(model, letter, own), self._value(model, letter, "")
            if after is not None and before is not None:
                found[letter] = after, before
        return found

    def span(self, letters: Iterable[str], recovery: str) -> str:
        """The least and the most that comes back of what was lost, over models and what is recovered."""
        pairs = [pair for m in self.models for each, pair in self.sides(m, recovery).items() if each in letters]
        found = [1 - after / before for after, before in pairs]
        return f"{min(found):.0%} to {max(found):.0%}"

    def taus(self, recovery: str) -> str:
        """How far the orders after and before agree, the least and the most of the models."""
        found = [_tau(self.sides(model, recovery)) for model in self.models]
        return f"{min(found):.2f} to {max(found):.2f}"

    def behind(self, worse: str, better: str) -> tuple[int, int]:
        """In how many pairs, of models and recoveries (and none), one loses more than the other; how many there are."""
        found = [self.sides(model, recovery) for model in self.models for recovery in ("", *RECOVERIES)]
        return sum(sides[worse][0] > sides[better][0] for sides in found), len(found)

    def median(self, recovery: str, cost: str) -> float:
        """Of what a recovery took, over models and what is recovered; NaN where it has no run."""
        told = [record.report[-1]["recovery"] for (*_, each, _), record in self.found.items() if each == recovery]
        return statistics.median(each[cost] for each in told) if told else math.nan


def _tau(sides: Mapping[str, tuple[float, float]]) -> float:
    """Kendall's tau of the orders after and before."""
    return float(kendalltau(*zip(*sides.values(), strict=True)).statistic)
