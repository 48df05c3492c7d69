"""Searches and sequential stages that are stopped leave nothing half written and go on."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import moe_compress
from moe_compress.checkpoints import writer
from moe_compress.compression.search_objective import OriginalAgreement
from moe_compress.engine import forward
from support.slow import slow_after
from support.trimming import same_checkpoint


class Interrupted(Exception):
    """Stands for whatever stops a run in the middle."""


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Stop a run at the n-th call of a function."""

    def stop(place: object, name: str, number: int, run: Callable[[], object]) -> None:
        calls: list[int] = []
        real = getattr(place, name)

        def counted(*args: object, **keywords: object) -> object:
            calls.append(1)
            if len(calls) > number:
                raise Interrupted
            return real(*args, **keywords)

        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(place, name, counted)
            run()

    return stop


@pytest.mark.parametrize(
    ("sentence", "place", "name", "number"),
    slow_after(
        2,
        [
            ("expert_drop keep=4 budget=search evaluations=5", OriginalAgreement, "__call__", 3),
            ("expert_drop score=naee keep=4 propagate=compressed", forward.hf, "run_layer", 4),
            ("expert_drop score=naee keep=4 propagate=compressed", writer, "write_shard", 3),
            ("expert_merge preset=ream keep=4 + block_drop drop=1", writer, "write_config", 1),
            ("expert_drop keep=4 budget=search evaluations=5", OriginalAgreement, "__call__", 0),
            ("expert_drop keep=4 budget=search evaluations=5", writer, "write_shard", 2),
            ("expert_merge preset=ream keep=4 + block_drop drop=1", forward.hf, "run_layer", 11),
        ],
    ),
)
def test_a_stopped_run_leaves_nothing_half_written_and_goes_on(
    sentence, place, name, number, lab, made, stopped, tmp_path
):
    options = {**lab("mixtral"), "out": tmp_path / "out", "results": str(tmp_path / "results")}
    stopped(place, name, number, lambda: moe_compress.compress(sentence, **options))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial" / "config.json").exists() or name == "write_config"
    folder = moe_compress.compress(sentence, **options).folder
    same_checkpoint(folder, made("mixtral", sentence))
    assert [path.name for path in tmp_path.rglob("*") if path.suffix in (".tmp", ".partial", ".stage1")] == []
