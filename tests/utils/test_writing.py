"""Files that cannot be written to their end: one sentence that names them, and no half of one left."""

from __future__ import annotations

import errno
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import moe_compress
from moe_compress.checkpoints.safetensors_file import write_shard
from moe_compress.cli.commands import main
from moe_compress.run.log import RunLog
from moe_compress.utils import files
from moe_compress.utils.files import NoSpaceError, atomic_write, require_utf8

BIG = 1 << 16
WRITERS: dict[str, Callable[[Path], None]] = {
    "file": lambda path: atomic_write(path, bytes(BIG)),
    "shard": lambda path: write_shard(path, {"x": torch.zeros(BIG)}),
    "log": lambda path: RunLog(path, text="x" * BIG).event("written"),
}


@pytest.fixture
def small_files():
    """Files of this process end at 20 KiB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20 << 10, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_limit_of_file_size(kind, small_files, tmp_path):
    with pytest.raises(NoSpaceError) as caught:
        WRITERS[kind](tmp_path / "out")
    assert str(caught.value).startswith(
        f"{tmp_path / 'out'} could not be written whole, for it is larger than files may"
    )
    assert not (tmp_path / "out.tmp").exists()


def test_a_full_disk(monkeypatch, tmp_path):
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "write", full)
    with pytest.raises(NoSpaceError, match=r"out could not be written whole, for its disk is full: free some space"):
        write_shard(tmp_path / "out", {"x": torch.zeros(4)})
    assert list(tmp_path.iterdir()) == []


def test_other_errors_stay_what_they_are(tmp_path):
    (tmp_path / "sub").mkdir()
    with pytest.raises(IsADirectoryError):
        atomic_write(tmp_path / "sub", b"")
    assert not (tmp_path / "sub.tmp").exists()


def test_the_command_line_names_the_file(request, reader_folder, tmp_path, monkeypatch, capsys):
    words = ["compress", "expert_drop score=weight_norm keep=6", f"model={reader_folder('mixtral')}", "eval=false"]
    request.getfixturevalue("small_files")  # the model is larger
    words += [f"out={tmp_path / 'out'}", f"results={tmp_path / 'runs'}"]
    monkeypatch.setattr(sys, "argv", ["moe-compress", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"error: {tmp_path / 'out'}.partial/model-0000") and "larger than files may be here" in said
    assert not (tmp_path / "out").exists()


def test_a_file_where_the_unfinished_checkpoint_would_be(refused, reader_folder, tmp_path):
    (tmp_path / "out.partial").write_text("mine")
    said = refused("expert_drop score=weight_norm", model=reader_folder("mixtral"))
    assert "out.partial is a file where the unfinished checkpoint would be kept: move it away, or choose" in said
    assert (tmp_path / "out.partial").read_text() == "mine"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "some words\n"),
        ("a.csv", "text\nsome words\n"),
        ("a.jsonl", '{"text": "word"}\n'),
        ("a.json", '["a"]'),
    ],
)
def test_texts_in_other_encodings(name, text, encoding, refused, reader_folder, tmp_path):
    path = tmp_path / name
    path.write_bytes(text.encode(encoding))
    said = refused("expert_drop", model=reader_folder("mixtral"), data=str(path))
    assert said == f"{path} is {encoding[:6].upper()} text: save it as UTF-8, which is what is read."


def test_a_recipe_and_prompts_in_utf_16(tmp_path):
    (tmp_path / "recipe.yaml").write_bytes("stages: [skip]".encode("utf-16"))
    with pytest.raises(ValueError, match=r"recipe\.yaml is UTF-16 text: save it as UTF-8"):
        moe_compress.plan(str(tmp_path / "recipe.yaml"))


@pytest.mark.parametrize("text", ["", "a", "ab", "\0", "\0\0\0", "\xe4\0b", "Some text.\n"])
def test_utf_8_is_taken_for_nothing_else(text):
    require_utf8(Path("a"), text.encode())
