"""Every method plans for every family."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable

import pytest
import torch

from moe_compress.calibration.artefact import calibrate
from moe_compress.calibration.collect import observed
from moe_compress.calibration.model_statistics import ModelStatistics
from moe_compress.checkpoints.reader import Checkpoint
from moe_compress.edits.apply import check_edits
from moe_compress.engine.layers import StreamedLayers
from moe_compress.methods import registry
from moe_compress.models import hf
from support import tiny
from support.slow import each_once, slow_families, slow_unless
from support.tiny import CPU, windows_of
from support.trimming import planned, planning_report


@pytest.fixture(scope="module")
def seen(sources, tmp_path_factory) -> Callable[[str], tuple[Checkpoint, ModelStatistics]]:
    """family -> its checkpoint and what a method is given of it: one pass with output samples over random tokens."""
    place = tmp_path_factory.mktemp("seen")

    @functools.cache
    def of(family: str) -> tuple[Checkpoint, ModelStatistics]:
        checkpoint, windows = sources(family), windows_of(tiny.token_ids(8, 16, seed=2))
        layers = StreamedLayers(checkpoint, CPU, torch.float32)
        found = calibrate(checkpoint, layers, windows, place / f"{family}.safetensors", "", None, output_samples=True)
        return checkpoint, observed(checkpoint, found, {})

    return of


PLANS = (
    *(f"expert_drop score={score} keep=4" for score in ("reap", "ranked_choice", "naee", "remove_one", "gate_mass")),
    "expert_drop keep=6 novice=mean", "expert_drop preset=paper",
    "expert_merge keep=4", "expert_merge preset=hc_smoe keep=4", "expert_merge preset=m_smoe keep=4",
    "expert_merge grouping=ream by=outputs+logits align=both average=saliency keep=4",
    "layer_drop drop=1", "layer_drop drop=1 metric=without_norm", "layer_drop drop=1 part=attention",
    "block_drop drop=1", "block_drop drop=1 mode=consecutive",
    "top_k mean=1.5", "skip", "skip beta=0.5",
)  # fmt: skip
UNRULED = "its router follows no rule that is known here"
UNMEASURED = "turn the stream could not be measured: name the layers"
# family -> parts of sentences -> why there is no such plan.
NO_PLAN: dict[str, dict[str, str]] = {
    "llama4_text": {"naee": UNRULED, "remove_one": UNRULED, "top_k mean": "but fewer than 1, can be active"}
    | {"skip": "there is none to skip", "novice": "is not possible for llama4_text"}
    | {"hc_smoe": "is not possible for llama4_text", "m_smoe": "is not possible for llama4_text"},
    "phimoe": {"naee": UNRULED, "remove_one": UNRULED, "top_k mean": UNRULED},
    "deepseek_v4": {
        "naee": UNRULED,
        "remove_one": UNRULED,
        "top_k mean": UNRULED,
        "layer_drop drop=1$": UNMEASURED,
        "part=attention": UNMEASURED,
    },
    "hy_v4": {"layer_drop drop=1$": UNMEASURED, "part=attention": UNMEASURED},
    "inkling_text": {"naee": UNRULED, "remove_one": UNRULED, "top_k mean": UNRULED},
    "nemotron_h": {"part=attention": "of 0 layers with attention"},
    "qwen3_next": {"part=attention": "of 1 layers with attention"},
    "lfm2_moe": {"part=attention": "of 1 layers with attention"},
}


@pytest.mark.parametrize("family", slow_families(tiny.EDITABLE, 5))
def test_every_method_plans_for_every_family(family, seen):
    checkpoint, model = seen(family)
    for sentence in PLANS:
        why = next((why for part, why in NO_PLAN.get(family, {}).items() if part in f"{sentence}$"), None)
        name, *words = sentence.split()
        method = registry.find(name)
        bound = method.bind(dict(word.split("=") for word in words))
        if why is not None:
            with pytest.raises(ValueError, match=why):
                method.check(model.shape, **bound)
                check_edits(hf.skeleton(checkpoint.config, torch.float32), planned(model, sentence).edits)
            continue
        plan, again = planned(model, sentence), planned(model, sentence)
        assert plan == again
        edits, expected = plan.edits, method.check(model.shape, **bound).edits
        assert edits and type(edits[0]) is type(expected[0])
        if bound.get("budget") == "layer":
            kept = [[len(getattr(e, "experts", getattr(e, "groups", ()))) for e in es] for es in (edits, expected)]
            assert kept[0] == kept[1]
        check_edits(hf.skeleton(checkpoint.config, torch.float32), edits)
        json.dumps(planning_report(plan), allow_nan=False)


GROUPINGS = ("hc_smoe", "m_smoe", "ream")
SIMILARITIES = ("outputs", "logits", "weights", "coactivation", "outputs+logits")


@pytest.mark.parametrize(
    ("router", "family"),
    slow_unless(
        each_once(("centroid", "sum"), ("mixtral", "deepseek_v3", "gpt_oss")),
        ("centroid", "sum"),
        ("mixtral", "deepseek_v3", "gpt_oss"),
    ),
)
def test_every_way_to_merge_shares_out_the_experts(family, router, seen):
    checkpoint, model = seen(family)
    skeleton = hf.skeleton(checkpoint.config, torch.float32)
    for grouping, by, align in itertools.product(GROUPINGS, SIMILARITIES, ("none", "weights", "activations", "both")):
        if align != "none" and (grouping, by) != ("hc_smoe", "weights"):
            continue  # how neurons are matched does not depend on how groups are found
        plan = planned(model, f"expert_merge grouping={grouping} by={by} align={align} router={router} keep=4 cap=3")
        assert len(plan.edits) == len(model.layers)
        for edit in plan.edits:
            edit.check(skeleton)
            assert len(edit.groups) == 4 and max(map(len, edit.groups)) <= 3 and edit.router == router
            assert edit.aligned is (align != "none") is bool(edit.arrays)
            assert all(list(group[1:]) == sorted(group[1:]) for group in edit.groups)
