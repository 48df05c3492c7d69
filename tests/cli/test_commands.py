"""The command line from end to end."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import moe_compress
from moe_compress.cli.terminal import show_tables


@pytest.mark.parametrize(("columns", "as_columns"), [(80, True), (340, False)])
def test_a_narrow_terminal_gets_rows_as_columns(
    columns, as_columns, reader_folder, options, monkeypatch, capsys, tmp_path
):
    moe_compress.compress("expert_drop keep=6", model=reader_folder("mixtral"), **options)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    show_tables(moe_compress.table([tmp_path / "results" / "records"]))
    lines = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    assert max(map(len, lines)) <= columns and "…" not in "".join(lines)
    assert any("original" in line and "keep=6" in line for line in lines) == as_columns


def run(*words: object, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    sources = str(Path(moe_compress.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-m", "moe_compress", *map(str, words)],
        cwd=cwd, env={**os.environ, "PYTHONPATH": sources, **variables},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_the_command_line_from_compress_to_table(reader_folder, options, tmp_path):
    folder = tmp_path / "a folder with spaces"
    shutil.copytree(reader_folder("mixtral"), folder)
    words = [f"{key}={value}" for key, value in options.items() if key != "results"]
    done = run("compress", "expert_drop score=reap ratio=0.25", *words, f"model={folder}", "out=here", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "| original" in done.stdout and "| expert_drop score=reap ratio=0.25" in done.stdout
    assert done.stdout.splitlines()[-1] == "checkpoint: here"
    assert "checkpoint written: here" in done.stderr and "━" not in done.stderr  # no bar where no terminal is
    done = run("table", cwd=tmp_path)
    assert done.returncode == 0 and "expert_drop" in (tmp_path / "runs" / "tables.md").read_text()
    assert list((tmp_path / "runs").glob("*.csv"))
