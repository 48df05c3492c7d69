"""Which rows and layers of the teacher stand where the student's do, beside weights that say where they came from."""

from __future__ import annotations

import pytest
import torch

from moe_compress.compression.recovery.lineage import lineage, rows_after
from moe_compress.edits.edits import DropLayer, KeepExperts, MergeExperts
from moe_compress.models.moe import moe_views
from support.editing import cut, original

ONES = ((1.0,), (1.0, 1.0), (1.0, 1.0, 1.0))


def merge(*groups, router):
    return MergeExperts(1, groups, tuple(ONES[len(group) - 1] for group in groups), router)


# Edits of one layer of eight experts, and where each of the router's rows then is: those that stay keep their order.
EDITS = {
    "nothing": ([], [0, 1, 2, 3, 4, 5, 6, 7]),
    "dropped": ([KeepExperts(1, (6, 0, 3))], [0, -1, -1, 1, -1, -1, 2, -1]),
    "dropped twice": ([KeepExperts(1, (7, 0, 3, 5)), KeepExperts(1, (3, 0))], [-1, -1, -1, -1, -1, 0, -1, 1]),
    "one row for all": ([merge((2, 5, 0), (1, 3), (4,), (7, 6), router="centroid")], [1, 0, 1, 0, 2, 1, 3, 3]),
    "rows add up": ([merge((2, 5, 0), (1, 3), (4,), (7, 6), router="sum")], list(range(8))),
    "rows add up, then some go": (
        [merge((2, 5, 0), (1, 3), (4,), (7, 6), router="sum"), KeepExperts(1, (2, 0))],
        [0, -1, 1, -1, 2, 3, -1, -1],
    ),
    "rows add up, then one row for several": (
        [
            merge((2, 5), (1,), (0,), (3,), (4,), (7, 6), router="sum"),
            merge((0, 1), (5, 2, 3), (4,), router="centroid"),
        ],
        [3, 0, 0, 3, 1, 2, 3, 4],
    ),
    "constants": ([KeepExperts(1, (6, 0, 3), novices=True)], list(range(8))),
    "constants, then some go": (
        [KeepExperts(1, (6, 0, 3, 4), novices=True), KeepExperts(1, (3, 0))],
        [-1, 0, 1, -1, 2, 3, 4, 5],
    ),
    "constants twice": ([KeepExperts(1, (6, 0, 3), novices=True), KeepExperts(1, (1,), novices=True)], list(range(8))),
}


def tagged(source):
    """The model, each row of whose routers is its number."""
    model = original(source)
    for view in moe_views(model).values():
        view.router_rows_ED.data[:] = torch.arange(view.router_rows).float()[:, None]
    return model


def with_constants(edits, model):
    """The constants that dropped experts leave, where one has to be given."""
    view, found = moe_views(model)[1], []
    experts = view.num_experts
    for edit in edits:
        if isinstance(edit, KeepExperts) and edit.novices:
            outputs = {"outputs": torch.zeros(experts - len(edit.experts), view.router_rows_ED.shape[1])}
            edit = KeepExperts(1, edit.experts, novices=True, arrays=outputs)
        experts = len(edit.experts if isinstance(edit, KeepExperts) else edit.groups)
        found.append(edit)
    return found


@pytest.mark.parametrize("name", EDITS)
def test_rows_are_where_surgery_puts_them(name, sources, monkeypatch):
    """A row whose number is still there is where that number is."""
    edits, expected = EDITS[name]
    teacher = tagged(sources("mixtral"))
    view = moe_views(teacher)[1]
    assert rows_after(edits, view) == expected
    monkeypatch.setattr("support.editing.original", lambda source: tagged(source))
    student = cut(sources("mixtral"), with_constants(edits, teacher))
    left = moe_views(student)[1].router_rows_ED[:, 0].round().int().tolist()
    assert [expected[row] for row in left] == list(range(len(left)))
    rows = lineage(student, teacher, edits).rows
    assert rows[1] == expected and rows[0] == list(range(8))


@pytest.mark.parametrize(
    ("gone", "sources_of", "spans"),
    [
        ((), [0, 1, 2], [[0], [1], [2]]),
        ((1,), [0, 2], [[0, 1], [2]]),
        ((2,), [0, 1], [[0], [1, 2]]),
        ((0,), [1, 2], [[0, 1], [2]]),
        ((0, 0), [2], [[0, 1, 2]]),
    ],
)
def test_a_layers_place_is_that_of_the_dropped_ones_behind_it(gone, sources_of, spans, sources):
    teacher, edits = original(sources("mixtral")), [DropLayer(index) for index in gone]
    kin = lineage(cut(sources("mixtral"), edits), teacher, edits)
    assert kin.sources == sources_of and [list(kin.span(layer)) for layer in range(len(spans))] == spans


@pytest.mark.parametrize(
    ("edits", "claimed", "said"),
    [
        ([], [DropLayer(1)], "the teacher has 3 layers, of which 2 would be left, but the model has 3"),
        ([KeepExperts(1, (0, 1, 2))], [], "the router of layer 1 does not descend from the teacher's"),
        ([], [KeepExperts(1, (0, 1, 2))], "the router of layer 1 does not descend from the teacher's"),
    ],
)
def test_a_student_of_other_edits_is_another_teachers(edits, claimed, said, sources):
    source = sources("mixtral")
    with pytest.raises(ValueError, match=said):
        lineage(cut(source, edits), original(source), claimed)
