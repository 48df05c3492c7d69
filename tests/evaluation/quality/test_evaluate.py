"""Evaluation: streamed and resident alike, an original measured once, a record for each protocol."""

from __future__ import annotations

import pytest

import moe_compress
from support import readers, tiny
from support.slow import slow_after


def test_models_that_cannot_be_compared(reader_folder, options, tmp_path):
    other = tiny.save(tiny.make("mixtral"), tmp_path / "other")
    with pytest.raises(ValueError, match=r"has 320 tokens and .* 96: they cannot be compared"):
        moe_compress.evaluate(reader_folder("mixtral"), original=other, **options)
    with pytest.raises(ValueError, match="evaluate takes the checkpoint as its first word"):
        moe_compress.evaluate(reader_folder("mixtral"), model="x", **options)


FAMILIES = ("mixtral", "deepseek_v3")


@pytest.mark.parametrize("family", slow_after(1, FAMILIES))
def test_streamed_and_resident_models_give_the_same_numbers(family, reader_folder, options):
    made = moe_compress.compress(
        "expert_drop budget=global score=random seed=1", model=reader_folder(family), **{**options, "eval": False}
    ).folder
    streamed = moe_compress.evaluate(made, **options)
    resident = moe_compress.evaluate(
        made, **{**options, "resident": True, "results": options["results"] + "2", "name": "resident"}
    )
    assert streamed.record.metrics == resident.record.metrics
    assert streamed.original.metrics == resident.original.metrics
    assert streamed.record.protocol == resident.record.protocol
    assert (streamed.record.name.startswith(made.name), resident.record.name) == (True, "resident")


def test_an_original_is_measured_once(reader_folder, options, forwards):
    moe_compress.evaluate(reader_folder("mixtral"), **options)
    forwards.clear()
    result = moe_compress.evaluate(reader_folder("mixtral"), **options)
    assert not forwards and result.record is result.original
    assert "delta_nll" not in result.record.metrics


def test_each_protocol_has_its_record_and_its_table(reader_folder, options, texts, tmp_path):
    made = moe_compress.compress("expert_drop", model=reader_folder("mixtral"), **options).folder
    moe_compress.evaluate(made, **{**options, "eval_data": str(texts / "calibration.txt")})
    tables = moe_compress.table([tmp_path / "results" / "records"])
    assert len(tables) == 2
    assert all(list(table.frame["form"]) == ["original", "plain"] for table in tables)


def test_evaluation_against_another_original(reader_folder, options, tmp_path):
    other = readers.save_model("mixtral", tmp_path / "other", seed=5)
    result = moe_compress.evaluate(reader_folder("mixtral"), original=other, **options)
    assert result.record.model == "other" and result.record.metrics["kl"].value > 0.01
