"""Model types that only their own code knows, read as the type of transformers that they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import moe_compress
from moe_compress.checkpoints.reader import open_checkpoint
from moe_compress.edits.edits import KeepExperts
from support import tiny
from support.editing import SIX, cut, logits_of, moe_layers, original, write

KIMI = {"model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"], "scoring_func": "sigmoid"}
KIMI |= {"topk_method": "noaux_tc", "moe_layer_freq": 1}
KIMI |= {"auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"}}
HUNYUAN = {"model_type": "hunyuan", "architectures": ["HunYuanMoEV1ForCausalLM"], "use_qk_norm": True, "use_cla": False}


@pytest.fixture
def renamed(tmp_path):
    """A tiny checkpoint of a family whose config says other things as well."""

    def made(family: str, **values: object) -> Path:
        folder = tiny.save(tiny.make(family), tmp_path / family)
        stored = json.loads((folder / "config.json").read_text()) | values
        if values["model_type"] == "hunyuan":
            stored["attention_head_dim"] = stored.pop("head_dim")
        (folder / "config.json").write_text(json.dumps(stored))
        return folder

    return made


@pytest.mark.parametrize(("family", "values"), [("deepseek_v3", KIMI), ("hunyuan_v1_moe", HUNYUAN)])
def test_they_are_cut_as_the_type_that_they_are(family, values, renamed, family_checkpoint, tmp_path):
    source, plain = open_checkpoint(renamed(family, **values)), family_checkpoint(family)
    assert source.config.model_type == family
    edits = [KeepExperts(layer, SIX) for layer in moe_layers(source)]
    out = write(source, edits, tmp_path / "out")
    assert out.values["model_type"] == family and "auto_map" not in out.values
    assert torch.equal(logits_of(original(out)), logits_of(cut(plain, edits)))
    assert moe_compress.plan("expert_drop keep=6", model=source.folder).form == "plain"


@pytest.mark.parametrize("setting", [{"scoring_func": "softmax"}, {"topk_method": "greedy"}, {"moe_layer_freq": 2}])
def test_settings_of_another_kind_are_refused(setting, renamed):
    (key, value), folder = *setting.items(), renamed("deepseek_v3", **{**KIMI, **setting})
    with pytest.raises(ValueError, match=f"'kimi_k2' is read as deepseek_v3, but its config says {key}={value}"):
        moe_compress.plan("expert_drop keep=6", model=folder)


@pytest.mark.parametrize("change", ["more", "fewer", "wider"])
def test_tensors_of_another_kind_are_refused(change, renamed):
    folder = renamed("deepseek_v3", **KIMI)
    file = folder / "model.safetensors"
    tensors, name = load_file(file), "model.layers.1.input_layernorm.weight"
    more = {**tensors, f"{name}_2": tensors[name].clone()}
    fewer = {key: tensor for key, tensor in tensors.items() if key != name}
    found = {"more": more, "fewer": fewer, "wider": {**tensors, name: torch.ones(tiny.HIDDEN + 1)}}[change]
    save_file(found, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"is read as deepseek_v3, but its tensors are others: {name}"):
        open_checkpoint(folder)


def test_a_type_that_no_class_stands_for_is_refused(renamed):
    folder = renamed("deepseek_v3", **{**KIMI, "architectures": ["OtherForCausalLM"]})
    with pytest.raises(ValueError, match="'kimi_k2' is not an architecture of transformers"):
        moe_compress.plan("expert_drop keep=6", model=folder)
