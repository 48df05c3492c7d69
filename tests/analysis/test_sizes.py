"""Sizes add up, however weights are stored, and what is predicted is written."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig

import moe_compress
from moe_compress import zoo
from moe_compress.analysis.compressor import ExpertCompressor
from moe_compress.analysis.layer_info import MoEHooks
from moe_compress.analysis.sizes import estimate_compressed_size, estimate_model_size, print_compression_summary
from moe_compress.checkpoints.reader import open_checkpoint
from moe_compress.models import hf
from moe_compress.models.moe import all_moe_views, moe_views
from moe_compress.models.sizes import sizes
from support import tiny
from support.planted import FAMILIES, LAYER, PROMPTS, reader
from support.slow import slow_after


@pytest.mark.parametrize("family", tiny.EDITABLE)
def test_sizes_add_up(family):
    model = tiny.make(family)
    found = estimate_model_size(model)
    assert found["total"] == sum(found[part] for part in ("expert", "attention", "embeddings", "other"))
    assert found["total"] == sizes(model, 16, torch.float32).parameters
    experts = sum(p.numel() for view in all_moe_views(model).values() for p in view.experts.parameters())
    assert found["expert"] == experts and found["attention"] > 0 and found["embeddings"] >= tiny.VOCAB * tiny.HIDDEN


def packed(*shape: int, dtype: torch.dtype = torch.uint8) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)


def test_gpt_oss_has_19_billion_expert_parameters_however_they_are_stored():
    config = AutoConfig.from_pretrained(zoo.config_path("openai/gpt-oss-20b").parent)
    model = hf.skeleton(config, torch.bfloat16)
    plain = estimate_model_size(model)
    assert plain["expert"] / 1e9 == pytest.approx(19.1, abs=0.05) and plain["total"] / 1e9 == pytest.approx(
        20.9, abs=0.05
    )
    for view in moe_views(model).values():
        for name, rows in (("gate_up_proj", 5760), ("down_proj", 2880)):
            del view.experts._parameters[name]
            view.experts.register_parameter(f"{name}_blocks", packed(32, rows, 90, 16))
            view.experts.register_parameter(f"{name}_scales", packed(32, rows, 90))
    assert estimate_model_size(model) == plain
    assert sum(p.numel() for p in model.parameters()) < 0.6 * plain["total"]


def test_codes_of_four_bits_are_parameters_and_their_scales_are_none(compressors):
    model = reader("mixtral")
    before = estimate_model_size(model)["attention"]
    attention = model.model.layers[0].self_attn
    linear = attention.q_proj
    rows, columns = linear.weight.shape
    stored = nn.Module()
    stored.register_buffer("qweight", torch.zeros(columns // 8, rows, dtype=torch.int32))
    stored.register_buffer("qzeros", torch.zeros(1, rows // 8, dtype=torch.int32))
    stored.register_parameter("scales", nn.Parameter(torch.ones(1, rows)))
    attention.q_proj = stored
    assert estimate_model_size(model)["attention"] == before
    stored = nn.Module()
    stored.register_parameter("weight", packed(rows, columns, dtype=torch.float8_e4m3fn))
    stored.register_parameter("weight_scale_inv", nn.Parameter(torch.ones(1, 1)))
    attention.q_proj = stored
    assert estimate_model_size(model)["attention"] == before


@pytest.mark.parametrize("family", slow_after(1, FAMILIES))
def test_what_is_predicted_is_written(family, reader_folder, options, tmp_path):
    compressor = ExpertCompressor(reader_folder(family))
    layers = MoEHooks(compressor.model).moe_layer_indices
    compressor.analysis(layers[0], PROMPTS)
    plans = [compressor.plan_compression(layers[0], 6), compressor.plan_compression(layers[-1], 4)]
    found = estimate_compressed_size(compressor.model, plans)
    path = compressor.save_plan(plans, tmp_path / "plan")
    made = moe_compress.apply(path, **{**options, "eval": False, "out": tmp_path / "out"}).folder
    numbers = sum(t.numel() for file in made.glob("*.safetensors") for t in load_file(file).values())
    assert numbers == pytest.approx(found["compressed_params"], rel=1e-3)
    before = open_checkpoint(reader_folder(family)).bytes
    assert open_checkpoint(made).bytes == pytest.approx(before * (1 - found["reduction_ratio"]), rel=1e-3)
    assert found["original_params"] - found["params_removed"] == found["compressed_params"]
    assert found["expert_params_original"] - found["expert_params_compressed"] == sum(p.params_removed for p in plans)
    ids = tiny.token_ids()
    loaded, live = moe_compress.load(made), compressor.compressed_model(plans)
    torch.testing.assert_close(loaded(ids).logits, live(ids).logits, rtol=1e-4, atol=1e-4)
    for plan in plans:
        compressor.apply_compression(plan, plan.layer_idx, inplace=True)
    assert estimate_model_size(compressor.model)["total"] == found["compressed_params"]


def test_the_summary_is_printed(compressors, capsys):
    compressor = compressors("mixtral")
    plan = compressor.plan_compression(LAYER, 4)
    print_compression_summary(compressor.model, [plan], "my model")
    said = capsys.readouterr().out
    found = estimate_compressed_size(compressor.model, [plan])
    for words in ("my model", f"{found['original_params']:,}", f"{found['compressed_params']:,}", "8 -> 4", "-50.0%"):
        assert words in said
    with pytest.raises(ValueError, match="a layer of its own"):
        estimate_compressed_size(compressor.model, [plan, plan])
    with pytest.raises(ValueError, match="before the plan is applied"):
        estimate_compressed_size(compressor.compressed_model([plan]), [plan])
