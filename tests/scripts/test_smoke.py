"""Every script runs end to end in a tiny setting, and writes what the shipped results hold."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_compress import zoo
from moe_compress.cli import commands
from moe_compress.evaluation.harnesses import report_columns
from moe_compress.evaluation.speed import benchmark, worker
from moe_compress.reports import html_report
from moe_compress.zoo import text
from support.slow import slow_after

ROOT = Path(__file__).parents[2]
RESULTS, SCRIPTS = ROOT / "results", ROOT / "scripts"
sys.path[:0] = [str(SCRIPTS / "benchmark"), str(SCRIPTS / "zoo")]
import common  # noqa: E402
import engine_speed  # noqa: E402
import factorisation_speed  # noqa: E402
import gpu_checks  # noqa: E402
import paper_rows  # noqa: E402
import paper_table  # noqa: E402
import pruning_speed  # noqa: E402
import quantization_speed  # noqa: E402
import readme_tables  # noqa: E402
import recovery_speed  # noqa: E402
import startup_time  # noqa: E402
import tiny_families  # noqa: E402
import train  # noqa: E402
import trimming_speed  # noqa: E402
import zoo_grid  # noqa: E402

TABLE = RESULTS / "paper_table"
Main = Callable[[list[str]], object]
SMALL = ("samples=2", "length=64", "eval_samples=2", "eval_length=64")


def keys(value: Any) -> Any:
    """The keys of nested objects, in lists those of the first."""
    if isinstance(value, dict):
        return {key: keys(inner) for key, inner in value.items()}
    return [keys(inner) for inner in value[:1]] if isinstance(value, list) else None


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def shipped() -> Any:
    """Nothing that is shipped is written to."""
    files = [path for path in RESULTS.glob("*") if path.is_file()]
    before = {path: path.stat().st_mtime_ns for path in files}
    yield
    assert {path: path.stat().st_mtime_ns for path in files} == before


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole models are timed by threads of this process, which has imported everything.

    One loads at a time: transformers changes a method of all models while it loads one, and changes it back.
    """
    loading, load = threading.Lock(), worker.load

    def load_alone(*arguments: Any) -> Any:
        with loading:
            return load(*arguments)

    def serve(connection: Any) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                worker.serve(connection, *connection.recv())
                connection.send(worker.END)

    def launch(self: worker.Worker) -> None:
        self.connection, theirs = Pipe()
        thread = threading.Thread(target=serve, args=(theirs,), daemon=True)
        thread.start()
        self.process: Any = SimpleNamespace(poll=lambda: None, wait=thread.join, kill=theirs.close)

    monkeypatch.setattr(worker, "load", load_alone)
    monkeypatch.setattr(worker.Worker, "_launch", launch)
    monkeypatch.setattr(worker, "pin", lambda _: None)
    monkeypatch.setattr(benchmark, "LOOK_SECONDS", 0.01)


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], None]:
    """Run words of the command line here."""

    def run(words: list[str]) -> None:
        monkeypatch.setattr(sys, "argv", ["moe-compress", *words])
        try:
            commands.main()
        except SystemExit as stop:
            assert not stop.code, words

    return run


# --- figures ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("shipped")
@pytest.mark.parametrize(
    ("main", "name"),
    slow_after(
        1,
        [
            *((engine_speed.main, "engine"), (trimming_speed.main, "trimming"), (pruning_speed.main, "pruning")),
            *((factorisation_speed.main, "factorisation"), (recovery_speed.main, "recovery")),
        ],
    ),
    ids=["engine", "trimming", "pruning", "factorisation", "recovery"],
)
def test_speed_of_parts(main: Main, name: str, tmp_path):
    main(["--smoke", "--out", str(tmp_path / "made.json")])
    assert keys(read(tmp_path / "made.json")) == keys(read(RESULTS / f"{name}.json"))


@pytest.mark.usefixtures("shipped")
def test_a_smoke_run_replaces_no_shipped_figures(tmp_path, capsys):
    common.save_figures({}, RESULTS / "engine.json", smoke=True)
    assert "nothing is written" in capsys.readouterr().out
    common.save_figures({}, tmp_path / "engine.json", smoke=True)
    assert read(tmp_path / "engine.json") == {}


