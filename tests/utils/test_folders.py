"""Folders have their name while they are whole, and only then."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from moe_compress.utils import folders
from moe_compress.utils.folders import link_folder, remove_folder, replace_folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    (folder / "inner").mkdir(parents=True)
    (folder / "weights").write_text("first")
    (folder / "inner" / "file").write_text("deep")
    return folder


def names(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir())


def test_links_outlive_what_they_were_made_of(source, tmp_path):
    target = tmp_path / "target"
    link_folder(source, target)
    assert (target / "weights").stat().st_ino == (source / "weights").stat().st_ino
    remove_folder(source)
    assert (target / "weights").read_text() == "first" and (target / "inner" / "file").read_text() == "deep"
    assert names(tmp_path) == ["target"]


def test_what_cannot_be_linked_is_copied(source, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(folders.os, "link", refuse)
    link_folder(source, tmp_path / "target")
    assert (tmp_path / "target" / "weights").read_text() == "first"
    assert (tmp_path / "target" / "weights").stat().st_ino != (source / "weights").stat().st_ino


@pytest.mark.parametrize("at", [0, 1])
def test_what_goes_meanwhile_leaves_nothing(source, tmp_path, monkeypatch, at):
    real, calls = os.link, []

    def link(*args):
        if len(calls) == at:
            source.rename(tmp_path / "gone")
        calls.append(1)
        real(*args)

    monkeypatch.setattr(folders.os, "link", link)
    with pytest.raises(FileNotFoundError, match="went while it was being linked"):
        link_folder(source, tmp_path / "target")
    assert names(tmp_path) == ["gone"]


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_folder_takes_the_place_of_another(source, tmp_path, monkeypatch, exchanges):
    if not exchanges:
        monkeypatch.setattr(folders, "_exchanged", lambda *_: False)
    for text in ("first", "second"):
        new = tmp_path / "new"
        shutil.copytree(source, new)
        (new / "weights").write_text(text)
        replace_folder(new, tmp_path / "place")
        assert (tmp_path / "place" / "weights").read_text() == text
    assert names(tmp_path) == ["place", "source"]


def test_the_place_is_never_empty_where_the_system_exchanges_names(source, tmp_path, monkeypatch):
    shutil.copytree(source, tmp_path / "place")
    shutil.copytree(source, tmp_path / "new")
    (tmp_path / "new" / "weights").write_text("second")
    monkeypatch.setattr(folders, "remove_folder", lambda folder: None)  # killed before the old one went
    replace_folder(tmp_path / "new", tmp_path / "place")
    assert (tmp_path / "place" / "weights").read_text() == "second"
    assert (tmp_path / "new" / "weights").read_text() == "first"
