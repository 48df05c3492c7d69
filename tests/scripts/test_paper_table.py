"""The grid of the paper's table: its recipes, its rows beside the paper's, and what runs again when what changed."""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import paper_rows
import paper_table
from moe_compress.reports.table import SAME
from support.records import record

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "scripts" / "benchmark"

MIXTRAL, DEEPSEEK = "mistralai/Mixtral-8x7B-v0.1", "deepseek-ai/deepseek-moe-16b-base"


@functools.cache
def mixtral_grid() -> dict:
    return paper_table.grid([MIXTRAL], {})


def test_mixtral_loses_what_it_lost_in_the_paper():
    cells = {name: cell["recipe"] for name, cell in mixtral_grid()["cells"].items()}
    assert len(cells) == 7 and cells["Mixtral-8x7B-v0.1-layer_drop"] == "layer_drop drop=8"
    assert cells["Mixtral-8x7B-v0.1-block_drop-awq"].endswith("group_size=128 + block_drop drop=5")


@pytest.mark.slow
def test_the_papers_models_lose_what_they_lost_there():
    found = paper_table.grid([MIXTRAL, DEEPSEEK], {})
    recipes = {name: cell["recipe"] for name, cell in found["cells"].items()}
    assert len(recipes) == 14 and recipes["Mixtral-8x7B-v0.1-layer_drop"] == "layer_drop drop=8"
    assert recipes["Mixtral-8x7B-v0.1-block_drop-awq"].endswith("group_size=128 + block_drop drop=5")
    assert recipes["deepseek-moe-16b-base-layer_drop-awq"].endswith("bits=4 group_size=64 + layer_drop drop=4")
    assert recipes["deepseek-moe-16b-base-expert_drop"] == "expert_drop preset=paper ratio=0.25"
    assert found["words"]["speed"] == "prompts=2048 batches=1" and found["words"]["tasks"] == "tasks=paper"


def test_other_models_lose_the_same_shares_and_words_decide_otherwise():
    assert paper_table.sizes_of("Qwen/Qwen3-30B-A3B", {}) == paper_table.Sizes(12, 8, 128)
    assert paper_table.sizes_of("tiny-mixtral", {}) == paper_table.Sizes(1, 1, 32)
    given = {"layers": "2", "group": "64", "ratio": "0.5"}
    assert paper_table.sizes_of("tiny-mixtral", given) == paper_table.Sizes(2, 1, 64, 0.5)


def test_each_command_is_given_its_own_words():
    given = {
        "samples": "8",
        "data": "my notes.txt",
        "limit": "5",
        "runs": "3",
        "threads": "2",
        "dtype": "float32",
        "eval_samples": "4",
    }
    found = paper_table.grid(["tiny-mixtral"], given)
    compress, run = (f"'data=my notes.txt' samples=8 {more}dtype=float32" for more in ("", "eval_samples=4 "))
    assert found["threads"] == 2 and found["words"] == {
        "run": run,
        "compress": compress,
        "speed": "quick=true runs=3 dtype=float32 threads=2",
        "tasks": "tasks=local limit=5 dtype=float32",
        "evaluate": "eval_samples=4 dtype=float32",
        "sizes": "",
        "flops": "tokens=2048 context=2048",
    }


@pytest.mark.parametrize(
    ("models", "words", "said"),
    [
        (["tiny-mixtral"], {"sample": "8"}, "unknown word 'sample'; known: out, .*samples.*Models are MODEL="),
        (["tiny-mixtral"], {"name": "x"}, "unknown word 'name'"),
        (["tiny-mixtral"], {"samples": "many"}, "samples=many"),
        (["tiny-mixtral"], {"layers": "half"}, "layers=half"),
        (["tiny-mixtral"], {"ratio": "2"}, "ratio=2"),
        (["tiny-mixtral"], {"layers": "9"}, "drop=9"),
        (["tiny-mixtral"], {"limit": "abc"}, "limit=abc: a whole number is needed"),
        (["tiny-mixtral"], {"batch": "0"}, "batch=0: a number from 1 is needed"),
        (["tiny-mixtral"], {"tasks": "locl/x.yaml"}, "there is no task file or folder .*locl/x.yaml"),
        (["tiny-mixtral", "tiny-mixtral"], {}, "models of different names are needed"),
        ([], {}, "models of different names are needed"),
        (["tiny-mixtrl"], {}, "Did you mean 'tiny-mixtral'"),
    ],
)
def test_wrong_words_are_one_sentence(models, words, said):
    with pytest.raises(ValueError, match=said):
        paper_table.grid(models, words)


