"""Plans and recipes as files: edited by hand, moved to another model, rebuilt from the checkpoint."""

from __future__ import annotations

import json
import logging

import pytest

import moe_compress
from support import readers
from support.checkpoints import counts, kept, same_checkpoint
from support.slow import slow_after

FAMILIES = ("mixtral", "deepseek_v3")


@pytest.fixture(autouse=True)
def _said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "moe_compress")


@pytest.mark.parametrize("family", slow_after(1, FAMILIES))
def test_a_plan_edited_by_hand_is_applied_without_calibration(family, reader_folder, options, forwards, tmp_path):
    quiet = {**options, "eval": False}
    made = moe_compress.compress("expert_drop keep=6", model=reader_folder(family), **quiet).folder
    forwards.clear()
    same = moe_compress.apply(made / "plan.json", out=tmp_path / "same", **quiet).folder
    assert same_checkpoint(same, made)
    plan = json.loads((made / "plan.json").read_text())
    edit = plan["stages"][-1]["edits"][-1]
    edit["experts"] = [0, 1, 4, 5]
    (tmp_path / "mine.json").write_text(json.dumps(plan))
    mine = moe_compress.apply(str(tmp_path / "mine.json"), out=tmp_path / "mine", **quiet).folder
    assert counts(mine)[edit["layer"]] == 4
    assert kept(mine)[edit["layer"]] == [0, 1, 4, 5]
    assert not forwards
    evaluated = moe_compress.evaluate(mine, **options)
    assert evaluated.record.form == "edited" and "delta_nll" in evaluated.record.metrics


def test_a_plan_goes_to_another_model_only_if_told_to(reader_folder, options, tmp_path, caplog):
    quiet = {**options, "eval": False}
    made = moe_compress.compress("expert_drop keep=6", model=reader_folder("mixtral"), **quiet).folder
    other = readers.save_model("mixtral", tmp_path / "other", seed=5)
    with pytest.raises(ValueError, match=r"other is another model, or another version of it: .* say any_model=true"):
        moe_compress.apply(made / "plan.json", model=other, **quiet)
    result = moe_compress.apply(made / "plan.json", model=other, any_model=True, **quiet)
    assert kept(result.folder) == kept(made) and "is another model" in caplog.text
    assert result.folder.name.startswith("other-plan-")


@pytest.mark.parametrize(
    "sentence", slow_after(1, ["expert_drop score=man keep=6", "expert_drop ratio=0.5 + expert_drop keep=2"])
)
def test_the_recipe_in_the_checkpoint_rebuilds_it(sentence, reader_folder, options, tmp_path):
    folder = readers.save_model("mixtral", tmp_path / "model")
    made = moe_compress.compress(sentence, "seed=3", model=folder, **options).folder
    again = moe_compress.compress(
        str(made / "recipe.yaml"), out=tmp_path / "again", results=tmp_path / "elsewhere", eval=False
    )
    assert same_checkpoint(again.folder, made)
    assert (again.folder / "plan.json").read_bytes() == (made / "plan.json").read_bytes()


def test_a_plan_without_edits_changes_nothing(made, options, tmp_path):
    plan = json.loads((made("mixtral", "expert_drop score=weight_norm keep=6") / "plan.json").read_text())
    plan["stages"][0]["edits"] = []
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(ValueError, match=r"plan\.json holds no edits, so it changes nothing of its model"):
        moe_compress.apply(tmp_path / "plan.json", out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
