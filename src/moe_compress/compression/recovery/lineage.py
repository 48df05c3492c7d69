"""Which layers and router rows of the teacher stand where the student's do, after the edits between the two.

R rows of the teacher's router.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from moe_compress.checkpoints.folder import read_manifest
from moe_compress.checkpoints.reader import Checkpoint
from moe_compress.edits.ancestry import Ancestry
from moe_compress.edits.edits import Edit
from moe_compress.edits.plan_file import PLAN, read_plan
from moe_compress.models.moe import all_moe_views


@dataclass(frozen=True, slots=True)
class Lineage:
    """sources: by layer of the student, the teacher's that it was; ends: the teacher's last one whose work it does;
    rows: by layer with experts, of each row of the teacher's router the student's, -1 for none.
    """

    sources: list[int]
    ends: list[int]
    rows: dict[int, list[int]]

    def span(self, layer: int) -> range:
        """The teacher's layers in whose place a layer of the student stands."""
        return range(self.ends[layer - 1] + 1 if layer else 0, self.ends[layer] + 1)


def edits_between(student: Checkpoint) -> list[Edit]:
    """All structural edits that led from the model that a checkpoint of ours was made of to it; none for others."""
    if read_manifest(student.folder) is None or not (student.folder / PLAN).is_file():
        return []
    return [edit for stage in read_plan(student.folder / PLAN)[0] for edit in stage.plan.edits]


def lineage(student: PreTrainedModel, teacher: PreTrainedModel, edits: Sequence[Edit]) -> Lineage:
    """From skeletons or models. ValueError if the edits do not lead from the one to the other."""
    theirs, ours = all_moe_views(teacher), all_moe_views(student)
    total = int(teacher.config.get_text_config().num_hidden_layers)
    kin = Ancestry.of(edits, total, {i: view.num_experts for i, view in theirs.items()})
    count = int(student.config.get_text_config().num_hidden_layers)
    if len(kin.source) != count:
        raise ValueError(
            f"the teacher has {total} layers, of which {len(kin.source)} would be left, but the model has {count}: it "
            "was not made of this teacher."
        )
    # What a layer that is gone did is the work of the one before it; of the first ones, of the one behind them.
    ends = [*(place - 1 for place in kin.source[1:]), total - 1]
    rows: dict[int, list[int]] = {}
    for layer, view in ours.items():
        there = theirs[kin.source[layer]].router_rows
        # Merging with router=sum, and constants in place of experts, keep every row.
        place = list(range(there)) if view.router_rows == there else kin.place[layer]
        if len(place) != there or max(place, default=-1) >= view.router_rows:
            raise ValueError(
                f"the router of layer {layer} does not descend from the teacher's: it was made of another."
            )
        rows[layer] = place
    return Lineage(kin.source, ends, rows)