def test_the_papers_numbers_add_up():
    paper = pd.read_csv(FOLDER / "paper_table3.csv")
    tasks = paper.loc[:, "arc_challenge":"winogrande"].mean(axis=1)
    assert len(paper) == 16 and ((tasks - paper["average"]).abs() < 0.1).all()
    assert set(paper["cell"]) == {"original", *paper_table.RECIPES}
    assert {name.lower() for name in paper["model"]} == set(paper_table.PAPER)


MODEL = "Mixtral-8x7B-v0.1"
TIMES = {"speedup": 1.25, "speedup_interval": [1.2, 1.3]}


def speed(busy: bool) -> dict:
    setting = {"dtype": "float32", "device": "cpu", "threads": 1, "tokens": 16, "prompts": [128], "batches": [1]}
    point = {"batch": 1, "prompt": 128, "prefill": TIMES, "decode": {**TIMES, "speedup": 1.5}}
    return {
        "model": f"{MODEL}-layer_drop",
        "original": MODEL,
        "fingerprint": "f1",
        "environment": {"processor": "abacus"},
        "found": {
            "setting": setting,
            "points": [point],
            "machine": {"busy": busy},
            "original": {"gpu": None, "threads": 1},
        },
    }


def tasks(delta: tuple[float, float, float]) -> dict:
    change = {"value": delta[0], "interval": list(delta[1:])}
    sides = {side: {"value": value} for side, value in (("before", 0.5), ("after", 0.5 + delta[0]))}
    return {"tasks": {name: sides for name in ("boolq", "rte")}, "average": {**sides, "delta": change}}


def keep(folder: Path, path: str, values: dict) -> None:
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_text(json.dumps(values))


def make(name: str, **changes) -> object:
    stages = [] if name == "original" else [("layer_drop", {"drop": 8})]
    return record(f"{MODEL}-{name}", 2.001 if stages else 2.0, stages, model=MODEL, **changes)


@pytest.fixture
def results(tmp_path):
    """Everything of the original and of Layer Drop; AWQ failed, timing of Block Drop as well; the rest never ran."""
    keep(tmp_path, "grid.json", mixtral_grid())
    for name in ("original", "layer_drop", "block_drop"):
        make(name).save(tmp_path / "records")
        stem = MODEL if name == "original" else f"{MODEL}-{name}"
        keep(tmp_path, f"flops/{stem}.json", {"total": {"prefill": 42.87e12}})
        keep(tmp_path, f"tasks/{stem}-abcdef.json", tasks((-0.02, -0.03, 0.01 if name == "layer_drop" else -0.01)))
    keep(tmp_path, f"speed/{MODEL}-layer_drop-abcdef.json", speed(busy=True))
    for path, text in {
        f"compress/{MODEL}-awq": "loading\nerror: no room on the disk\n",
        f"speed/{MODEL}-block_drop": "a warning\n",
        f"original/{MODEL}": "done\n",
        f"compress/{MODEL}-block_drop": "checkpoint: here\n",
    }.items():
        (tmp_path / "logs" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "logs" / f"{path}.txt").write_text(text)
    return tmp_path


def rows_of(folder: Path) -> list[dict]:
    found = paper_rows.cells(folder, json.loads((folder / "grid.json").read_text()))
    return paper_rows.frame(found, pd.read_csv(FOLDER / "paper_table3.csv")).to_dict("records")


def test_rows_have_the_papers_shape_and_its_numbers_below(results):
    rows = rows_of(results)
    assert [row["method"] for row in rows[::2]] == [
        "original", "AWQ", "Expert Drop", "Expert Drop + AWQ", "Layer Drop", "Layer Drop + AWQ", "Block Drop",
        "Block Drop + AWQ",
    ]  # fmt: skip
    assert all(row["method"] == "in the paper" for row in rows[1::2]) and len(rows) == 16
    ours, theirs = rows[8], rows[9]
    assert ours["prefill x"] == "1.25 [1.20, 1.30]" and ours["decoding x"] == "1.50 [1.20, 1.30]"
    assert ours["FLOPs"] == theirs["FLOPs"] == "42.9 T" and theirs["weights"] == "66.6 GiB"
    assert ours["boolq"] == "48.0" and ours["average"] == f"48.0, -2.0 [-3.0, +1.0] {SAME}"
    assert theirs["prefill x"] == "1.19" and theirs["average"] == "67.0" and theirs["mmlu"] == "67.3"
    assert ours["change of NLL"] == f"+0.0010 [-0.0090, +0.0110] {SAME}" and ours["perplexity"] == "7.40"
    assert rows[0]["prefill x"] == "1" and rows[0]["boolq"] == "50.0" and rows[0]["change of NLL"] == ""
    assert rows[12]["average"] == "48.0, -2.0 [-3.0, -1.0]" and rows[12]["prefill x"] == ""


