"""What the other harnesses measured is joined to the right rows."""

from __future__ import annotations

import pytest

from moe_compress.evaluation.speed import columns as speed
from moe_compress.evaluation.tasks.columns import accuracies, asked
from moe_compress.reports import companions, pareto
from support.records import ORIGINAL, SAME_AS, WORSE, speed_file, tasks_file


def test_latency_is_relative_to_the_original_and_of_one_setting():
    rows = [[ORIGINAL], [WORSE], [SAME_AS]]
    files = [speed_file("worse", 2.0, busy=True), speed_file("same_as", 1.25), speed_file("same_as", 9.0, batch=8)]
    files.append(speed_file("same_as", 5.0, processor="another"))
    timed = speed.speedups([each for file in files for each in speed.timed(file)], [ORIGINAL, WORSE, SAME_AS])
    values = {name: found[companions.LATENCY].value for name, found in timed.by_record.items()}
    assert values == {"worse": 0.5, "same_as": 0.8}
    for words in ("float32 on cpu (abacus), 1 thread(s)", "BUSY for 1", "in other settings: 2", "2 of too few starts"):
        assert words in timed.how
    front = pareto.make_fronts(["original", "worse", "same_as"], rows, (), timed)[-1]
    assert front.key == companions.LATENCY and [point.name for point in front.points] == [
        "worse",
        "same_as",
        "original",
    ]
    assert front.points[0].cost_interval == pytest.approx((1 / 2.1, 1 / 1.9))
    assert [front.key for front in pareto.make_fronts(["a", "b", "c"], rows)] == ["bytes", "flops_per_token"]
    (timing, *_) = speed.timed(speed_file("worse", 2.0))
    renamed = {"name": "mine", "fingerprint": "of worse"}
    for changes, same in (({"name": "worse-0a1b2c"}, True), ({"name": "worse-and-more"}, False), (renamed, True)):
        assert companions.made(timing, WORSE.model_copy(update=changes)) == same
    assert not companions.made(timing, WORSE.model_copy(update={"fingerprint": "of another"}))


def test_answers_to_the_same_tasks_are_joined():
    files = [
        tasks_file("worse", 0.5),
        tasks_file("same_as", 0.8),
        {**tasks_file("worse", 0.1), "settings": {"limit": 9}},
    ]
    found = accuracies([each for file in files for each in asked(file)], [WORSE, SAME_AS])
    assert {name: values["quiz right"].value for name, values in found.by_record.items()} == {
        "worse": 0.5,
        "same_as": 0.8,
    }
    assert found.how == "quiz, limit=5; not shown, as measured in other settings: 1" and accuracies(
        [], [WORSE]
    ) == companions.JoinedColumns({}, "")


def test_the_originals_answers_are_those_that_its_variants_were_beside():
    file = {**tasks_file("worse", 0.5), "original_fingerprint": "of original"}
    original = ORIGINAL.model_copy(update={"fingerprint": "of original"})
    for base, known in ((original, True), (original.model_copy(update={"fingerprint": "another"}), False)):
        found = accuracies(asked(file), [base, WORSE]).by_record
        assert ("tiny-original" in found) == known and found["worse"]["quiz right"].value == 0.5
    assert accuracies(asked(file), [original]).by_record["tiny-original"]["quiz right"].value == 0.9
