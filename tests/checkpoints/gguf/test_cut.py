"""A plan on a GGUF file: what is left has the bytes it had, and metadata that says so; read back by gguf alone."""

from __future__ import annotations

import numpy as np
import pytest

from moe_compress import api
from support.gguf_files import DIM, INNER, Read, layer_tensors, write_model
from support.gguf_plans import drop, keep, plan_file

KEPT = {0: [0, 2, 3, 7], 1: [1, 4, 5, 6], 2: [0, 1, 2, 3]}
BY_EXPERT = ("exps", "ffn_gate_inp.", "exp_probs_b")


def test_experts_are_sliced_and_all_else_is_as_it_was(tmp_path):
    source = write_model(tmp_path / "m.gguf", bias=True, alignment=64)
    made = api.export_gguf_plan(plan_file(tmp_path, keep(KEPT)), source)
    assert made == tmp_path / "m-cut.gguf"
    before, after = Read(source), Read(made)
    assert after.raw.keys() == before.raw.keys()
    for name, raw in before.raw.items():
        cut = any(word in name for word in BY_EXPERT) and "shexp" not in name
        kept = KEPT[int(name.split(".")[1])] if cut else slice(None)
        assert np.array_equal(after.raw[name], raw[kept]), name
        assert np.array_equal(after.numbers[name], before.numbers[name][kept]), name
        assert raw.any() and np.isfinite(before.numbers[name]).all(), name
    changed = {key for key in before.values if after.values.get(key) != before.values[key]}
    assert changed == {"qwen2moe.expert_count", "general.size_label"}
    assert after.values["qwen2moe.expert_count"] == 4 and "general.size_label" not in after.values
    assert after.readers[0].alignment == 64 and all(t.data_offset % 64 == 0 for t in after.readers[0].tensors)
    assert [*after.values] == [key for key in before.values if key != "general.size_label"]


def test_layers_that_go_renumber_the_rest(tmp_path):
    keys = {
        "attention.head_count_kv": [1, 2, 3, 4],
        "leading_dense_block_count": 2,
        "rope.dimension_sections": [9, 8, 7, 6],
    }
    source = write_model(tmp_path / "m.gguf", "glm4moe", experts=(0, 0, 8, 8), keys=keys)
    plan = plan_file(tmp_path, [*drop(2, 0), *keep({1: [2, 3, 4]})], "glm4_moe", 4)
    before, after = Read(source), Read(api.export_gguf_plan(plan, source, tmp_path / "out.gguf"))
    assert {key: after.values[f"glm4moe.{key}"] for key in (*keys, "block_count", "expert_count")} == {
        "attention.head_count_kv": [2, 4], "leading_dense_block_count": 1, "rope.dimension_sections": [9, 8, 7, 6],
        "block_count": 2, "expert_count": 3,
    }  # fmt: skip
    places = {"blk.0.": "blk.1.", "blk.1.": "blk.3."}
    assert {name.replace("blk.", "", 1).partition(".")[0] for name in after.raw if name.startswith("blk.")} == {
        "0",
        "1",
    }
    for name, raw in after.raw.items():
        old = next((name.replace(new, old) for new, old in places.items() if name.startswith(new)), name)
        kept = [2, 3, 4] if old.startswith("blk.3.ffn") and "shexp" not in old else slice(None)
        assert np.array_equal(raw, before.raw[old][kept]), name


def test_edits_follow_each_other(tmp_path):
    source = write_model(tmp_path / "m.gguf")
    first = keep({layer: [1, 2, 4, 6, 7] for layer in range(3)})
    edits = [*first, *drop(1), *keep({0: [0, 4], 1: [1, 2]})]
    before, after = Read(source), Read(api.export_gguf_plan(plan_file(tmp_path, edits), source))
    for new, old, kept in ((0, 0, [1, 7]), (1, 2, [2, 4])):
        name = "ffn_up_exps.weight"
        assert np.array_equal(after.raw[f"blk.{new}.{name}"], before.raw[f"blk.{old}.{name}"][kept])


def test_a_top_k_and_the_width_that_is_derived_from_it(tmp_path):
    """Without a width of experts, llama.cpp divides the dense one by the number of active experts."""
    edits = [{"edit": "set_top_k", "layer": layer, "top_k": 1} for layer in range(3)]
    source = write_model(tmp_path / "m.gguf", keys={"feed_forward_length": 2 * INNER})
    before, after = Read(source), Read(api.export_gguf_plan(plan_file(tmp_path, edits), source))
    assert after.values["qwen2moe.expert_used_count"] == 1
    assert after.values["qwen2moe.expert_feed_forward_length"] == INNER
    assert all(np.array_equal(raw, before.raw[name]) for name, raw in after.raw.items())


def test_dense_widths_by_layer_are_no_width_of_experts(tmp_path):
    source = write_model(tmp_path / "m.gguf", "qwen3moe", keys={"feed_forward_length": [5, 6, 7]})
    edits = [*drop(0), *({"edit": "set_top_k", "layer": layer, "top_k": 1} for layer in range(2))]
    after = Read(api.export_gguf_plan(plan_file(tmp_path, edits, "qwen3_moe"), source))
    assert after.values["qwen3moe.feed_forward_length"] == [6, 7]
    assert "qwen3moe.expert_feed_forward_length" not in after.values


def test_split_files_stay_as_many(tmp_path):
    first = write_model(tmp_path / "m.gguf", shards=3)
    plan = plan_file(tmp_path, [*keep(KEPT), *drop(0)])
    parts = sorted(tmp_path.glob("m-*.gguf"))
    made = api.export_gguf_plan(plan, parts[1])
    assert made == tmp_path / "m-cut" and first == parts[0]
    names = [part.name for part in parts]
    assert sorted(path.name for path in made.iterdir()) == names == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    before, after = Read(*parts), Read(*(made / name for name in names))
    assert after.values["split.tensors.count"] == len(after.raw) == len(before.raw) - len(layer_tensors(0, 8))
    assert np.array_equal(after.raw["blk.1.ffn_down_exps.weight"], before.raw["blk.2.ffn_down_exps.weight"][KEPT[2]])
    parts[2].unlink()
    with pytest.raises(ValueError, match=r"is one of 3 files, and m-00003-of-00003\.gguf is not beside it"):
        api.export_gguf_plan(plan, parts[0], tmp_path / "again")


def test_layers_that_predict_further_tokens_are_left_out(tmp_path):
    keys = {"nextn_predict_layers": 1, "attention.head_count_kv": [1, 2, 3]}
    source = write_model(
        tmp_path / "m.gguf", "glm4moe", keys=keys, more={"blk.2.nextn.eh_proj.weight": ((DIM, 2 * DIM), 8)}
    )
    plan = plan_file(tmp_path, keep({0: [0, 1], 1: [2, 3]}), "glm4_moe", 2)
    after = Read(api.export_gguf_plan(plan, source))
    assert {key: after.values[f"glm4moe.{key}"] for key in (*keys, "block_count")} == {
        "nextn_predict_layers": 0, "attention.head_count_kv": [1, 2], "block_count": 2,
    }  # fmt: skip
    assert not [name for name in after.raw if name.startswith("blk.2.")]
