"""Which layers and router rows of the teacher stand where the student's do, after the edits between the two.

R rows of the teacher's router.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedModel

from moe_compress.checkpoints.folder import read_manifest
from moe_compress.checkpoints.reader import Checkpoint
from moe_compress.edits.apply import edits_by_layer
from moe_compress.edits.edits import Edit, KeepExperts, MergeExperts
from moe_compress.edits.plan_file import PLAN, read_plan
from moe_compress.models import hf
from moe_compress.models.moe import MoEView, all_moe_views


@dataclass(frozen=True, slots=True)
class Lineage:
    """sources: by layer of the student, the teacher's that it was; ends: the teacher's last one whose work it does;
    rows: by layer with experts, of each row of the teacher's router the student's, -1 for none; experts: of each of the
    student's experts there, which of the teacher's it was made of, with their shares.
    """

    sources: list[int]
    ends: list[int]
    rows: dict[int, list[int]]
    experts: dict[int, list[dict[int, float]]] = field(default_factory=dict)

    def span(self, layer: int) -> range:
        """The teacher's layers in whose place a layer of the student stands."""
        return range(self.ends[layer - 1] + 1 if layer else 0, self.ends[layer] + 1)


def edits_from(teacher: Checkpoint, origin: Checkpoint) -> list[Edit]:
    """All structural edits that led from a teacher to the model that a recipe starts from, as far as that says.

    ValueError where it says that it was made of another model.
    """
    manifest = read_manifest(origin.folder)
    if teacher.fingerprint == origin.fingerprint or manifest is None:
        return []
    if manifest["base"]["fingerprint"] != teacher.fingerprint or not (origin.folder / PLAN).is_file():
        raise ValueError(
            f"{origin.name} was not made of teacher={teacher.name}, so that their layers cannot be compared: name "
            f"{manifest['base']['model']}, or learn from next-token probabilities alone (router_kd, distill)."
        )
    return [edit for stage in read_plan(origin.folder / PLAN)[0] for edit in stage.plan.edits]


def lineage(student: PreTrainedModel, teacher: PreTrainedModel, edits: Sequence[Edit]) -> Lineage:
    """From skeletons or models. ValueError if the edits do not lead from the one to the other."""
    theirs, ours = all_moe_views(teacher), all_moe_views(student)
    total, count = (hf.num_layers(each.config) for each in (teacher, student))
    made = edits_by_layer(edits, total)
    sources = list(made)
    if len(sources) != count:
        raise ValueError(
            f"the teacher has {total} layers, of which {len(sources)} would be left, but the model has {count}: it was "
            "not made of this teacher."
        )
    _require_same_width(student, teacher)
    # What a layer that is gone did is the work of the one before it; of the first ones, of the one behind them.
    ends, rows = [*(place - 1 for place in sources[1:]), total - 1], dict[int, list[int]]()
    experts: dict[int, list[dict[int, float]]] = {}
    for layer, view in ours.items():
        there = theirs.get(sources[layer])
        rows[layer] = [] if there is None else rows_after(made[sources[layer]], there)
        if sorted({*rows[layer]} - {-1}) != list(range(view.router_rows)):
            raise ValueError(
                f"the router of layer {layer} does not descend from the teacher's: it was made of another."
            )
        experts[layer] = [] if there is None else members_after(made[sources[layer]], there.num_experts)
    return Lineage(sources, ends, rows, experts)


def _require_same_width(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    theirs, ours = (int(each.config.get_text_config().hidden_size) for each in (teacher, student))
    if theirs != ours:
        raise ValueError(
            f"the teacher's hidden states have {theirs} numbers, the model's {ours}: it was not made of this teacher."
        )


def rows_after(edits: Sequence[Edit], view: MoEView) -> list[int]:
    """Of each row of a router, the one that it is or has gone into after the edits of its layer, -1 for one that left.

    Rows of experts that were merged stay where gates add up, and go into the first one's where it answers for all.
    """
    experts, rows = view.num_experts, view.router_rows
    place, leads = list(range(rows)), list(view.row_to_expert or range(rows))
    ends = 1 + max([experts - 1, *leads])
    for edit in edits:
        if not isinstance(edit, KeepExperts | MergeExperts):
            continue
        target, joins = _targets(edit, experts, ends)
        left = [row for row, end in enumerate(leads) if end in target]
        number = {row: new for new, row in enumerate(left)}
        first = {end: number[row] for row, end in reversed([*enumerate(leads)]) if row in number}
        goes = [number.get(row, first.get(joins.get(end, -1), -1)) for row, end in enumerate(leads)]
        place = [row if row < 0 else goes[row] for row in place]
        leads = [target[leads[row]] for row in left]
        experts, before = len(edit.experts if isinstance(edit, KeepExperts) else edit.groups), experts
        ends += experts - before + (before - experts if isinstance(edit, KeepExperts) and edit.novices else 0)
    return place


def members_after(edits: Sequence[Edit], experts: int) -> list[dict[int, float]]:
    """Of each expert that is left after the edits of a layer, the ones that it was made of, with their shares.

    Merges weigh their members by what these were used.
    """
    members = [{expert: 1.0} for expert in range(experts)]
    for edit in edits:
        if isinstance(edit, KeepExperts):
            members = [members[expert] for expert in edit.experts]
        elif isinstance(edit, MergeExperts):
            members = [
                _joined([members[each] for each in group], weights)
                for group, weights in zip(edit.groups, edit.weights, strict=True)
            ]
    return members


def _joined(members: Sequence[Mapping[int, float]], weights: Sequence[float]) -> dict[int, float]:
    """What several experts were made of, each with its share of the weights; those without one have no part in it."""
    found: dict[int, float] = {}
    for each, weight in zip(members, weights, strict=True):
        for expert, share in each.items() if weight else ():
            found[expert] = found.get(expert, 0.0) + share * weight / sum(weights)
    return found


def _targets(edit: KeepExperts | MergeExperts, experts: int, ends: int) -> tuple[dict[int, int], Mapping[int, int]]:
    """Where what led to an expert or a constant leads now; of experts whose rows go, the one that answers for it."""
    if isinstance(edit, KeepExperts):
        new = {old: number for number, old in enumerate(edit.experts)}
        constants = {end: len(edit.experts) + end - experts for end in range(experts, ends)}
        gone = [each for each in range(experts) if each not in new] if edit.novices else []
        made = {old: len(edit.experts) + ends - experts + n for n, old in enumerate(gone)}
        return new | constants | made, {}
    added_up = edit.router == "sum"
    new = {old: n for n, group in enumerate(edit.groups) for old in (group if added_up else group[:1])}
    constants = {end: len(edit.groups) + end - experts for end in range(experts, ends)}
    return new | constants, {old: group[0] for group in edit.groups for old in group[1:]}