def test_what_fresh_processes_of_the_speed_scripts_run(tmp_path, capsys):
    engine_speed.synthesise(tmp_path / "8", 8, 64, 64)
    for name in engine_speed.MEASUREMENTS:
        engine_speed.main(["--measure", name, "--folder", str(tmp_path / "8"), "--windows", "1"])
    pruning_speed.main(["--peak", "64", "--smoke"])
    factorisation_speed.main(["--peak", "64", "--smoke"])
    recovery_speed.main(["--memory", "loss", "chunked", "--smoke"])
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    figures = read(RESULTS / "engine.json")
    assert [set(each) for each in said] == [
        *(set(figures[n]) for n in ("peak_8", "forward", "copy")),
        *({"bytes"} for _ in range(3)),
    ]


@pytest.mark.slow  # test_speed_of_parts
@pytest.mark.usefixtures("one_process", "shipped")
def test_quantization_speed(tmp_path):
    quantization_speed.main(["--smoke", "--out", str(tmp_path / "made.json")])
    made, kept = read(tmp_path / "made.json"), read(RESULTS / "quantization.json")
    ((model, one),) = made.pop("speed").items()
    whole = kept.pop("speed")
    assert keys(made) == keys(kept) and keys(one) == keys(whole[model])
    assert len(whole) == 2 * len(quantization_speed.QUANTIZED)


@pytest.mark.slow  # its parts are typed, and tested on the CPU by their packages
@pytest.mark.usefixtures("one_process", "shipped")
def test_gpu_checks_where_there_is_no_gpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu_checks.main(["--out", str(tmp_path / "made.json")])
    assert capsys.readouterr().out == "no GPU here: the CUDA checks are skipped.\n"
    gpu_checks.main(["--smoke", "--out", str(tmp_path / "made.json")])
    made, kept = read(tmp_path / "made.json"), read(RESULTS / "gpu.json")
    # Families that came after the record was made are not in it.
    other = {"device", "pruning", "quantization", "kernels", "packed", *gpu_checks.FULL_SIZE}
    assert other <= set(kept) - {"speed"} <= {*other, *tiny_families.CONFIGS}
    assert set(kept["packed"]) == set(gpu_checks.PACKED) > set(made.pop("packed"))
    assert {"prefill", "decode"} < set(made.pop("speed")["points"][0])
    assert all(keys(found) == keys(kept[name]) for name, found in made.items() if name in kept)


def test_startup(tmp_path):
    startup_time.main(["--runs", "1", "--only", "zoo", "--out", str(tmp_path / "made.json")])
    start = read(tmp_path / "made.json")["start"]
    assert set(start["ratios"]) == {"zoo"} and set(start["costs"]) == {"zoo", "import typer, pydantic, yaml, rich"}
    (tmp_path / "some").mkdir()
    assert startup_time.copy_records(tmp_path / "some") == 10
    assert startup_time.build_skeleton() > 0


def test_nothing_kept_is_slower_to_start_than_it_may_be():
    kept = read(RESULTS / "startup.json")
    assert set(kept["start"]["ratios"]) == {command.name for command in startup_time.COMMANDS}
    assert max(kept["start"]["ratios"].values()) <= startup_time.AT_MOST
    assert kept["plan"]["ratio"] <= startup_time.PLAN_AT_MOST
    assert kept["plan"]["peak_gib"] < startup_time.MEMORY_AT_MOST


# --- tables -------------------------------------------------------------------------------------------------------


@pytest.mark.slow  # the tables are rebuilt from the records above
@pytest.mark.usefixtures("shipped")
def test_the_grid_and_what_is_made_of_it(tmp_path):
    zoo_grid.main(["--smoke", "--model", "tiny-mixtral", "--results", str(tmp_path)])
    (made,) = (path for path in (tmp_path / "records").glob("*.json") if "original" not in path.name)
    record, kept = read(made), read(RESULTS / "records" / made.name)
    assert record["recipe"] == kept["recipe"] and set(record) == set(kept)
    assert all(set(record[part]) == set(kept[part]) for part in ("sizes", "cost"))
    # The shipped record is older than some metrics.
    assert set(kept["metrics"]) <= set(record["metrics"])
    zoo_grid.main(["--tables-only", "--results", str(tmp_path)])
    (row, _), kept_row = read(tmp_path / "tables.json")[0]["rows"], read(RESULTS / "tables.json")[0]["rows"][0]
    assert set(row) == set(kept_row) and set(row["runs"][0]) == set(kept_row["runs"][0])
    for words in (["--smoke"], ["--smoke", "--results", str(RESULTS)]):
        with pytest.raises(SystemExit):
            zoo_grid.main(words)


