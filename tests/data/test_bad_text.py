"""Texts, domains and tokenizers that will not do are named before anything has run."""

from __future__ import annotations

import shutil

import pytest

import moe_compress
from support import readers


@pytest.mark.parametrize("key", ["data", "eval_data"])
@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("text.txt", b"", "holds no text"),
        ("text.txt", b" \n\n \n", "holds no text"),
        ("text.txt", b"\xff\xfe\x00", "is UTF-16 text"),
        ("text.txt", b"too short", "fewer tokens than one window of 16"),
        ("text.jsonl", b"", "text.jsonl"),
        ("text.jsonl", b'{"words": "a b c"}\n', "unknown field of text.jsonl 'text'"),
        ("text.jsonl", b"{broken", "cannot be read as json"),
        ("text.parquet", b"broken", "cannot be read as parquet"),
        ("missing.txt", None, "there is no file"),
    ],
)
def test_texts_that_will_not_do(key, name, content, said, reader_folder, refused, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    assert said in refused(model=reader_folder("mixtral"), **{key: path})


def test_a_missing_text_is_noticed_before_weights_are_there(reader_folder, refused, tmp_path):
    shutil.copy(reader_folder("mixtral") / "config.json", tmp_path / "config.json")
    for key in ("data", "eval_data"):
        assert "there is no file" in refused(model=tmp_path, **{key: tmp_path / "missing.txt"})


def test_an_applied_plan_reads_its_text_first(reader_folder, options, tmp_path):
    made = moe_compress.compress("expert_drop", model=reader_folder("mixtral"), **{**options, "eval": False}).folder
    words = {**options, "eval_data": tmp_path / "missing.txt", "out": tmp_path / "out"}
    with pytest.raises(ValueError, match="there is no file"):
        moe_compress.apply(made / "plan.json", **words)
    assert not list(tmp_path.glob("out*"))


def test_unknown_data_sets(reader_folder, refused):
    assert "unknown data set 'wikitext3': did you mean 'wikitext2'?" in refused(
        model=reader_folder("mixtral"), data="wikitext3"
    )
    assert "cannot be reached" in refused(model=reader_folder("mixtral"), eval_data="nobody/nothing")


def test_an_unknown_domain(reader_folder, refused, texts):
    said = refused(model=reader_folder("mixtral"), data=texts / "domains.jsonl", mix="pros:1")
    assert "did you mean 'prose'?" in said


def test_windows_of_one_token(reader_folder, refused):
    assert "at least 1 window of 2 tokens" in refused(model=reader_folder("mixtral"), length=1)


def test_tokenizers_that_do_not_fit(copy, refused):
    readers.tokenizer(size=readers.VOCAB + 40).save_pretrained(copy)
    said = refused(model=copy)
    assert "has ids up to" in said and "the model's vocabulary has 320: it belongs to another model." in said
    (copy / "tokenizer.json").write_text("{}")
    assert "holds no tokenizer that transformers can read" in refused(model=copy)
    for path in copy.glob("tokenizer*"):
        path.unlink()
    assert "holds no tokenizer that transformers can read" in refused(model=copy)


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe"])
def test_a_folder_whose_class_makes_a_tokenizer_of_nothing(family, reader_folder, refused, tmp_path):
    copied = shutil.copytree(reader_folder(family), tmp_path / family)
    for path in copied.glob("tokenizer*"):
        path.unlink()
    assert f"{copied} holds no tokenizer that transformers can read" in refused(model=copied)


def test_a_model_without_tokenizer_needs_none_for_surgery(copy, options):
    for path in copy.glob("tokenizer*"):
        path.unlink()
    assert moe_compress.compress("expert_drop score=random", model=copy, **{**options, "eval": False}).folder.is_dir()