def test_what_failed_is_a_row_with_its_reason(results):
    rows = rows_of(results)
    assert rows[2]["did not finish"] == "compress: no room on the disk" and rows[2]["FLOPs"] == ""
    assert rows[4]["did not finish"] == "original: stopped after saying 'done'" and rows[8]["did not finish"] == ""
    assert next(iter(rows[0])) == "method" and list(rows[0])[-1] == "did not finish"
    paper_rows.write(results)
    text = (results / "paper_table.md").read_text()
    assert "**BUSY MACHINE while these were timed: Layer Drop.**" in text
    assert "Block Drop, speed: speed: stopped after saying 'a warning'" in text
    failed = {path.stem.removeprefix(f"{MODEL}-") for path in (results / "failures").glob("*.json")}
    assert failed == {"awq", "expert_drop", "expert_drop-awq", "layer_drop-awq", "block_drop-awq"}
    assert "no room on the disk" in (results / "report.html").read_text()
    assert {path.suffix for path in (results / "plots").iterdir()} == {".svg", ".png"}
    assert (results / "paper_table.csv").read_text().count("in the paper") == 8
    assert r"\begin{longtable}" in (results / "paper_table.tex").read_text()
    (numbers,) = [c for c in json.loads((results / "paper_table.json").read_text())["cells"] if c["cell"] == "awq"]
    assert numbers["record"] is None and numbers["missing"]["record"] == "compress: no room on the disk"
    make("awq").save(results / "records")
    paper_rows.write(results)
    assert not (results / "failures" / f"{MODEL}-awq.json").exists()


def test_another_protocol_is_no_row(results):
    other = make("layer_drop").protocol | {"id": "f" * 16}
    make("block_drop", protocol=other).save(results / "records")
    row = rows_of(results)[12]
    assert row["did not finish"] and row["perplexity"] == ""


FAKE = """
import json, shutil, sys
from pathlib import Path
command, what, *words = sys.argv[1:]
given = dict(word.split("=", 1) for word in words)
name = Path(what).name
with open("calls.txt", "a") as calls:
    calls.write(f"{command} {Path(given.get('out', what)).name}\\n")
if command == "compress":
    if "fail" in what:
        sys.exit("error: it cannot be")
    Path(given["out"]).mkdir(parents=True)
elif command == "evaluate" and "name" in given:
    Path("records").mkdir(exist_ok=True)
    shutil.copy(f"made/{name}.json", f"records/{name}.json")
elif command in ("speed", "flops"):
    Path(command).mkdir(exist_ok=True)
    shutil.copy(f"made/{command}.json", f"{command}/{name}{'-abcdef' if command == 'speed' else ''}.json")
"""


def run_grid(folder: Path, recipes: dict[str, str]) -> tuple[int, list[str], str]:
    """Exit status, what was called, and the table."""
    values = json.loads((folder / "grid.json").read_text())
    values["cells"] = {f"{MODEL}-{n}": {"model": MODEL, "cell": n, "recipe": r} for n, r in recipes.items()}
    values |= {"command": f"{sys.executable} fake.py", "threads": 1}
    calls = folder / "calls.txt"
    calls.unlink(missing_ok=True)
    code = paper_table.run(folder, values, ["--cores", "2", "--quiet", "all"])
    return (
        code,
        sorted(calls.read_text().splitlines()) if calls.exists() else [],
        (folder / "paper_table.md").read_text(),
    )


