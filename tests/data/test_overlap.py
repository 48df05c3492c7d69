"""Documents that two sources hold are used once; those that are evaluated on are not calibrated on."""

from __future__ import annotations

import shutil

import pytest

import moe_compress
from moe_compress.data.documents import DataSpec
from moe_compress.data.windows import make_windows
from moe_compress.recipes.parser import parse
from support import readers

OTHERS = [f"another line of text, number {number}, that is nowhere else" for number in range(8)]


@pytest.fixture
def two_files(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(readers.LINES))
    (tmp_path / "b.txt").write_text("\n\n".join([*(line.replace(" ", "  ") for line in readers.LINES[:3]), *OTHERS]))
    return f"{tmp_path / 'a.txt'}, {tmp_path / 'b.txt'}"


def test_repeated_documents_are_dropped_and_counted(two_files, caplog):
    words = {"samples": 22, "length": 64, "packed": False}
    tokenizer = readers.tokenizer()
    found = make_windows(DataSpec(source=two_files, use="calibration", **words), tokenizer)
    assert found.description["domains"] == {"a.txt": 8, "b.txt": 8} and found.description["repeated"] == 3
    assert len(found.digests) == 16
    assert "a.txt,b.txt: 3 documents that an earlier source holds as well are left out" in caplog.text
    evaluated = make_windows(DataSpec(source=two_files, use="heldout", **words), tokenizer)
    assert evaluated.description["domains"] == {"a.txt": 8, "b.txt": 11}


def test_each_source_has_the_windows_that_it_names(two_files):
    first, second = two_files.split(", ")
    spec = DataSpec(source=f"{first}:3, {second}", use="calibration", samples=5, length=16)
    assert make_windows(spec, readers.tokenizer()).description["domains"] == {"a.txt": 3, "b.txt": 2}


def test_text_that_is_evaluated_on_is_refused(reader_folder, refused, texts, tmp_path):
    model = {"model": reader_folder("mixtral")}
    heldout = texts / "heldout.txt"
    assert "is both data= and eval_data=" in refused(**model, data=heldout)
    shutil.copy(heldout, tmp_path / "renamed.txt")
    assert "the same content as" in refused(**model, data=tmp_path / "renamed.txt")
    mixed = tmp_path / "mixed.txt"
    mixed.write_text("\n\n".join([*OTHERS, *(line[::-1] for line in readers.LINES)]))
    said = refused(**model, data=mixed, samples=40)
    assert "documents of the calibration text are in the evaluation text as well" in said
    assert "allow_overlap=true" in said


def test_overlap_may_be_allowed_and_matters_only_where_there_is_an_evaluation(reader_folder, options, texts):
    given = {**options, "model": reader_folder("mixtral"), "data": str(texts / "heldout.txt")}
    assert moe_compress.compress("expert_drop", **given, allow_overlap=True).record is not None
    assert moe_compress.compress("expert_drop score=frequency", **{**given, "eval": False}).folder.is_dir()


def test_new_options_do_not_change_the_recipes_without_them():
    yaml = parse("expert_drop keep=6").to_yaml()
    for name in ("fields", "template", "system", "assistant_only", "allow_overlap"):
        assert name not in yaml
    assert "assistant_only: true" in parse("expert_drop keep=6 assistant_only=true").to_yaml()
