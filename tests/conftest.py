"""Session-wide tiny models: one checkpoint per family, made once."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

import tiny
from moe_compress.checkpoint.reader import Checkpoint, open_checkpoint

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """family -> folder of its tiny checkpoint (fp32)."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = tiny.save(tiny.make(family), tmp_path_factory.mktemp("families") / family)
        return made[family]

    return folder


@pytest.fixture(scope="session")
def family_checkpoint(family_folder: Callable[[str], Path]) -> Callable[[str], Checkpoint]:
    """family -> its opened tiny checkpoint."""
    return lambda family: open_checkpoint(family_folder(family), family)
