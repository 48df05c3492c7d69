"""DeepSeek-V4: layers that look experts up in a table of token ids keep them all, whatever is done to the others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import moe_compress
from moe_compress.edits.apply import check_edits
from moe_compress.edits.edits import KeepExperts
from moe_compress.models import hf
from moe_compress.models.moe import all_moe_views, moe_views
from support import tiny
from support.editing import SIX, logits_of

FAMILY = "deepseek_v4"


def stored(folder) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("model*.safetensors"))
    return {key: tensor for file in files for key, tensor in load_file(file).items()}


@pytest.mark.parametrize("recipe", ["expert_drop score=frequency keep=6", "expert_merge keep=6", "top_k k=1"])
def test_they_stay_whole(recipe, lab, made):
    before, after = stored(Path(lab(FAMILY)["model"])), stored(made(FAMILY, recipe))
    first = [key for key in before if key.startswith("layers.0.")]
    assert len(first) > 3 * tiny.EXPERTS and "layers.0.ffn.gate.tid2eid" in first
    assert all(after[key].equal(before[key]) for key in first)
    model = AutoModelForCausalLM.from_pretrained(made(FAMILY, recipe), dtype=torch.float32).eval()
    left = tiny.EXPERTS if "top_k" in recipe else 6
    assert [view.num_experts for view in all_moe_views(model).values()] == [tiny.EXPERTS, left, left]
    assert list(moe_views(model)) == [1, 2]
    assert logits_of(model).isfinite().all()


def test_a_plan_for_them_is_refused(sources):
    with pytest.raises(ValueError, match="edits layer 0, whose experts are looked up by token"):
        check_edits(hf.skeleton(sources(FAMILY).config, torch.float32), [KeepExperts(0, SIX)])


def test_their_weights_are_quantized_with_the_others(lab, made):
    folder = made(FAMILY, "quantize method=rtn bits=4 group_size=8 format=compressed-tensors")
    packed = {key for key in stored(folder) if key.endswith("weight_packed")}
    assert {key.partition(".ffn")[0] for key in packed} == {"layers.0", "layers.1", "layers.2"}
    assert logits_of(moe_compress.load(folder)).isfinite().all()


def test_pruned_routers_of_theirs_choose_what_they_chose(lab, made):
    folder = made(FAMILY, "prune method=magnitude where=router")
    assert stored(folder)["layers.0.ffn.gate.tid2eid"].equal(
        stored(Path(lab(FAMILY)["model"]))["layers.0.ffn.gate.tid2eid"]
    )


@pytest.mark.parametrize("format", ["packed", "compressed-tensors"])
def test_its_grouped_map_multiplies_packed_as_it_does_dense(format, lab, made):
    sentence = "quantize method=rtn bits=4 group_size=8 where=experts,attention format="
    packed, dense = (moe_compress.load(made(FAMILY, sentence + name), torch.float32) for name in (format, "dense"))
    assert any(name.endswith("o_a_proj.words") for name in packed.state_dict())
    torch.testing.assert_close(logits_of(packed), logits_of(dense), rtol=0, atol=1e-5)
