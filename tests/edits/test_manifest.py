"""An edited checkpoint's entry in config.json is checked as a plan is; what nobody can have written is one sentence."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import moe_compress
from moe_compress.checkpoints.reader import open_checkpoint

Values = dict[str, Any]


@pytest.fixture(scope="module")
def uneven(lab, tmp_path_factory) -> Path:
    words = {**lab("mixtral"), "eval": False, "out": str(tmp_path_factory.mktemp("uneven") / "out")}
    folder = moe_compress.compress("expert_drop keep=6 budget=global score=random seed=1", **words).folder
    assert folder is not None and "moe_compress" in json.loads((folder / "config.json").read_text())
    return folder


def _edit(values: Values, **given: object) -> None:
    values["moe_compress"]["edits"][0] |= given


CHANGES: list[Any] = [
    (lambda v: _edit(v, layer=-1), "the plan edits layer -1, which has no experts"),
    (lambda v: _edit(v, layer=99), "the plan edits layer 99, which has no experts"),
    (lambda v: _edit(v, edit="shuffle"), "is not valid"),
    (lambda v: _edit(v, experts="0123"), "is not valid: experts: input should be a valid array"),
    (lambda v: _edit(v, experts=[0, 1, 99]), "kept experts must be ascending ids below 8"),
    (lambda v: _edit(v, active=-3.0), "a token uses 0 to 8 experts on average"),
    (lambda v: v["moe_compress"].update(edits="none"), "moe_compress.edits is no list of objects"),
    (lambda v: v["moe_compress"].update(edits=[3]), "moe_compress.edits is no list of objects"),
    (lambda v: v["moe_compress"].update(edits=v["moe_compress"]["edits"] * 1_000), "and at most 192 are read"),
    (lambda v: v["moe_compress"].update(moe={"block": "self_attn"}), "moe_compress.moe names other modules than"),
    (lambda v: v["moe_compress"].update(base_model_type="nothing"), "model_type is not moe_compress_nothing"),
    (lambda v: v["moe_compress"].pop("base_architectures"), "moe_compress lacks base_architectures"),
    (lambda v: v.update(moe_compress=[]), "moe_compress is no object"),
    (lambda v: v.pop("moe_compress"), "model_type=moe_compress_mixtral needs moe_compress"),
    (lambda v: v.update(model_type="mixtral"), "model_type is not moe_compress_mixtral"),
]


@pytest.mark.parametrize(("change", "said"), CHANGES, ids=[said for _, said in CHANGES])
def test_a_changed_entry_is_one_sentence(change, said, uneven, tmp_path):
    folder = tmp_path / "changed"
    shutil.copytree(uneven, folder)
    values = copy.deepcopy(json.loads((folder / "config.json").read_text()))
    change(values)
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        open_checkpoint(folder)
    assert said in str(caught.value) and "config.json" in str(caught.value) and "\n" not in str(caught.value)


def test_what_was_written_is_read(uneven):
    assert open_checkpoint(uneven).num_layers == 3
