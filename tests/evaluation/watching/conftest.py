"""A training that has ended, and a watch of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moe_compress
from moe_compress.checkpoints.life_signs import sign_file
from moe_compress.checkpoints.steps import steps_folder
from moe_compress.evaluation.watching import watch as watching
from moe_compress.evaluation.watching.process import Job
from moe_compress.evaluation.watching.watched import Watched
from support.watched import LAST, StandIn


@pytest.fixture(scope="module")
def trained(lab, tmp_path_factory) -> Path:
    """A training's outcome, with its steps beside it."""
    out = tmp_path_factory.mktemp("trained") / "run"
    words = f"expert_drop keep=3 + distill steps={LAST} batch=2 checkpoint_every=2"
    moe_compress.compress(words, **{**lab("mixtral"), "out": str(out)})
    return out


@pytest.fixture
def out(trained: Path, tmp_path: Path) -> Path:
    """A copy, to be rotated and renamed, that says nothing of how it ended."""
    shutil.copytree(steps_folder(trained), steps_folder(tmp_path / "run"))
    sign_file(tmp_path / "run").unlink()
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def watch(lab, tmp_path, monkeypatch) -> Callable[..., tuple[Watched, StandIn]]:
    """Watch with a stand-in; returns what was found, and the stand-in."""

    def run(out: Path, before: Callable[[Job], None] = lambda _: None, **words: Any) -> tuple[Watched, StandIn]:
        evaluator = StandIn(before)
        monkeypatch.setattr(watching, "Evaluator", lambda _threads: evaluator)
        given = {key: lab("mixtral")[key] for key in ("eval_data", "eval_samples", "eval_length")}
        told = {"once": True, "poll": 0.0, "results": str(tmp_path / "results"), **given, **words}
        return moe_compress.watch(out, **told), evaluator

    return run
