"""The commands of the pages are what the command line takes, and the tutorial's run in order."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.pages import (
    DOCS,
    PAGES,
    ROOT,
    blocks,
    commands,
    repository_with_a_python_that_only_prints,
    require_words,
    shown,
)

TUTORIAL = (DOCS / "tutorial.md").read_text(encoding="utf-8")
# The commands of docs/extending need what its examples add: tests beside this one run them.
WITH_COMMANDS = [page for page in PAGES if "extending" not in page.parts and commands(page.read_text(encoding="utf-8"))]


@pytest.fixture(scope="module")
def printing(tmp_path_factory):
    return repository_with_a_python_that_only_prints(tmp_path_factory.mktemp("printing"))


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=shown)
def test_every_command_of_a_page_is_understood(page, printing, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    for recipe in blocks(text, "yaml"):
        name = re.match(r"# (\S+\.yaml)\n", recipe)
        if name:
            (tmp_path / name[1]).write_text(recipe, encoding="utf-8")
    for words in commands(text):
        try:
            require_words(words, printing)
        except ValueError as error:
            pytest.fail(f"{' '.join(words)}: {error}")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("bash scripts/run.sh compress 'expert_drop keap=6'", "did you mean 'keep'"),
        ("bash scripts/run.sh speed FOLDER quik=true", "'quik'"),
        ("bash scripts/run.sh export FOLDER data=zoo", "'data'"),
        ("bash scripts/run.sh report runs/records out=page date=1", "'date'"),
        ("bash scripts/compress/expert_drop/mixtral_expert_drop.sh keep=six", "whole number"),
        ("bash scripts/compress/unheard.sh", "there is no scripts/compress/unheard.sh"),
        ("moe-compress compare A max_tokens=30", "takes 2 words"),
    ],
)
def test_a_wrong_command_is_found(command, said, printing):
    (words,) = commands(f"```bash\n{command}\n```\n")
    with pytest.raises(ValueError, match=said):
        require_words(words, printing)


def test_the_tutorial_has_a_command_for_every_step():
    steps = re.findall(r"^## \d+\. (.*)$", TUTORIAL, re.MULTILINE)
    assert len(steps) >= 9
    named = {words[2] for words in commands(TUTORIAL) if words[1].endswith("run.sh")}
    assert named >= {"plan", "compress", "table", "routing", "speed", "report", "verify", "apply", "push"}


@pytest.mark.slow
def test_the_tutorial_runs_from_its_first_command_to_its_last(tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    printed = {}
    for code in blocks(TUTORIAL, "bash"):
        for line in code.splitlines():
            done = subprocess.run(
                ["bash", "-c", line.replace("bash scripts/", f"bash {ROOT}/scripts/")],
                cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
            printed[line] = done.stdout + done.stderr
    said = "\n".join(printed.values())
    for promise in ("plain checkpoint", "no forward needed", "packed checkpoint: verified", "Nothing was sent"):
        assert promise in said, promise
    made = tmp_path / "runs" / "checkpoints"
    assert {"fewer-experts", "four-bits", "fewer-blocks", "from-plan"} <= {each.name for each in made.iterdir()}
    shards = sorted(path.name for path in (made / "fewer-experts").glob("*.safetensors"))
    for name in shards:
        if name != "plan.safetensors":
            assert (made / "from-plan" / name).read_bytes() == (made / "fewer-experts" / name).read_bytes()
    assert (tmp_path / "runs" / "report.html").is_file()


@pytest.mark.slow
def test_the_tutorials_python_runs(tmp_path):
    (code,) = blocks(TUTORIAL, "python")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "True" in done.stdout.splitlines()
    assert Path(done.stdout.split()[0]).name in {each.name for each in (tmp_path / "runs" / "checkpoints").iterdir()}
