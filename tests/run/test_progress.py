"""A bar moves, and says numbers behind it; without a terminal it is silent."""

from __future__ import annotations

import io

from rich.console import Console

from moe_compress.run import progress
from moe_compress.run.progress import progress_bar


def test_it_shows_losses_speed_and_time_left(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=out, force_terminal=True, width=160))
    monkeypatch.setattr(progress.sys, "stderr", type("Terminal", (), {"isatty": lambda _: True})())
    with progress_bar("writing") as bar:
        bar.say("training", "logits 0.25, 1,234 tokens/s")
        bar(3, 10)
        bar.shown.refresh()
    text = out.getvalue()
    assert "training" in text and "3/10" in text and "logits 0.25, 1,234 tokens/s" in text


def test_it_is_silent_in_a_pipe(capsys):
    with progress_bar("writing") as bar:
        bar.say("training", "loss 1")
        bar(1, 2)
    assert capsys.readouterr() == ("", "")
