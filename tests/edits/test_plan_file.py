"""Plans as files: every edit survives JSON, and a broken plan is one sentence."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

import moe_compress
from moe_compress.checkpoints.load import load_model
from moe_compress.edits.edits import (
    from_json,
    to_json,
)
from support import tiny
from support.edit_kinds import KINDS, edits_of
from support.editing import logits_of

pytestmark = pytest.mark.filterwarnings("ignore:packed weights are made dense")


def test_a_plan_finds_its_tensors_when_edits_change_places(made, lab, tmp_path):
    folder = made("mixtral", "channels keep=16")
    plan = json.loads((folder / "plan.json").read_text())
    plan["stages"][0]["edits"].reverse()
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    (tmp_path / "plan.safetensors").write_bytes((folder / "plan.safetensors").read_bytes())
    options = {k: v for k, v in lab("mixtral").items() if k != "data"}
    applied = moe_compress.apply(tmp_path / "plan.json", out=str(tmp_path / "out"), **options).folder
    torch.testing.assert_close(logits_of(load_model(applied)), logits_of(load_model(folder)))


BASE = {"model": "x", "commit": None, "fingerprint": "x"}
EDIT = {"edit": "keep_experts", "layer": 0, "experts": [0, 1, 2, 3]}
NOVICES = {**EDIT, "novices": True}
MERGE = {
    "edit": "merge_experts",
    "layer": 0,
    "groups": [[0, 1], [2], [3], [4], [5, 6, 7]],
    "weights": [[1.0, 2.0], [1.0], [1.0], [1.0], [1.0, 0.0, 0.0]],
    "router": "centroid",
}


def plan_of(*edits: object, **values: object) -> str:
    """A plan file of one stage."""
    stage = {"method": "plan", "edits": [*edits], "scores": {}, "report": {}}
    return json.dumps({"version": 2, "base": BASE, "stages": [stage], **values})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not valid JSON"),
        ("[]", "is not a plan of moe-compress"),
        (json.dumps({"version": 2, "stages": []}), "it needs `base` and a list of `stages`."),
        (plan_of(stages=[]), "has no stages: there is nothing to apply."),
        (
            plan_of({"edit": "pack_matrices", "layer": 0, "bits": {"mlp.experts.up": [4] * 8}, "spans": {}}),
            "its edit pack_matrices of layer 0 makes room for codes, which no plan holds",
        ),
        (plan_of({**EDIT, "active": -1.0}), "a token uses 0 to 8 experts on average, not active=-1.0."),
        (plan_of({**EDIT, "active": float("nan")}), "a token uses 0 to 8 experts on average, not active=nan."),
        (
            plan_of({"edit": "skip_experts", "layer": 0, "threshold": 0.5, "renormalise": True, "active": 9.0}),
            "a token uses 0 to 8 experts on average, not active=9.0.",
        ),
        (plan_of(stages=None), "every one of its `stages` needs a list of `edits`."),
        (plan_of(stages=3), "every one of its `stages` needs a list of `edits`."),
        (plan_of(stages=[3]), "every one of its `stages` needs a list of `edits`."),
        (plan_of(stages=[{"edits": 3}]), "every one of its `stages` needs a list of `edits`."),
        (plan_of(stages=[{"method": "plan"}]), "every one of its `stages` needs a list of `edits`."),
        (plan_of(base=None), "does not say which model it is for"),
        (plan_of(base={"model": 3}), "does not say which model it is for"),
        (plan_of(version=99), "is a plan of version 99; this version reads 2."),
        (plan_of(version=1), "is a plan of version 1; this version reads 2."),
        (plan_of(3), "an edit is an object such as {'edit': 'drop_layer', 'layer': 3}, not 3."),
        (plan_of({}), "the edit {} is not valid"),
        (plan_of({"layer": 0}), "is not valid"),
        (plan_of({**EDIT, "edit": "drop_expert"}), "is not valid"),
        (plan_of(EDIT, {**EDIT, "edit": ["x"]}), "is not valid"),
        (plan_of({"edit": "keep_experts", "layer": 1}), "is not valid: experts: field required."),
        (plan_of({**EDIT, "experts": 3}), "is not valid: experts: input should be a valid array."),
        (plan_of({**EDIT, "layer": "0"}), "is not valid: layer: input should be a valid integer."),
        (plan_of({**EDIT, "layer": 0.0}), "is not valid: layer: input should be a valid integer."),
        (plan_of({**EDIT, "layer": True}), "is not valid: layer: input should be a valid integer."),
        (plan_of({**EDIT, "experts": ["a"]}), "is not valid: experts.0: input should be a valid integer."),
        (plan_of({**EDIT, "novices": 1}), "is not valid: novices: input should be a valid boolean."),
        (plan_of({**EDIT, "expert": 1}), "is not valid: expert: unexpected keyword argument."),
        (plan_of({**MERGE, "router": "mean"}), "is not valid: router: input should be 'centroid' or 'sum'."),
        (plan_of({**MERGE, "weights": [[1, "x"]]}), "is not valid: weights.0.1"),
        (plan_of({"edit": "skip_sublayer", "layer": 0, "part": "mlp"}), "is not valid: part"),
        (plan_of({"edit": "set_top_k", "layer": 0, "top_k": 1.5}), "is not valid: top_k"),
        (plan_of({"edit": "skip_experts", "layer": 0, "threshold": 0.5}), "is not valid: renormalise: field required."),
        (plan_of({**EDIT, "layer": 7}), "the plan edits layer 7, which has no experts; MoE layers: [0, 1, 2]."),
        (plan_of(EDIT, EDIT, {**EDIT, "experts": [2, 4]}), "kept experts must be ascending ids below 4, not [2, 4]."),
        (plan_of({**EDIT, "experts": [3, 1, 0]}), "kept experts must be ascending ids below 8, not [3, 1, 0]."),
        (plan_of({**EDIT, "experts": [0, 0, 1]}), "kept experts must be ascending ids below 8"),
        (plan_of({**EDIT, "experts": [6, 8]}), "kept experts must be ascending ids below 8"),
        (plan_of({**EDIT, "experts": [-1, 2]}), "kept experts must be ascending ids below 8"),
        (plan_of({**EDIT, "experts": [1]}), "keep=1 is fewer than the 2 experts each token uses"),
        (plan_of({**EDIT, "experts": []}), "kept experts must be ascending ids below 8, not []."),
        (plan_of(NOVICES), "the tensors of its edit on layer 0 are not in plan.safetensors beside it."),
        (plan_of({**MERGE, "aligned": True}), "the tensors of its edit on layer 0 are not in plan.safetensors"),
        (plan_of({**MERGE, "groups": [[0, 1]]}), "groups must share out its 8 experts, each once; this plan has"),
        (plan_of({**MERGE, "groups": [[0, 1], [1, 2, 3, 4, 5, 6, 7]]}), "groups must share out its 8 experts"),
        (plan_of({**MERGE, "groups": [[], [0, 1, 2, 3, 4, 5, 6, 7]]}), "groups must share out its 8 experts"),
        (plan_of({**MERGE, "weights": [[1.0]]}), "every member of a group needs one weight, from 0 up."),
        (plan_of({**MERGE, "weights": [[-1.0, 2.0], *MERGE["weights"][1:]]}), "needs one weight, from 0 up."),
        (plan_of({**MERGE, "weights": [[1e308, 1e308], *MERGE["weights"][1:]]}), "must add up to a number above 0"),
        (
            plan_of({**MERGE, "weights": [[0.0, 0.0], *MERGE["weights"][1:]]}),
            "must add up to a number above 0",
        ),
        (plan_of({"edit": "drop_layer", "layer": 3}), "the plan drops layer 3, but there are layers 0 to 2."),
        (plan_of({"edit": "drop_layer", "layer": -1}), "the plan drops layer -1, but there are layers 0 to 2."),
        (plan_of(*[{"edit": "drop_layer", "layer": 0}] * 3), "layer 0 is the only layer left with experts"),
        (
            plan_of({"edit": "set_top_k", "layer": 0, "top_k": 9}),
            "cannot use 9 experts per token: 1 to 8",
        ),
        (
            plan_of({"edit": "set_top_k", "layer": 0, "top_k": 0}),
            "cannot use 0 experts per token: 1 to 8",
        ),
        (
            plan_of({"edit": "skip_experts", "layer": 0, "threshold": 2.0, "renormalise": True}),
            "layer 0: a threshold is a fraction from 0 to 1, not 2.0.",
        ),
        (
            plan_of(*[{"edit": "skip_sublayer", "layer": layer, "part": "attention"} for layer in range(3)]),
            "layer 2 is the only one left with attention, which has to stay.",
        ),
        (
            plan_of(*[{"edit": "skip_sublayer", "layer": layer, "part": "moe"} for layer in (0, 0)]),
            "layer 0",
        ),
    ],
)
def test_broken_plans(text, said, reader_folder, options, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        moe_compress.apply(path, model=reader_folder("mixtral"), any_model=True, out=tmp_path / "out", **options)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)
    assert not list(tmp_path.glob("out*"))


NAN, INF = float("nan"), float("inf")
ORDER = {**MERGE, "aligned": True}
COUNTED = torch.arange(tiny.INNER).repeat(tiny.EXPERTS, 1)


@pytest.mark.parametrize(
    ("text", "tensors"),
    [
        (plan_of(NOVICES), b"broken"),
        (plan_of(NOVICES), {"0.keep_experts.1.outputs": torch.zeros(4, tiny.HIDDEN)}),
        (plan_of(NOVICES), {"0.keep_experts.0.outputs": torch.zeros(3, tiny.HIDDEN)}),
        (plan_of(NOVICES), {"0.keep_experts.0.outputs": torch.zeros(4, tiny.HIDDEN - 1)}),
        (plan_of(NOVICES), {"0.keep_experts.0.outputs": torch.full((4, tiny.HIDDEN), NAN)}),
        (
            plan_of(NOVICES),
            {"0.keep_experts.0.outputs": torch.zeros(4, tiny.HIDDEN), "0.keep_experts.0.x": torch.ones(1)},
        ),
        (plan_of(ORDER), {"0.merge_experts.0.order": COUNTED[:, :-1].contiguous()}),
        (plan_of(ORDER), {"0.merge_experts.0.order": COUNTED[:-1].contiguous()}),
        (plan_of(ORDER), {"0.merge_experts.0.order": COUNTED + 1}),
        (plan_of(ORDER), {"0.merge_experts.0.order": torch.zeros_like(COUNTED)}),
        (plan_of(ORDER), {"0.merge_experts.0.order": COUNTED.float()}),
        (plan_of({**MERGE, "weights": [[NAN, 1.0], *MERGE["weights"][1:]]}), {}),
        (plan_of({**MERGE, "weights": [[INF, 1.0], *MERGE["weights"][1:]]}), {}),
        (plan_of(stages=[{"edits": [EDIT], "scores": []}]), {}),
        (plan_of(stages=[{"edits": [EDIT], "scores": None}]), {}),
        (plan_of(stages=[{"edits": [EDIT], "scores": 3}]), {}),
        (plan_of(stages=[{"edits": [EDIT], "scores": "x"}]), {}),
        (plan_of(stages=[{"edits": [EDIT], "scores": {"a": [1.0]}}]), {}),
        (plan_of(stages=[{"edits": [EDIT], "scores": {"0": None}}]), {}),
        (plan_of(stages=[{"edits": [EDIT], "report": 3}]), {}),
        (plan_of(stages=[{"edits": [EDIT], "report": None}]), {}),
    ],
)
def test_plans_whose_numbers_or_tensors_do_not_fit(text, tensors, reader_folder, options, tmp_path):
    (tmp_path / "plan.json").write_text(text)
    if isinstance(tensors, bytes):
        (tmp_path / "plan.safetensors").write_bytes(tensors)
    elif tensors:
        save_file(tensors, tmp_path / "plan.safetensors")
    words = {**options, "model": reader_folder("mixtral"), "out": tmp_path / "out", "eval": False}
    with pytest.raises(ValueError):
        moe_compress.apply(tmp_path / "plan.json", any_model=True, **words)
    assert not list(tmp_path.glob("out*"))


def test_a_plan_for_unbalanced_groups(reader_folder, options, tmp_path):
    path = tmp_path / "plan.json"
    edit = {**EDIT, "layer": 1}
    for experts, said in [([0, 1, 2, 4, 5, 6, 7], "possible counts are 4, 6, 8"), ([0, 1, 2, 4], "[3, 1]")]:
        path.write_text(plan_of({**edit, "experts": experts}))
        with pytest.raises(ValueError) as caught:
            moe_compress.apply(
                path, model=reader_folder("deepseek_v3"), any_model=True, out=tmp_path / "out", **options
            )
        assert said in str(caught.value)
    assert not list(tmp_path.glob("out*"))


def test_a_plan_whose_model_is_gone(options, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(plan_of(EDIT, base={**BASE, "model": str(tmp_path / "gone")}))
    with pytest.raises(ValueError, match="there is no model"):
        moe_compress.apply(path, **options)
    with pytest.raises(ValueError, match="there is no file"):
        moe_compress.apply(tmp_path / "none.json", **options)


@pytest.mark.parametrize("kind", KINDS)
def test_every_edit_survives_json(kind, sources):
    for edit in edits_of(kind, sources("mixtral")):
        assert from_json(json.loads(json.dumps(to_json(edit))), edit.arrays) == edit
        assert "arrays" not in to_json(edit)
