"""A training is waited for while it lives, and while it may begin or come back."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from moe_compress.checkpoints.life_signs import sign_file
from moe_compress.evaluation.watching import patience
from moe_compress.evaluation.watching.patience import Patience


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(patience, "time", made)
    return made


def say(out: Path, at: int = 1, **said: Any) -> None:
    """A sign that was touched at some second."""
    told = {"run": "abc", "state": "runs", "reason": "", "process": 7, "host": "here", "started": "", **said}
    sign_file(out).parent.mkdir(exist_ok=True)
    sign_file(out).write_text(json.dumps(told))
    os.utime(sign_file(out), (at, at))


def test_one_that_lives_is_waited_for_however_long(tmp_path, clock):
    waits = Patience(tmp_path / "run", 100.0)
    for beat in range(20):
        say(tmp_path / "run", at=beat)
        assert waits.end("abc") is None
        clock.now += 90


def test_one_that_was_killed_is_waited_for_until_the_timeout(tmp_path, clock, caplog):
    say(tmp_path / "run")
    waits = Patience(tmp_path / "run", 100.0)
    assert waits.end("abc") is None and not caplog.records
    clock.now += 70
    with caplog.at_level("WARNING", "moe_compress"):
        assert waits.end("abc") is None and waits.end("abc") is None
    (said,) = caplog.messages
    assert "process 7 on here" in said and "up to 100 s for it to be started again" in said
    clock.now += 30
    assert "gives no sign of life, for 100 s (timeout=100)" in str(waits.end("abc"))


def test_one_that_comes_back_in_time_is_waited_for_anew(tmp_path, clock):
    say(tmp_path / "run")
    waits = Patience(tmp_path / "run", 100.0)
    waits.end("abc")
    clock.now += 99
    say(tmp_path / "run", process=8)
    assert waits.end("abc") is None
    clock.now += 99
    assert waits.end("abc") is None


def test_one_that_never_begins_is_given_up(tmp_path, clock):
    waits = Patience(tmp_path / "run", 100.0)
    assert waits.end() is None
    clock.now += 101
    assert str(waits.end()) == "no training has begun, for 101 s (timeout=100)."


def test_without_a_timeout_it_waits_for_ever(tmp_path, clock):
    waits = Patience(tmp_path / "run", 0.0)
    clock.now += 1e9
    assert waits.end() is None


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"state": "finished"}, ""),
        ({"state": "failed", "reason": "no text."}, "the training failed: no text."),
        ({"run": "other"}, "another training is writing"),
    ],
)
def test_one_that_has_ended_is_not_waited_for(tmp_path, clock, said, expected):
    say(tmp_path / "run", **said)
    found = Patience(tmp_path / "run", 100.0).end("abc")
    assert found is not None and found.startswith(expected) and bool(found) == bool(expected)


def test_one_that_ran_out_of_disk_may_come_back(tmp_path, clock):
    say(tmp_path / "run", state="stopped", reason="its disk is full.")
    waits = Patience(tmp_path / "run", 100.0)
    assert waits.end("abc") is None
    clock.now += 100
    assert str(waits.end("abc")) == "the training stopped (its disk is full), for 100 s (timeout=100)."


def test_one_whose_sign_goes_has_ended(tmp_path, clock):
    say(tmp_path / "run")
    waits = Patience(tmp_path / "run", 100.0)
    assert waits.end() is None
    sign_file(tmp_path / "run").unlink()
    assert "ended before its first checkpoint, or was removed" in str(waits.end())
