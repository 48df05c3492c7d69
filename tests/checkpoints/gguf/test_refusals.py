"""What a GGUF file cannot express, and files of other models, are refused in a sentence; nothing is left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_compress import api
from moe_compress.checkpoints.gguf import rewrite
from support.gguf_files import DIM, F32, INNER, write_model
from support.gguf_plans import drop, everywhere, keep, plan_file

EVERY = range(3)


def refused(tmp_path: Path, source: Path, plan: Path, **options: object) -> str:
    """What is said; the folder is as it was."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError) as error:
        api.export_gguf_plan(plan, source, **options)
    assert sorted(tmp_path.rglob("*")) == before
    return str(error.value)


EDITS = {
    "uneven": (keep({0: [0, 1, 2], 1: [0, 1], 2: [0, 1, 2]}), "leaves 2 experts in layer 1 and 3 in layer 0"),
    "one layer": (keep({0: [0, 1, 2]}), "leaves 3 experts in layer 0 and 8 in layer 1"),
    "top_k by layer": ([{"edit": "set_top_k", "layer": 0, "top_k": 1}], "leaves 1 active experts in layer 0 and 2"),
    "too few": (everywhere([0]), "would use 2 experts a layer, of 1"),
    "unknown expert": (everywhere([0, 8]), "layer 0: kept experts must be ascending ids below 8"),
    "twice": (everywhere([1, 1]), "ascending ids below 8"),
    "unknown layer": (drop(3), "there are layers 0 to 2"),
    "negative layer": (drop(-1), "there are layers 0 to 2"),
    "all layers": (drop(0, 0, 0), "no layer with experts is left"),
    "nothing": (keep({0: [*range(8)]}), "changes nothing of"),
    "no edits": ([], "changes nothing of"),
    "merge": (
        [{"edit": "merge_experts", "layer": 0, "groups": [[0, 1], [2, 3]], "weights": [[1.0, 1.0]] * 2,
          "router": "centroid"}],
        "its edit merge_experts of layer 0 needs numbers that m.gguf does not hold",
    ),
    "skip": ([{"edit": "skip_sublayer", "layer": 0, "part": "moe"}], "its edit skip_sublayer of layer 0 needs"),
    "activations": ([{"edit": "round_activations", "layer": 0, "where": "all"}], "its edit round_activations of"),
}  # fmt: skip


@pytest.mark.parametrize("case", EDITS)
def test_edits_that_gguf_cannot_express(case, tmp_path):
    edits, said = EDITS[case]
    assert said in refused(tmp_path, write_model(tmp_path / "m.gguf"), plan_file(tmp_path, edits))


def test_a_stage_that_changes_weights(tmp_path):
    plan = plan_file(tmp_path, everywhere([0, 1]), method="quantize")
    assert "its stage quantize changes weights" in refused(tmp_path, write_model(tmp_path / "m.gguf"), plan)


