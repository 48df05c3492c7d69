"""A model that changes while it is read is noticed, and a changed model is another one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import moe_compress
from moe_compress.checkpoints import file_digests, reader
from moe_compress.checkpoints.reader import open_checkpoint
from moe_compress.compression import pipeline
from support.interrupted import leftovers


@pytest.fixture
def model(reader_folder, tmp_path) -> Path:
    shutil.copytree(reader_folder("mixtral"), tmp_path / "model")
    return tmp_path / "model"


def flip(file: Path, place: int) -> None:
    """Change one byte."""
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def test_a_model_that_changes_during_a_run_ends_it(model, options, monkeypatch):
    plan_stage = pipeline.plan_stage

    def meanwhile(*given: object) -> object:
        flip(model / "model.safetensors", -1)
        return plan_stage(*given)

    monkeypatch.setattr(pipeline, "plan_stage", meanwhile)
    with pytest.raises(ValueError, match=r"model\.safetensors changed while it was being read"):
        moe_compress.compress("expert_drop score=weight_norm keep=6", model=model, **{**options, "eval": False})
    assert leftovers(Path(str(options["results"]))) == []


@pytest.mark.parametrize("small", [1 << 30, 0], ids=["by tensors", "by files"])
def test_one_changed_byte_anywhere_makes_another_model(small, model, monkeypatch, tmp_path):
    monkeypatch.setattr(reader, "SMALL", small)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = model / "model.safetensors"
    found = [open_checkpoint(model).fingerprint]
    for place in (-1, -len(file.read_bytes()) // 2, -5000):
        flip(file, place)
        found.append(open_checkpoint(model).fingerprint)
    flip(file, -1), flip(file, -len(file.read_bytes()) // 2), flip(file, -5000)
    assert len(set(found)) == 4 and open_checkpoint(model).fingerprint == found[0]


def test_a_large_file_is_read_once(model, monkeypatch, tmp_path):
    monkeypatch.setattr(reader, "SMALL", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    read: list[Path] = []
    digest = file_digests._digest
    monkeypatch.setattr(file_digests, "_digest", lambda path: (read.append(path), digest(path))[1])
    first = open_checkpoint(model).fingerprint
    assert open_checkpoint(model).fingerprint == first and read == [model / "model.safetensors"]


def test_the_hub_s_name_of_a_file_is_its_digest(tmp_path):
    blob = tmp_path / "blobs" / ("ab" * 32)
    blob.parent.mkdir()
    blob.write_bytes(b"weights")
    (tmp_path / "model.safetensors").symlink_to(blob)
    assert file_digests.digests([tmp_path / "model.safetensors"]) == {"model.safetensors": "ab" * 32}
