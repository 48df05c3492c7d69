"""What measuring keeps apart, shares between processes, and refuses before anything has run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import moe_compress
from moe_compress.reports.reading import load_records
from moe_compress.run.option_uses import USED

Options = dict[str, object]


def evaluated(options: Options) -> Options:
    """The words that an evaluation takes."""
    return {key: value for key, value in options.items() if key in USED["evaluate"]}


def made(base: Path, options: Options) -> Path:
    found = moe_compress.compress("expert_drop keep=6", model=str(base), **{**options, "eval": False}).folder
    assert found is not None
    return found


def test_beside_another_model_a_checkpoint_has_no_recipe_and_its_card_stays(reader_folder, options, tmp_path):
    """Its row would stand for the same recipe on that model."""
    base, words = reader_folder("mixtral"), evaluated(options)
    other = tmp_path / "other"
    shutil.copytree(base, other)
    tensors = load_file(other / "model.safetensors")
    save_file({k: v * 1.01 for k, v in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    made = [moe_compress.compress("expert_drop keep=6", model=str(m), **options).folder for m in (base, other)]
    card = (made[0] / "README.md").read_text()
    found = moe_compress.evaluate(made[0], original=str(other), **words).record
    assert found.recipe == [] and found.report == [] and (made[0] / "README.md").read_text() == card
    (table,) = [t for t in moe_compress.table([f"{options['results']}/records"]) if t.title == "other"]
    assert len(table.frame) == 3


def test_folders_of_one_name_have_records_of_their_own(reader_folder, options, tmp_path):
    for keep, place in ((6, "a"), (4, "b")):
        words = {**options, "out": str(tmp_path / place / "mine"), "model": str(reader_folder("mixtral"))}
        moe_compress.compress(f"expert_drop keep={keep}", **words)
    found = {record.recipe[0]["given"]["keep"] for record in load_records(records_of(options)) if record.recipe}
    assert found == {6, 4}


def records_of(options: Options) -> list[Path]:
    return sorted((Path(str(options["results"])) / "records").glob("*.json"))


@pytest.mark.slow  # test_an_original_is_measured_once
def test_two_evaluations_at_once_share_one_measurement_of_the_original(reader_folder, options, tmp_path):
    folder = moe_compress.compress(
        "expert_drop keep=6", model=str(reader_folder("mixtral")), **{**options, "eval": False}
    ).folder
    words = [f"{key}={value}" for key, value in evaluated(options).items()]
    command = [sys.executable, "-m", "moe_compress", "evaluate", str(folder), *words]
    where = {**os.environ, "PYTHONPATH": str(Path(moe_compress.__file__).parents[1])}
    running = [
        subprocess.Popen(command, env=where, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for _ in range(2)
    ]
    ended = [(process.communicate()[1], process.returncode) for process in running]
    assert [code for _, code in ended] == [0, 0], ended
    assert len(records_of(options)) == 2


@pytest.mark.parametrize("place", ["records", "routing", "speed", "plots"])
def test_a_file_in_the_place_of_a_folder_is_refused_before_anything_is_measured(
    place, reader_folder, options, forwards
):
    results = Path(str(options["results"]))
    results.mkdir(parents=True)
    (results / place).write_text("in the way")
    base, words = str(reader_folder("mixtral")), evaluated(options)
    commands = {
        "records": lambda: moe_compress.evaluate(base, **words),
        "routing": lambda: moe_compress.routing(base, **words),
        "speed": lambda: moe_compress.speed(base, results=results),
        "plots": lambda: moe_compress.report([Path(__file__).parents[2] / "results" / "records"], results),
    }
    with pytest.raises(ValueError, match="nothing can be written to"):
        commands[place]()
    assert forwards == [] and not list(results.glob("*.html"))


@pytest.mark.parametrize("harm", [{"report": None}, {"cost": {}}, {"stages": [{"method": "x"}]}, {"base": {}}])
def test_a_changed_manifest_is_refused_before_anything_is_measured(harm, reader_folder, options, forwards):
    folder = moe_compress.compress(
        "expert_drop keep=6", model=str(reader_folder("mixtral")), **{**options, "eval": False}
    ).folder
    path = folder / "moe_compress.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **harm}))
    forwards.clear()
    words = evaluated(options)
    with pytest.raises(ValueError, match="is not what moe-compress writes into a checkpoint"):
        moe_compress.evaluate(folder, **words)
    assert forwards == []


def test_generations_have_to_fit(reader_folder, options):
    base = str(reader_folder("mixtral"))
    for count in (0, -1, 5000):
        with pytest.raises(ValueError, match=f"max_tokens={count}: a number from 1 to"):
            moe_compress.api.compare(base, base, max_tokens=count, **options)
