"""Scripts run from anywhere, and a user's runs stay apart from the shipped ones."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from moe_compress import api
from moe_compress.run.options import Options

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "scripts").rglob("*.sh"))


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
        elif "async_eval" in script:
            commands = [line.split("|")[2] for line in done.stdout.splitlines()]
            assert sorted(line.split()[3] for line in commands) == ["compress", "watch"]
            assert all(line.startswith("-P -m moe_compress ") for line in commands)
            assert next(line for line in commands if " compress " in line).endswith("data=mine.txt")
        elif any(word in script for word in ("compress", "evaluate", "recover", "run.sh")):
            assert given.startswith("-P -m moe_compress ") and given.endswith("data=mine.txt")


def test_several_processes_are_asked_for_in_the_environment(clone, tmp_path):
    done = subprocess.run(
        ["bash", str(clone / "scripts/recover/distill.sh"), "data=mine.txt"],
        cwd=tmp_path, env={"PATH": os.environ["PATH"], "NPROC": "2"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    given = done.stdout.strip().split("|")[2]
    assert given.startswith("-P -m torch.distributed.run --standalone --nproc-per-node 2 -m moe_compress compress ")
    assert given.endswith("data=mine.txt")


@pytest.mark.parametrize(("name", "kind"), [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP")])
def test_accelerate_reads_the_shipped_configurations(name, kind):
    found = load_config_from_file(str(ROOT / "scripts" / "recover" / "accelerate" / f"{name}.yaml"))
    assert found.distributed_type == kind and found.mixed_precision == "no"
    assert kind == "MULTI_GPU" or found.fsdp_config["fsdp_version"] == 2


def test_a_users_runs_are_apart_from_the_shipped_grid(monkeypatch, tmp_path):
    assert Options().results == "runs"
    assert "runs/" in (ROOT / ".gitignore").read_text().splitlines()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"no record or folder of records runs/records"):
        api.table()
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "benchmark"))
    import zoo_grid as tables

    assert tables.RESULTS == ROOT / "results"
    for name, script in (("engine", "engine_speed"), ("gpu", "gpu_checks"), ("trimming", "trimming_speed")):
        assert f'default=RESULTS / "{name}.json"' in (ROOT / "scripts" / "benchmark" / f"{script}.py").read_text()
