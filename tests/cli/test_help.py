"""What a newcomer meets: scripts run from anywhere, folders of one's own, help, documentation that is complete."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import editing
import moe_compress
import tiny
from moe_compress import api
from moe_compress.analysis.layer_plan import CompressedMoEConfig
from moe_compress.checkpoints import resolve
from moe_compress.cli import catalogue
from moe_compress.cli.arguments import normalised
from moe_compress.cli.commands import main
from moe_compress.cli.terminal import set_up_logging, show_run
from moe_compress.compression.forecast import as_markdown, forecast
from moe_compress.compression.preflight import _to_be_written
from moe_compress.methods import registry
from moe_compress.recipes.parser import parse
from moe_compress.run.options import Options
from moe_compress.utils import files
from moe_compress.utils.files import gigabytes

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "scripts").rglob("*.sh"))
# Their sections are still to be written.
UNWRITTEN: set[str] = set()


def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    """What the command line prints."""
    monkeypatch.setattr(sys, "argv", ["moe-compress", *words])
    with pytest.raises(SystemExit):
        main()
    captured = capsys.readouterr()
    return captured.out + captured.err


# --- scripts and folders ------------------------------------------------------------------------------------------


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The scripts in a repository whose Python only says where it is and what it was given."""
    place = tmp_path / "a clone"
    shutil.copytree(ROOT / "scripts", place / "scripts")
    shutil.copy(ROOT / "requirements.txt", place)
    (place / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(ROOT / "requirements.txt", place / ".venv" / "requirements.installed")
    python = place / ".venv" / "bin" / "python"
    python.write_text('#!/bin/sh\necho "$PWD|$PYTHONPATH|$*"\n')
    python.chmod(0o755)
    return place


@pytest.mark.parametrize("script", [str(path.relative_to(ROOT)) for path in SCRIPTS if "environment" not in path.name])
def test_scripts_run_from_anywhere_in_the_callers_folder(script, clone, tmp_path):
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    for folder, name in ((elsewhere, str(clone / script)), (clone, script)):
        done = subprocess.run(
            ["bash", name, "data=mine.txt"],
            cwd=folder, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        where, sources, given = done.stdout.splitlines()[0].split("|")
        assert sources == str(clone / "src")
        assert Path(where) == (clone if script == "scripts/test.sh" else folder)
        text = (ROOT / script).read_text(encoding="utf-8")
        if "benchmark" in script and ("run.sh" in text or "-m moe_compress" in text):
            assert given.startswith("-P -m moe_compress ")
        elif "benchmark" in script:
            assert Path(given.removesuffix(" data=mine.txt")).is_file()
        elif "compress" in script or "evaluate" in script or "run.sh" in script:
            assert given.startswith("-P -m moe_compress ") and given.endswith("data=mine.txt")


def test_a_users_runs_are_apart_from_the_shipped_grid(monkeypatch):
    assert Options().results == "runs"
    assert "runs/" in (ROOT / ".gitignore").read_text().splitlines()
    with pytest.raises(ValueError, match=r"no record or folder of records runs/records"):
        api.table()
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "benchmark"))
    import zoo_grid as tables

    assert tables.RESULTS == ROOT / "results"
    for name, script in (("engine", "engine_speed"), ("gpu", "gpu_checks"), ("trimming", "trimming_speed")):
        assert f'default=RESULTS / "{name}.json"' in (ROOT / "scripts" / "benchmark" / f"{script}.py").read_text()


def test_only_the_shipped_grid_goes_into_the_readme(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "benchmark"))
    import readme_tables as summary

    shutil.copytree(ROOT / "results" / "records", tmp_path / "records")
    before = (ROOT / "README.md").read_bytes()
    summary.write_summary(tmp_path, None)
    assert (tmp_path / "summary.md").is_file() and (ROOT / "README.md").read_bytes() == before


# --- words --------------------------------------------------------------------------------------------------------


def test_dashes_are_as_good_as_words():
    given = ["export", "F", "--pad", "--out", "X", "--max-tokens=3", "--keep", "6", "--help"]
    assert normalised(given) == ["export", "F", "--pad", "out=X", "max_tokens=3", "keep=6", "--help"]
    with pytest.raises(ValueError, match="--samples needs a value: samples=VALUE"):
        normalised(["plan", "expert_drop", "--samples"])