@pytest.fixture
def planned(tmp_path, monkeypatch) -> Path:
    """A grid whose commands only say that they were called."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    keep(tmp_path, "grid.json", mixtral_grid())
    (tmp_path / "fake.py").write_text(FAKE)
    for name in ("layer_drop", "block_drop"):
        make(name).save(tmp_path / "made")
    make("original").save(tmp_path / "records")
    keep(tmp_path, "made/speed.json", speed(busy=False))
    keep(tmp_path, "made/flops.json", {"total": {"prefill": 1e12}})
    return tmp_path


def test_every_job_of_a_grid_is_planned(planned, capfd):
    values = json.loads((planned / "grid.json").read_text())
    cell = {"model": MODEL, "cell": "block_drop", "recipe": "block_drop drop=5"}
    values |= {"cells": {f"{MODEL}-block_drop": cell}, "command": "false", "threads": 1}
    assert paper_table.run(planned, values, ["--cores", "2", "--dry-run"], dry=True) == 0
    said = "".join(capfd.readouterr())
    jobs = dict(re.findall(r"^(\w+) +(\d+)$", said, re.M))
    assert {jobs.get(job) for job in ("compress", "evaluate", "flops", "speed", "tasks", "original")} == {"1"}, said


@pytest.mark.slow  # four processes of Snakemake's
def test_a_folder_s_name_is_no_command(planned):
    """It is part of the names of cells, which are files."""
    values, name = json.loads((planned / "grid.json").read_text()), "a b;touch pwned;$(touch pwned)"
    folder = planned / name
    folder.mkdir()
    values["models"] = {name: {**values["models"][MODEL], "path": shlex.quote(str(folder))}}
    values["cells"] = {f"{name}-layer_drop": {"model": name, "cell": "layer_drop", "recipe": "layer_drop drop=8"}}
    values |= {"command": f"{sys.executable} fake.py", "threads": 1}
    paper_table.run(planned, values, ["--cores", "2", "--quiet", "all"])
    assert not list(planned.rglob("pwned")) and f"compress {name}-layer_drop" in (planned / "calls.txt").read_text()


@pytest.mark.slow
def test_only_what_depends_on_what_failed_is_left_out(planned):
    code, calls, text = run_grid(planned, {"block_drop": "block_drop fail"})
    assert code != 0 and "compress: it cannot be" in text
    assert calls == sorted(
        [f"compress {MODEL}-block_drop", *(f"{job} {MODEL}" for job in ("evaluate", "flops", "tasks"))]
    )


@pytest.mark.slow
def test_a_second_run_does_nothing_and_a_changed_recipe_only_what_depends_on_it(planned):
    recipes = {"layer_drop": "layer_drop drop=8", "block_drop": "block_drop fail"}
    code, calls, text = run_grid(planned, recipes)
    layer, block = (f"{MODEL}-{name}" for name in recipes)
    each = [f"{job} {layer}" for job in ("compress", "evaluate", "flops", "speed", "tasks")]
    of_original = [f"{job} {MODEL}" for job in ("evaluate", "flops", "tasks")]
    assert code != 0 and calls == sorted([*each, *of_original, f"compress {block}"])
    assert (
        re.search(r"\| did not finish +\|$", text, re.M)
        and "compress: it cannot be" in text
        and not (planned / "checkpoints" / layer).exists()
    )
    code, calls, text = run_grid(planned, {**recipes, "block_drop": "block_drop drop=5"})
    assert code == 0 and calls == [call.replace(layer, block) for call in each] and "did not finish" not in text
    code, calls, _ = run_grid(planned, {**recipes, "block_drop": "block_drop drop=5"})
    assert code == 0 and calls == []


def test_what_was_measured_otherwise_does_not_stand_for_what_is_asked_now(results):
    old = json.loads((results / "grid.json").read_text())
    keep(results, f"tasks/{MODEL}-layer_drop.done", {})
    keep(results, f"{MODEL}.original", {})

    def left(new: dict) -> set[str]:
        paper_table.forget(results, old, new)
        found = [path for kind in paper_table.KINDS for path in (results / kind).glob(f"{MODEL}-*")]
        return {f"{path.parent.name} {path.name.removeprefix(MODEL)}" for path in found if "original" not in path.name}

    before = left(old)
    assert {"records -layer_drop.json", "speed -layer_drop-abcdef.json", "tasks -layer_drop.done"} < before
    timed = {**old, "words": {**old["words"], "speed": "quick=true"}}
    assert before - left(timed) == {"speed -layer_drop-abcdef.json"}
    changed = {**old, "cells": {**old["cells"], f"{MODEL}-layer_drop": {"model": MODEL, "recipe": "layer_drop drop=7"}}}
    after = left(changed)
    assert not any("layer_drop" in name for name in after) and any("block_drop" in name for name in after)
    assert (results / f"{MODEL}.original").is_file()
    assert left({**old, "words": {**old["words"], "run": "samples=1"}}) == set()
    assert not list((results / "records").glob("*original*"))
    assert not (results / f"{MODEL}.original").exists()


def test_two_runs_at_once_are_refused(tmp_path):
    with (
        paper_table.alone(tmp_path),
        pytest.raises(ValueError, match="another run is writing"),
        paper_table.alone(tmp_path),
    ):
        pass


@pytest.mark.slow  # test_wrong_words_are_one_sentence
def test_a_wrong_word_on_the_command_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-P", FOLDER / "paper_table.py", f"out={tmp_path}", "sampels=3"],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.startswith("error: unknown word 'sampels'")
    assert not list(tmp_path.iterdir()) and shutil.which("bash")
