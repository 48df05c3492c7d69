"""Prompts as windows."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_compress.data.prompts import prompt_windows
from support import readers


@pytest.fixture(scope="module")
def tokenizer():
    return readers.tokenizer()


def test_prompts_as_windows(tokenizer, tmp_path: Path):
    found = prompt_windows(["a b c", "a"], tokenizer)
    assert len(found) == 2 and found.tokens == int(found.mask_NS.sum()) and found.domains == ("prompts",)
    with pytest.raises(ValueError, match="hold no token"):
        prompt_windows([""], tokenizer)
