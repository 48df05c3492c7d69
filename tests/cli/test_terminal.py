"""What the terminal shows of runs and plans."""

from __future__ import annotations

import json
import re
import sys

import moe_compress
from moe_compress.cli.terminal import show_run


def test_an_applied_plan_names_its_stages(reader_folder, options, tmp_path):
    quiet = {**options, "eval": False}
    made = moe_compress.compress("expert_drop keep=6 + top_k k=1", model=reader_folder("mixtral"), **quiet).folder
    result = moe_compress.apply(made / "plan.json", out=tmp_path / "ap", **options)
    (stage,) = result.record.recipe
    assert stage["method"] == "apply" and stage["given"]["plan"] == "expert_drop score=reap keep=6 + top_k k=1"
    moe_compress.apply(tmp_path / "ap" / "plan.json", out=tmp_path / "again", **options)  # its plan says the same
    plan = json.loads((made / "plan.json").read_text())
    plan["stages"][0]["edits"][0]["experts"] = [0, 1, 2, 3, 4, 5]
    (tmp_path / "changed.json").write_text(json.dumps(plan))
    moe_compress.apply(tmp_path / "changed.json", out=tmp_path / "changed", **options)
    (table,) = moe_compress.table([tmp_path / "results" / "records"])
    names = [name for name in table.frame["recipe"] if name != "original"]
    assert len(set(names)) == len(names) == 2
    for name in names:
        assert re.fullmatch(r"apply: expert_drop score=reap keep=6 \+ top_k k=1 \([0-9a-f]{6}\)", name)


def test_a_single_run_is_a_list(reader_folder, options, monkeypatch, capsys, tmp_path):
    moe_compress.compress("expert_drop keep=6", model=reader_folder("mixtral"), **options)
    tables = moe_compress.table([tmp_path / "results" / "records"])
    show_run(tables)
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert rows[0] == ["", "original", "expert_drop score=reap keep=6"]
    assert {"perplexity", "KL", "calibration + writing s"} <= {row[0] for row in rows}
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    show_run(tables)
    assert max(map(len, re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines())) <= 100
