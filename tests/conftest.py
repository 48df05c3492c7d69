"""Session-wide tiny models: one checkpoint per family, made once."""

from __future__ import annotations

import functools
import os
import shutil

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers

import moe_compress
from moe_compress.checkpoints.reader import Checkpoint, open_checkpoint
from moe_compress.engine import forward
from moe_compress.evaluation.verification import verify
from support import editing, quantized, readers, stock_process, tiny
from support.identity import rewritten

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Slow tests run only where they are asked for: by -m, or by their own name."""
    if not config.getoption("markexpr") and not any("::" in word for word in config.args):
        slow = [item for item in items if item.get_closest_marker("slow") is not None]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _verified_in_copies() -> Iterator[None]:
    """Stock transformers is imported once for all checkpoints that are verified; test_verify's own process does so."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "run_isolated", stock_process.run_copied)
        yield


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


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """family -> its tiny checkpoint, with at least two MoE layers."""
    folder = tmp_path_factory.mktemp("sources")
    return functools.cache(lambda family: open_checkpoint(tiny.save(editing.make(family), folder / family)))


@pytest.fixture(scope="session")
def reader_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """family -> folder of a tiny checkpoint with a tokenizer."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = readers.save_model(family, tmp_path_factory.mktemp("readers") / family)
        return made[family]

    return folder


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the small text files."""
    return readers.save_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="session")
def lab(
    reader_folder: Callable[[str], Path], texts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, object]]:
    """family -> options of a run on its tiny reader, without evaluation, whose results all tests on it share."""
    place = tmp_path_factory.mktemp("lab")
    files = {"data": str(texts / "calibration.txt"), "eval_data": str(texts / "heldout.txt"), "eval": False}

    def of(family: str) -> dict[str, object]:
        return {**readers.OPTIONS, **files, "model": str(reader_folder(family)), "results": str(place / family)}

    return of


@pytest.fixture(scope="session")
def made(lab: Callable[[str], dict[str, object]]) -> Callable[[str, str], Path | None]:
    """(family, sentence) -> the checkpoint."""
    return functools.cache(lambda family, sentence: moe_compress.compress(sentence, **lab(family)).folder)


@pytest.fixture(scope="session")
def wide_lab(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, object]]:
    """family -> options whose results all tests on it share."""
    place = tmp_path_factory.mktemp("quantized")
    files = {"data": str(texts / "calibration.txt"), "eval_data": str(texts / "heldout.txt"), "eval": False}
    model = functools.cache(lambda family: str(quantized.wide(family, place / "models" / family)))
    return lambda family: {**readers.OPTIONS, **files, "model": model(family), "results": str(place / family)}


@pytest.fixture(scope="session")
def wide_made(wide_lab: Callable[[str], dict[str, object]]) -> Callable[[str, str], Path]:
    """(family, sentence) -> the checkpoint."""
    return functools.cache(lambda family, sentence: moe_compress.compress(sentence, **wide_lab(family)).folder)


@pytest.fixture
def options(texts: Path, tmp_path: Path) -> dict[str, object]:
    """What a run on a tiny reader is told, besides its model; its results are the test's own."""
    files = {"data": str(texts / "calibration.txt"), "eval_data": str(texts / "heldout.txt")}
    return {**readers.OPTIONS, **files, "results": str(tmp_path / "results")}


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for every batch that runs through a layer."""
    calls: list[int] = []
    real = forward.hf.run_layer

    def counted(*args: object) -> torch.Tensor:
        calls.append(1)
        return real(*args)

    monkeypatch.setattr(forward.hf, "run_layer", counted)
    return calls


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory, reader_folder: Callable[[str], Path]) -> Path:
    """A tiny Mixtral in several shards."""
    return rewritten(open_checkpoint(reader_folder("mixtral")), tmp_path_factory.mktemp("sharded") / "model").folder


@pytest.fixture
def copy(sharded: Path, tmp_path: Path) -> Path:
    """A copy of the sharded model, to be broken."""
    return Path(shutil.copytree(sharded, tmp_path / "model"))


@pytest.fixture
def refused(options: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run a recipe that must fail; returns what is said. Unless `late`, no layer may have run by then."""
    forwards: list[int] = []
    real = forward.hf.run_layer
    monkeypatch.setattr(forward.hf, "run_layer", lambda *args: forwards.append(1) or real(*args))

    def run(sentence: str = "expert_drop", *, late: bool = False, **given: object) -> str:
        out = Path(str(given.setdefault("out", tmp_path / "out")))
        before = out.exists()
        forwards.clear()
        with pytest.raises(ValueError) as caught:
            moe_compress.compress(sentence, **{**options, **given})
        assert out.exists() == before
        assert late or not forwards
        assert not (out.with_name(out.name + ".partial") / "config.json").exists()
        said = " ".join(str(caught.value).split())
        assert 20 < len(said) < 500
        return said

    return run
