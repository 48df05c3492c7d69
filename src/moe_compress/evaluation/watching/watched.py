"""What a watch has found: a row a checkpoint, and the curve of all of them over the training's steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_compress.evaluation.watching.best import best_folder
from moe_compress.evaluation.watching.evaluated import ACCURACY, Evaluation, in_order
from moe_compress.reports import learning_curve, table_formats
from moe_compress.reports.table_formats import Cells

COLUMNS = {"perplexity": "perplexity", "kl": "KL", "top1_agreement": "same top token", ACCURACY: "right"}


@dataclass(frozen=True)
class Watched:
    """The evaluations of a training. best: that of the best checkpoint by `metric`, where one was asked for.

    ended: why no outcome came, in a sentence; empty where one did, or was not waited for.
    """

    out: Path
    place: Path
    evaluations: Sequence[Evaluation]
    metric: str = ""
    best: Evaluation | None = None
    ended: str = ""

    @property
    def exit_code(self) -> int:
        """1 where a checkpoint could not be evaluated, or the training came to no outcome."""
        return int(bool(self.ended) or any(each.error for each in self.evaluations))

    def markdown(self) -> str:
        """A row a checkpoint, in the order of their steps, and where the files are."""
        rows = []
        for each in in_order(self.evaluations):
            values = {title: each.value(name) for name, title in COLUMNS.items()}
            rows.append(
                {"checkpoint": "original" if each.step is None else f"step {each.step}", "tokens": f"{each.tokens:,}"}
                | {f"loss: {term}": f"{value:.4g}" for term, value in each.losses.items()}
                | {title: "" if value is None else f"{value:.4f}" for title, value in values.items()}
                | ({"not evaluated": each.error} if each.error else {})
            )
        said = [f"### {self.out.name}", table_formats.markdown(Cells.of(rows).filled()), f"evaluations: {self.place}"]
        if self.best is not None:
            said.append(f"best by {self.metric}: {self.best.title}, {best_folder(self.out)}")
        if self.ended:
            said.append(self.ended)
        return "\n\n".join(said) + "\n"


def write_curve(place: Path, evaluations: Sequence[Evaluation], png: bool) -> list[Path]:
    """The curve as pictures, in the folder of the evaluations."""
    curves = learning_curve.curves_of([dataclasses.asdict(each) for each in in_order(evaluations)])
    return learning_curve.write(place / "curve", evaluations[0].model, curves, png) if curves else []
