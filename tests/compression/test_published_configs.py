"""Models made small from published configs: every kind of edit, and a checkpoint that stock transformers loads."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING, AutoConfig

import moe_compress
from moe_compress.utils.files import read_json
from support import shrunk

PUBLISHED = {
    each.name: each / "config.json"
    for each in sorted((resources.files("moe_compress.zoo") / "configs").iterdir(), key=lambda path: path.name)
    if read_json(each / "config.json")["model_type"] in CONFIG_MAPPING
}
# No configs of theirs are shipped: what transformers takes by default is what is published, and what else they say.
DEFAULTS: dict[str, dict[str, Any]] = {
    "deepseek_v4": {"expert_dtype": "fp4"},
    "qwen3_vl_moe": {
        "vision_config": {
            "model_type": "qwen3_vl_moe", "depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2,
            "out_hidden_size": 64, "deepstack_visual_indexes": [0],
        }
    },
}  # fmt: skip
# Of DBRX no tensor and no key is called as in others; its rope_theta is where transformers passes over it.
DEFAULTS["dbrx"] = {"rope_parameters": None}
RECIPES = (
    "expert_drop score=weight_norm keep=4",
    "expert_merge by=weights average=uniform keep=4",
    "channels score=magnitude ratio=0.5",
    "prune method=magnitude",
    "quantize method=rtn",
)


def values_of(name: str) -> dict[str, Any]:
    if name in PUBLISHED:
        return read_json(PUBLISHED[name])
    return {**AutoConfig.for_model(name).to_dict(), **DEFAULTS[name]}


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """Small copies, each made once."""
    folder = tmp_path_factory.mktemp("published")

    def copy(name: str) -> Path:
        made = folder / name
        return made if made.exists() else shrunk.save(shrunk.shrunk(values_of(name)), made)

    return copy


# Names that a renaming is not meant for, a word on experts' bits that holds no longer, parameters that want gradients.
FOUND = (("deepseek_v4", RECIPES[4]), ("qwen3_vl_moe", RECIPES[1]))


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        pytest.param(name, recipe, marks=[] if (name, recipe) in FOUND else pytest.mark.slow)
        for name in (*DEFAULTS, *PUBLISHED)
        for recipe in RECIPES
    ],
)
def test_a_small_copy_of_a_published_model_is_compressed(name, recipe, copies, tmp_path):
    out, results = tmp_path / "out", tmp_path / "results"
    moe_compress.compress(recipe, model=copies(name), out=out, eval=False, results=results)
    found = moe_compress.verify(out, results=results)
    assert not found.problems and found.error is not None and found.error <= found.tolerance