@pytest.mark.usefixtures("shipped")
def test_results_are_rebuilt_byte_for_byte_from_their_records(tmp_path):
    given = ["records", "documents", "paper_table", "quantization.json", "recovered/records", "recovered/documents"]
    (tmp_path / "recovered").mkdir()
    for name in given:
        (tmp_path / name).symlink_to(RESULTS / name)
    zoo_grid.main(["--tables-only", "--results", str(tmp_path)])
    files = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if not path.is_symlink() and path.is_file()]
    made = {str(path) for path in files}
    assert made > {"tables.md", "tables.tex", "tables.json", "summary.md", "README.md", "recovered/tables.md"}
    assert [name for name in sorted(made) if (tmp_path / name).read_bytes() != (RESULTS / name).read_bytes()] == []
    plots = html_report.make_report([TABLE / "records"], tmp_path / "page", report_columns(), True)
    kept = {path.name: path for path in (TABLE / "plots").iterdir()}
    assert {path.name for path in plots.files[1:]} == set(kept) and len(kept) == 12
    assert [path.name for path in plots.files[1:] if path.read_bytes() != kept[path.name].read_bytes()] == []
    page = (tmp_path / "README.md").read_text()
    targets = {part.partition(")")[0] for part in page.split("](")[1:]}
    assert len(targets) > 2 and all((tmp_path / name).exists() for name in targets - {"paper_table/report.html"})


def test_a_readme_is_filled_between_its_markers(tmp_path, capsys):
    page, rows = tmp_path / "README.md", "| recipe |\n|---|\n"
    page.write_text("# A page\n")
    readme_tables.fill(page, rows)
    assert page.read_text() == "# A page\n" and "is as before" in capsys.readouterr().out
    page.write_text(f"# A page\n{readme_tables.BEGIN}\nold\n{readme_tables.END}\nbelow\n")
    for _ in range(2):
        readme_tables.fill(page, rows)
        assert page.read_text() == f"# A page\n{readme_tables.BEGIN}\n\n{rows}\n{readme_tables.END}\nbelow\n"


def test_eight_rows_are_for_the_readme():
    page = (RESULTS / "README.md").read_text().partition("|---|---|---|---|---|---|\n")[2].partition("\n\n")[0]
    assert len(page.splitlines()) == len(readme_tables.SHOWN) == 8


@pytest.mark.slow  # test_paper_table makes rows of known results
@pytest.mark.usefixtures("shipped")
def test_rows_of_the_papers_table_are_rebuilt_byte_for_byte(tmp_path):
    for name in ("records", "speed", "flops", "tasks", "documents"):
        if (TABLE / name).is_dir():
            shutil.copytree(TABLE / name, tmp_path / name)
    (tmp_path / "grid.json").write_text(json.dumps(paper_table.grid(paper_table.MODELS.split(), {})))
    paper_rows.write(tmp_path)
    for kind in ("json", "csv", "tex", "md"):
        name = f"{paper_rows.STEM}.{kind}"
        assert (tmp_path / name).read_bytes() == (TABLE / name).read_bytes()


