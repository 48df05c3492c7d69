"""Prompts as windows."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_compress.data.prompts import prompt_windows, read_prompts
from support import readers


@pytest.fixture(scope="module")
def tokenizer():
    return readers.tokenizer()


def test_prompts_as_windows(tokenizer, tmp_path: Path):
    found = prompt_windows(["a b c", "a"], tokenizer)
    assert len(found) == 2 and found.tokens == int(found.mask_NS.sum()) and found.domains == ("prompts",)
    with pytest.raises(ValueError, match="hold no token"):
        prompt_windows([""], tokenizer)


def test_files_of_prompts(tmp_path: Path, monkeypatch):
    (tmp_path / "P.JSONL").write_text('{"prompt": "a"}\n{"text": "b"}')
    assert read_prompts(tmp_path / "P.JSONL") == ["a", "b"]
    with pytest.raises(ValueError, match="/dev/zero is no file that can be read: it is a folder, a pipe, a device"):
        read_prompts(Path("/dev/zero"))
    monkeypatch.setattr("moe_compress.data.prompts.MAX_BYTES", 1 << 4)
    (tmp_path / "large.txt").write_text("a b c d e f g h i j")
    with pytest.raises(ValueError, match=r"large.txt has more than 0 MiB: prompts are lines of a small file"):
        read_prompts(tmp_path / "large.txt")
