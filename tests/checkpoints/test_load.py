"""Loading gives an ordinary model; an original that moved or changed is noticed."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch

import moe_compress
from moe_compress.checkpoints.load import load_tokenizer
from support import readers


@pytest.fixture(autouse=True)
def _said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "moe_compress")


def test_load_gives_an_ordinary_model(reader_folder, options):
    made = moe_compress.compress("expert_drop budget=global", model=reader_folder("mixtral"), **options).folder
    model = moe_compress.load(made, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and not model.training
    assert moe_compress.load(reader_folder("mixtral")).dtype == torch.float32


def test_an_original_that_moved_or_changed(options, caplog, tmp_path):
    folder = readers.save_model("mixtral", tmp_path / "model")
    made = moe_compress.compress("expert_drop", model=folder, **{**options, "eval": False}).folder
    readers.save_model("mixtral", folder, seed=3)
    moe_compress.evaluate(made, **options)
    assert "is not what it was when" in caplog.text
    folder.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"the original of .* is needed \(or original=\): there is no model"):
        moe_compress.evaluate(made, **options)
    assert moe_compress.evaluate(made, original=tmp_path / "moved", **options).record.model == "moved"


def test_a_normalizer_that_grows_without_end(reader_folder, tmp_path):
    """Each of them doubles a letter: forty of them would take all memory."""
    folder = shutil.copytree(reader_folder("mixtral"), tmp_path / "model")
    said = json.loads((folder / "tokenizer.json").read_text())
    doubled = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    said["normalizer"] = {"type": "Sequence", "normalizers": [doubled] * 5}
    (folder / "tokenizer.json").write_text(json.dumps(said))
    assert load_tokenizer(folder, 320)("a")["input_ids"]
    said["normalizer"]["normalizers"] *= 8
    (folder / "tokenizer.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match=r"makes up to 1\.1e\+12 characters of one, and at most 1000 are taken"):
        load_tokenizer(folder, 320)