@pytest.mark.slow  # test_paper_table runs the grid itself
@pytest.mark.usefixtures("one_process", "shipped")
def test_jobs_of_the_papers_table(tmp_path, monkeypatch, capfd, command_line, texts):
    monkeypatch.setenv("MODEL", "tiny-mixtral")
    files = [f"data={texts / 'calibration.txt'}", f"eval_data={texts / 'heldout.txt'}"]
    words = [*files, *SMALL, "limit=2", "runs=1", "seconds=0", "starts=1", f"out={tmp_path}"]
    assert paper_table.main([*words, "--dry-run", "--printshellcmds", "--quiet", "host"]) == 0
    lines = [line for line in "\n".join(capfd.readouterr()).splitlines() if " -m moe_compress " in line]
    asked = [
        shlex.split(part.partition(" -m moe_compress ")[2].partition(" > ")[0].rstrip(") "))
        for line in lines
        for part in line.split("&&")
    ]
    cell = "tiny-mixtral-layer_drop"
    made = f"checkpoints/{cell}"
    of_original = [job for job in asked if job[1] == "tiny-mixtral"]
    of_cell = sorted((job for job in asked if {made, f"out={made}"} & set(job)), key=lambda job: job[0] != "compress")
    assert len(of_original) == 3 and len(of_cell) == 5
    monkeypatch.chdir(tmp_path)
    for job in (*of_original, *of_cell):
        command_line(job)
    for kind in ("records", "flops", "speed", "tasks"):
        (found,), (kept, *_) = (sorted((place / kind).glob(f"{cell}[.-]*json")) for place in (tmp_path, TABLE))
        assert set(read(kept)) <= set(read(found))


# --- shell scripts and the zoo ------------------------------------------------------------------------------------


@pytest.fixture
def calls(tmp_path: Path) -> Callable[..., list[list[str]]]:
    """What a script of a copied repository asks of its Python, which only answers how many layers are half of them."""
    place = tmp_path / "clone"
    shutil.copytree(SCRIPTS, place / "scripts")
    (place / ".venv" / "bin").mkdir(parents=True)
    for name in ("requirements.txt", ".venv/requirements.installed"):
        shutil.copy(ROOT / "requirements.txt", place / name)
    python = place / ".venv" / "bin" / "python"
    python.write_text('#!/bin/sh\n(printf "%s\\t" "$@"; echo) >>"$CALLS"\n[ "$2" != -c ] || echo 2 of 5\n')
    python.chmod(0o755)

    def of(script: str, *words: str) -> list[list[str]]:
        environment = {"PATH": os.environ["PATH"], "CALLS": str(tmp_path / "calls")}
        subprocess.run(["bash", place / "scripts" / script, *words], env=environment, check=True, cwd=tmp_path)
        return [line.split("\t")[:-1] for line in (tmp_path / "calls").read_text().splitlines()]

    return of


@pytest.mark.slow  # the harness is tested by tests/evaluation/speed
@pytest.mark.usefixtures("one_process")
def test_benchmark_speedup(calls, command_line, tmp_path, monkeypatch, capsys):
    found = calls("benchmark/benchmark_speedup.sh", "runs=1", "seconds=0", "starts=1", "tokens=2", "prompts=8")
    (_, _, code, model), *jobs = found
    monkeypatch.setattr(sys, "argv", ["-c", model])
    exec(code, {})
    assert capsys.readouterr().out == "2 of 5\n"
    monkeypatch.chdir(tmp_path)
    for flag, module, name, *words in jobs:
        assert (flag, module, name) == ("-P", "-m", "moe_compress")
        command_line(words)
    assert "speedup" in capsys.readouterr().out and list((tmp_path / "runs" / "speed").glob("*.json"))


def test_measure_flops(calls, command_line, tmp_path, monkeypatch, capsys):
    ((_, _, _, *words),) = calls("benchmark/measure_flops.sh", "tokens=8", "context=8")
    monkeypatch.chdir(tmp_path)
    command_line(words)
    made = read(tmp_path / "runs" / "flops" / "tiny-mixtral.json")
    assert set(made) == set(read(TABLE / "flops" / "tiny-mixtral.json"))


@pytest.mark.slow  # the shipped models are loaded and measured by tests/zoo
def test_training_a_model_of_the_zoo(tmp_path, monkeypatch):
    name = "tiny-mixtral"
    monkeypatch.setattr(text, "documents", functools.cache(text.documents))
    try:
        train.main(["--model", name, "--smoke", "--out", str(tmp_path)])
    finally:
        torch.use_deterministic_algorithms(False)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in zoo.path(name).iterdir()}
    assert read(tmp_path / "config.json") == read(zoo.path(name) / "config.json")
    made, kept = ((folder / "README.md").read_text().splitlines() for folder in (tmp_path, zoo.path(name)))
    starts = ("#", "| ")
    assert [line.split("|")[:2] for line in made if line.startswith(starts)] == [
        line.split("|")[:2] for line in kept if line.startswith(starts)
    ]