OTHERS = {
    "architecture": ({}, {"model_type": "qwen3_moe"}, "architecture qwen2moe, not qwen3moe"),
    "layers": ({}, {"layers": 4}, "layers 3, not 4"),
    "experts": ({}, {"experts": 16}, "experts 8, not 16"),
    "width": ({}, {"hidden_size": 64}, "hidden_size 256, not 64"),
    "unknown": ({}, {"model_type": "jetmoe"}, "has no architecture for jetmoe"),
    "name": ({"name": "Tiny Model Instruct"}, {}, "calls itself 'Tiny Model Instruct'"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_files_of_other_models(case, tmp_path):
    written, shape, said = OTHERS[case]
    plan = plan_file(tmp_path, everywhere([0, 1]), **shape)
    source = write_model(tmp_path / "m.gguf", **written)
    assert said in refused(tmp_path, source, plan)
    if case == "name":
        assert api.export_gguf_plan(plan, source, any_model="true").is_file()
    else:
        assert said in refused(tmp_path, source, plan, any_model=True)


def test_names_are_alike_but_for_punctuation_and_owner(tmp_path):
    plan = plan_file(tmp_path, everywhere([0, 1]))
    for number, name in enumerate(("tiny-model", "someone_Tiny Model", "")):
        assert api.export_gguf_plan(plan, write_model(tmp_path / f"{number}.gguf", name=name)).is_file()


def test_groups_keep_as_many_each(tmp_path):
    keys = {"expert_group_count": 2, "expert_group_used_count": 1}
    source = write_model(tmp_path / "m.gguf", "deepseek2", keys=keys, more=low_rank(3))
    for kept, said in (([0, 1, 2, 4], "routes within 2 groups"), ([0, 4], "2 or more")):
        plan = plan_file(tmp_path, everywhere(kept), "deepseek_v3")
        assert said in refused(tmp_path, source, plan)
    plan = plan_file(tmp_path, everywhere([0, 3, 4, 7]), "deepseek_v3")
    assert api.export_gguf_plan(plan, source).is_file()
    edits = [*everywhere([0, 3, 4, 7]), *({"edit": "set_top_k", "layer": n, "top_k": 3} for n in EVERY)]
    plan = plan_file(tmp_path, edits, "deepseek_v3")
    assert "3 experts a layer, of 2 that" in refused(tmp_path, source, plan, out=tmp_path / "other.gguf")


def low_rank(layers: int) -> dict:
    return {f"blk.{layer}.attn_q_a.weight": ((16, DIM), F32) for layer in range(layers)}


@pytest.mark.parametrize(
    ("architecture", "model_type", "keys", "layers", "said"),
    [
        ("gpt-oss", "gpt_oss", {}, (1,), "takes one layer in 2 of gpt-oss"),
        ("gpt-oss", "gpt_oss", {}, (1, 1), ""),
        ("gpt-oss", "gpt_oss", {"attention.sliding_window_pattern": [1, 0, 1, 0]}, (1,), ""),
        ("ernie4_5-moe", "ernie4_5_moe", {"interleave_moe_layer_step": 2}, (0,), "takes one layer in 2"),
        ("qwen3next", "qwen3_next", {"full_attention_interval": 4}, (0,), "none of them can be dropped"),
        ("qwen3moe", "qwen3_moe", {}, (2, 1), ""),
    ],
)
def test_layers_that_llama_cpp_knows_by_number(architecture, model_type, keys, layers, said, tmp_path):
    source = write_model(tmp_path / "m.gguf", architecture, experts=[8] * 4, keys=keys)
    plan = plan_file(tmp_path, drop(*layers), model_type, 4)
    if said:
        assert said in refused(tmp_path, source, plan)
    else:
        assert api.export_gguf_plan(plan, source).is_file()


@pytest.mark.parametrize(("lite", "before", "after", "loads"), [
    (True, 27, 26, True), (True, 27, 25, False), (False, 28, 27, False), (False, 29, 28, True),
])  # fmt: skip
def test_deepseeks_that_are_known_by_their_depth(lite, before, after, loads, tmp_path):
    """Refused before a byte is written; where it loads, the next thing that is wrong is said."""
    source = write_model(
        tmp_path / "m.gguf", "deepseek2", experts=[8] * before, more={} if lite else low_rank(before), small=True
    )
    plan = plan_file(tmp_path, drop(*[1] * (before - after)), "deepseek_v2", before)
    if loads:
        assert api.export_gguf_plan(plan, source).is_file()
    else:
        assert f"would not load this one with {after}" in refused(tmp_path, source, plan)


def test_a_router_that_is_guessed_from_the_depth(tmp_path):
    keys = {"vocab_size": 154880}
    plan = plan_file(tmp_path, drop(1), "glm4_moe_lite", 27)
    for more, said in (({}, "has no expert_gating_func"), ({"expert_gating_func": 2}, "")):
        source = write_model(tmp_path / "m.gguf", "deepseek2", experts=[8] * 27, keys={**keys, **more}, small=True)
        if said:
            assert said in refused(tmp_path, source, plan)
        else:
            assert api.export_gguf_plan(plan, source).is_file()


def test_tensors_of_experts_that_are_not_known(tmp_path):
    plan = plan_file(tmp_path, everywhere([0, 1]))
    for name, shape, said in (
        ("blk.1.ffn_gate.3.weight", (INNER, DIM), "holds one expert alone, as files of before April 2024 do"),
        ("blk.1.ffn_gate_tid2eid.weight", (8, DIM), "belongs to experts"),
        ("blk.1.ffn_up_exps.bias", (7, INNER), "is [7, 32], where the metadata has 8 experts"),
    ):
        source = write_model(tmp_path / "m.gguf", more={name: (shape, F32)})
        assert said in refused(tmp_path, source, plan)
    dense = write_model(tmp_path / "dense.gguf", experts=(0, 0, 0), keys={"expert_count": 8})
    assert "has no experts" in refused(tmp_path, dense, plan)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"block_count": 4_000_000_000}, "claims 4000000000 layers"),
        ({"block_count": 0}, "claims 0 layers"),
        ({"nextn_predict_layers": 9}, "claims -6 layers"),
        ({"expert_group_count": 3}, "claims 3 equal groups of 8 experts"),
        ({"expert_group_count": 4_000_000_000}, "equal groups of 8 experts"),
    ],
)
def test_numbers_that_no_model_has(keys, said, tmp_path):
    source = write_model(tmp_path / "m.gguf", keys=keys)
    assert said in refused(tmp_path, source, plan_file(tmp_path, everywhere([0, 1])))


def test_what_is_there_stays(tmp_path):
    source, plan = write_model(tmp_path / "m.gguf"), plan_file(tmp_path, everywhere([0, 1]))
    assert "is there already" in refused(tmp_path, source, plan, out=source)
    assert "is there already" in refused(tmp_path, source, plan, out=tmp_path)


def test_what_a_killed_run_left_is_cleared_and_what_is_foreign_stays(tmp_path):
    source, plan = write_model(tmp_path / "m.gguf"), plan_file(tmp_path, everywhere([0, 1]))
    partial = tmp_path / "m-cut.gguf.partial"
    partial.mkdir()
    (partial / "mine.txt").touch()
    assert "is not unfinished work of moe-compress" in refused(tmp_path, source, plan)
    (partial / "mine.txt").unlink()
    (partial / "m-cut.gguf").write_bytes(b"half")
    (partial / "state.json").write_text('{"identity": "of another plan"}')
    assert api.export_gguf_plan(plan, source).is_file() and not partial.exists()


def test_an_error_in_the_middle_leaves_nothing(tmp_path, monkeypatch):
    source, plan = write_model(tmp_path / "m.gguf"), plan_file(tmp_path, everywhere([0, 1]))
    for error in (ValueError("gone"), OSError("no space left"), KeyboardInterrupt()):
        with monkeypatch.context() as patch, pytest.raises(type(error)):
            calls = iter([None, None, error])

            def copy(*_: object, calls=calls) -> None:
                if (found := next(calls)) is not None:
                    raise found

            patch.setattr(rewrite, "copy_range", copy)
            api.export_gguf_plan(plan, source)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "plan.json"]
