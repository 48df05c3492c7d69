"""Names and values of other people's files do nothing where they are shown."""

from __future__ import annotations

import csv
import io
import logging

import pytest

from moe_compress.cli import terminal
from moe_compress.reports.table_formats import Cells, as_csv, latex, markdown
from moe_compress.utils.text import printable

ESCAPES = "model\x1b]0;title\x07\x1b[2J\u202e.x"
CELLS = Cells(["name", "value"], [["=cmd|' /C calc'!A0", "-0.5 [-1, 0]"], ["<img src=x onerror=y>", "p < 0.05"],
                                  ["@SUM(1)", "+x"], [ESCAPES, "+0.5"]])  # fmt: skip


def test_a_spreadsheet_takes_no_cell_for_a_formula():
    rows = list(csv.reader(io.StringIO(as_csv(CELLS))))
    assert [row[0] for row in rows[1:4]] == ["'=cmd|' /C calc'!A0", "<img src=x onerror=y>", "'@SUM(1)"]
    assert [row[1] for row in rows[1:]] == ["-0.5 [-1, 0]", "p < 0.05", "'+x", "+0.5"]


def test_a_viewer_of_markdown_sees_no_tag():
    text = markdown(CELLS)
    assert r"\<img src=x onerror=y>" in text and "p < 0.05" in text


@pytest.mark.parametrize("text", [markdown(CELLS), as_csv(CELLS), latex("t", "h", CELLS), printable(ESCAPES)])
def test_a_terminal_obeys_nothing(text):
    assert not set(text) & set("\x1b\x07\u202e") and "model" in text


def test_log_lines_are_printable(capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger("moe_compress"), "handlers", [])
    terminal.set_up_logging(False)
    logging.getLogger("moe_compress").warning("reading %s", ESCAPES)
    said = capsys.readouterr().err
    assert said.startswith("reading model") and "\x1b" not in said