@pytest.mark.parametrize("out", [["out=X"], ["--out", "X"], ["--out=X"]])
def test_export_and_table_take_out_either_way(out, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(api, "export", lambda folder, pad, out="": f"{folder} {pad} {out}")
    assert "checkpoint: F True X" in said(capsys, monkeypatch, "export", "F", "--pad", *out)
    assert "written: X/tables.md" in said(capsys, monkeypatch, "table", str(ROOT / "results" / "records"), *out)
    assert "export has no option 'data'" in said(capsys, monkeypatch, "export", "F", "--pad", "data=zoo")


def test_export_pads_where_a_bias_allows_it(tmp_path):
    options = {"results": tmp_path / "runs", "eval": False}
    for family in ("minimax_m2", "mixtral"):
        model = tiny.save(editing.make(family), tmp_path / family)
        made = api.compress("expert_drop score=random budget=global seed=1", model=model, **options).folder
        if family == "mixtral":
            with pytest.raises(ValueError, match="has no selection bias"):
                api.export(made, tmp_path / "plain", pad=True)
        else:
            assert (api.export(made, tmp_path / "plain", pad=True) / "config.json").is_file()
            shutil.rmtree(tmp_path / "plain")


@pytest.mark.parametrize("command", ["compress", "apply", "evaluate", "plan"])
def test_help_names_the_page_of_all_words(command, monkeypatch, capsys):
    assert "docs/recipes.md" in said(capsys, monkeypatch, command, "--help")


def test_list_shows_one_method(monkeypatch, capsys):
    shown = said(capsys, monkeypatch, "list", "expert_merge")
    assert "- `cap=none`: whole number or none\n" in shown and "by=outputs+logits" in shown
    assert "REAM (2604.04356)" in shown and "expert_drop" not in shown
    assert "did you mean 'top_k'" in said(capsys, monkeypatch, "list", "topk")


# --- the page of all words ----------------------------------------------------------------------------------------


def test_every_option_and_parameter_is_documented_with_its_default():
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^### (\w+)\n(.*?)(?=^### |\Z)", page, re.M | re.S))
    options = page.partition("## Options of a run")[2].partition("## Methods")[0]
    for name, field in Options.model_fields.items():
        assert f"| `{name}` | `{catalogue.word(field.default)}` | {catalogue.choices(field.annotation)} |" in options
    assert set(sections) == set(registry.METHODS) - UNWRITTEN
    for name, section in sections.items():
        method = registry.METHODS[name]
        for key, parameter in method.parameters.items():
            expected = f"| `{key}` | `{catalogue.word(parameter.default)}` | {catalogue.choices(method.hints[key])} |"
            assert expected in section, f"{name}: {expected}"
        for preset, values in method.presets.items():
            assert f"| `preset={preset}` | `{catalogue.recipe_words(values)}` |" in section
        assert len(re.findall(r"^\| `\w+` \| `", section, re.M)) >= len(method.parameters)
    assert "docs/recipes.md" in (ROOT / "README.md").read_text(encoding="utf-8")


# --- forecasts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sentence", "model", "note"),
    [
        ("skip share=0.5", "tiny-mixtral", "How many experts are skipped depends on the text"),
        ("expert_drop novice=mean", "tiny-mixtral", "How many tokens meet a mean output depends on the text"),
        ("expert_drop", "tiny-mixtral", ""),
    ],
)
def test_a_forecast_says_what_it_leaves_open(sentence, model, note):
    found = moe_compress.plan(sentence, model=model)
    assert len(found.notes) == (1 if note else 0)
    assert note in as_markdown(found) and "above the bare process" in as_markdown(found)


def test_the_disk_is_asked_for_what_the_forecast_says(tmp_path, monkeypatch):
    one, two = (parse(words) for words in ("expert_drop keep=2", "expert_drop keep=6 + expert_drop keep=2"))
    expected = forecast(one, resolve.config_folder("tiny-mixtral"))
    out = tmp_path / "out"
    assert _to_be_written(one, expected, out) == expected.after.bytes < expected.before.bytes
    assert _to_be_written(two, expected, out) == expected.after.bytes + expected.before.bytes
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=expected.after.bytes - 1))
    with pytest.raises(ValueError, match=re.escape(f"needs {gigabytes(expected.after.bytes)}, but")):
        moe_compress.compress("expert_drop keep=2", out=out, results=tmp_path / "runs")


def test_an_error_in_a_later_stage_names_it():
    with pytest.raises(ValueError, match=r"^stage 2 \(top_k\): k=3: layer 0 uses 2 experts"):
        moe_compress.plan("expert_drop keep=6 + top_k k=3", model="tiny-mixtral")
    with pytest.raises(ValueError, match=r"^k=3: layer 0 uses 2 experts"):
        moe_compress.plan("top_k k=3", model="tiny-mixtral")


# --- the hub ------------------------------------------------------------------------------------------------------


def test_a_mistyped_hub_id_is_answered_at_once(monkeypatch):
    asked = []

    def unreachable() -> None:
        asked.append(1)
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(resolve, "get_session", unreachable)
    with pytest.raises(ValueError, match=r"Did you mean 'mistralai/Mixtral-8x7B-v0\.1'\?"):
        moe_compress.plan("expert_drop", model="mistralai/mixtral-8x7b-v0.1")
    with pytest.raises(ValueError, match=r"or use a local folder\.$"):
        moe_compress.plan("expert_drop", model="nobody/nothing")
    assert len(asked) == 2
    real = logging.getLogger("moe_compress")
    kept = real.handlers, real.propagate, real.level
    set_up_logging(verbose=False)
    assert not logging.getLogger("huggingface_hub.utils._http").isEnabledFor(logging.WARNING)
    real.handlers, real.propagate, real.level = kept


def test_the_hub_is_not_asked_where_it_does_not_answer(monkeypatch):
    given = {}
    monkeypatch.setattr(resolve, "hf_hub_download", lambda *_, **words: given.update(words) or "/nowhere/config.json")
    for answers in (True, False):
        monkeypatch.setattr(resolve, "hub_answers", lambda answers=answers: answers)
        resolve.config_folder("some/model")
        assert given["local_files_only"] is not answers


# --- rows ---------------------------------------------------------------------------------------------------------


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


def test_a_config_with_router_rows_is_short():
    config = CompressedMoEConfig(0, 8, 6, {0: 0}, {})
    assert "router_remap" not in repr(config)
