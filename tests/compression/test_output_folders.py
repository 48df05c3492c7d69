"""Places where nothing can be written, and disks that fill up."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

import moe_compress
from moe_compress.utils import files


def test_an_output_folder_that_holds_something_else(reader_folder, refused, tmp_path):
    model = reader_folder("mixtral")
    (tmp_path / "file").write_text("mine")
    assert "already holds something" in refused(model=model, out=tmp_path / "file")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    assert "already holds something: choose another folder with out=" in refused(model=model, out=tmp_path / "mine")
    (tmp_path / "mine" / "moe_compress.json").write_text("{")
    assert "is not valid JSON" in refused(model=model, out=tmp_path / "mine")
    (tmp_path / "mine" / "moe_compress.json").write_text("[]")
    assert "is not what moe-compress writes" in refused(model=model, out=tmp_path / "mine")
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "thesis.txt").write_text("mine")
    assert "is not unfinished work of moe-compress" in refused(model=model, out=tmp_path / "other")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == (tmp_path / "other.partial" / "thesis.txt").read_text()


def test_output_folders_that_no_rename_can_make(reader_folder, refused, tmp_path, monkeypatch):
    model = reader_folder("mixtral")
    (tmp_path / "empty").mkdir()
    for name, target in (("full", "empty"), ("dangling", "nowhere")):
        (tmp_path / name).symlink_to(tmp_path / target)
        assert "is a symbolic link, and a checkpoint gets its name by a rename" in refused(
            model=model, out=tmp_path / name
        )
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "empty")
    assert "is a mount point" in refused(model=model, out=tmp_path / "empty")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "empty", "full"]


def test_places_where_nothing_can_be_written(reader_folder, refused, tmp_path, monkeypatch):
    model = reader_folder("mixtral")
    (tmp_path / "file").write_text("mine")
    for key in ("out", "results"):
        said = refused(model=model, **{key: tmp_path / "file" / "below"})
        assert said.startswith(f"{key}=") and "nothing can be written to" in said and "(Not a directory)" in said
    (tmp_path / "locked").mkdir()
    real = files.tempfile.mkdtemp

    def locked(**keywords: object) -> str:
        if keywords["dir"] == tmp_path / "locked":
            raise OSError(30, "Read-only file system")
        return str(real(**keywords))

    monkeypatch.setattr(files.tempfile, "mkdtemp", locked)
    for key in ("out", "results"):
        assert "(Read-only file system)" in refused(model=model, **{key: tmp_path / "locked" / "x"})


def test_hidden_states_that_their_disk_cannot_hold(reader_folder, refused, tmp_path, monkeypatch):
    free = {tmp_path: 2**50, tmp_path / "small": 1000}
    (tmp_path / "small").mkdir()
    monkeypatch.setattr(files.shutil, "disk_usage", lambda place: SimpleNamespace(free=free[place]))
    said = refused(model=reader_folder("mixtral"), samples=10**9, results=tmp_path / "small")
    assert "hidden states need" in said and "small has 1000 B free" in said and "samples=" in said
    assert "results=" in said and "out=" not in said


def test_another_recipe_s_checkpoint_is_not_overwritten(reader_folder, options, refused, tmp_path):
    words = {**options, "model": reader_folder("mixtral"), "out": tmp_path / "out", "eval": False}
    moe_compress.compress("expert_drop keep=6", **words)
    assert "already holds something" in refused("expert_drop keep=4", **words)
    assert "already holds something" in refused("expert_drop keep=4 + expert_drop keep=2", **words)


def test_no_space_on_the_disk(reader_folder, options, refused, tmp_path, monkeypatch):
    made = moe_compress.compress("expert_drop", model=reader_folder("mixtral"), **{**options, "eval": False}).folder
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    said = refused(model=reader_folder("mixtral"), results=tmp_path / "elsewhere")
    assert "the new checkpoint needs" in said and "1000 B free" in said and "out=" in said
    assert not (tmp_path / "elsewhere").exists()
    with pytest.raises(ValueError, match="the new checkpoint needs"):
        moe_compress.apply(made / "plan.json", out=tmp_path / "out")


def test_a_disk_that_fills_up(reader_folder, options, tmp_path, monkeypatch):
    """Space for the preflight, then none: nothing that looks whole, and the next run goes on."""
    words = {**options, "model": reader_folder("mixtral"), "out": tmp_path / "out", "eval": False}
    writes: list[int] = []
    real = moe_compress.checkpoints.writer.write_shard

    def full(*args: object, **keywords: object) -> None:
        writes.append(1)
        if len(writes) == 3:
            raise OSError(28, "No space left on device")
        real(*args, **keywords)

    monkeypatch.setattr(moe_compress.checkpoints.writer, "write_shard", full)
    with pytest.raises(OSError, match="No space left"):
        moe_compress.compress("expert_drop", **words)
    assert not (tmp_path / "out").exists()
    assert moe_compress.compress("expert_drop", **words).folder.is_dir()
    assert len(writes) == 3 + 2
