"""DeepSeek-V4 as it is published: FP8 beside FP4 experts, read as stock transformers reads it, and cut."""

from __future__ import annotations

import functools
import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, FineGrainedFP8Config
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

import moe_compress
from moe_compress.checkpoints.formats.fp8 import Fp4BesideScale, Fp8BesideScale
from moe_compress.checkpoints.formats.stored_weight import StoredWeight
from moe_compress.checkpoints.reader import open_checkpoint
from moe_compress.checkpoints.safetensors_file import STORED_DTYPES
from moe_compress.models.matrices import stored_matrices
from support import published
from support.checkpoints import streamed
from support.editing import logits_of
from support.pruned import same_bits, stored
from support.slow import slow_after

FAMILY, FORMATS = "deepseek_v4", tuple(published.ALONE)
pytestmark = pytest.mark.filterwarnings("ignore:.*made dense")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """format -> a tiny model in it."""
    place = tmp_path_factory.mktemp("v4")

    @functools.cache
    def make(format):
        published.publish(FAMILY, format, place / format)
        return place / format

    return make


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("format", FORMATS)
def test_it_is_what_stock_transformers_reads(format, folder):
    said = FineGrainedFP8Config(dequantize=True)
    stock = AutoModelForCausalLM.from_pretrained(folder(format), quantization_config=said).float().eval()
    ours = streamed(open_checkpoint(folder(format)))
    expected = dict(stock.named_parameters())
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    assert torch.equal(logits_of(ours), logits_of(stock))
    assert torch.equal(logits_of(moe_compress.load(folder(format), torch.float32)), logits_of(stock))


def packed_by_stock(folder):
    """What stock transformers computes in few bits where there is a GPU: modules, experts as one, and their dtypes."""
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    quantizer = FineGrainedFP8HfQuantizer(FineGrainedFP8Config(**config.quantization_config))
    quantizer._process_model_before_weight_loading(model)
    held = {name: module for name, module in model.named_modules() if type(module).__name__.startswith("FP8")}
    return {name: getattr(each, "down_proj", getattr(each, "weight", None)).dtype for name, each in held.items()}


def packed_in_files(folder):
    """The same as the files have it."""
    checkpoint = open_checkpoint(folder)
    model, found = checkpoint.skeleton(torch.float32), {}
    for index in range(checkpoint.num_layers):
        for key, (name, _) in stored_matrices(model, index).items():
            if isinstance(entry := checkpoint.tensors[key], StoredWeight):
                module = name.rpartition(".")[0] if ".experts." in name else name
                found[f"model.layers.{index}.{module}"] = STORED_DTYPES[entry.parts()[".weight"].dtype]
    return found


FP4, FP8 = torch.int8, torch.float8_e4m3fn
CHANGES = [
    (None, {FP4, FP8}),
    ("prune method=magnitude", {FP8}),
    ("prune where=attention method=magnitude", {FP4, FP8}),
    ("prune where=shared method=magnitude", {FP4, FP8}),
    ("quantize where=attention,shared method=rtn group_size=16 format=dense", {FP4}),
]


@pytest.mark.parametrize(("sentence", "few"), CHANGES)
@pytest.mark.parametrize("format", slow_after(1, FORMATS))
def test_stock_is_told_what_is_packed(format, sentence, few, folder, options):
    found = folder(format)
    if sentence is not None:
        found = moe_compress.compress(sentence, model=str(found), eval=False, **options).folder
    packed = packed_in_files(found)
    assert packed_by_stock(found) == packed and {*packed.values()} == few


def test_experts_are_spoken_of_for_as_long_as_any_are_packed(folder, options, tmp_path):
    """Layers that predict further tokens are stored as they were, which a config that counts them has to say."""
    for count, left in ((1, True), (0, False)):
        copy = shutil.copytree(folder("deepseek fp4"), tmp_path / str(count))
        (copy / "config.json").write_text(json.dumps({**config_of(copy), "num_nextn_predict_layers": count}))
        made = moe_compress.compress("prune method=magnitude", model=str(copy), eval=False, **options).folder
        assert ("expert_dtype" in config_of(made)) == left


def with_prediction_layer(folder):
    """The same with a layer that predicts further tokens: like the last one, and a map that joins its inputs."""
    tensors = stored(folder)
    found = {name.replace("layers.2.", "mtp.0.", 1): t.clone() for name, t in tensors.items() if "layers.2." in name}
    joint, _ = published.fp8_powers(torch.randn(32, 32), "scale")
    found |= {f"mtp.0.e_proj.{end}": part for end, part in joint.items()} | {"mtp.0.enorm.weight": torch.ones(32)}
    save_file({**tensors, **found}, folder / "model.safetensors", {"format": "pt"})
    return found


@pytest.mark.parametrize(
    ("sentence", "stays"),
    slow_after(
        2,
        [
            ("prune method=magnitude", True),
            ("expert_drop score=weight_norm keep=6", False),
            ("prune method=magnitude where=all", False),
            ("quantize method=rtn group_size=16 format=gptq where=all", False),
            ("quantize method=rtn group_size=16 format=packed where=all", False),
        ],
    ),
)
def test_layers_that_predict_stay_as_they_are_or_are_left_out(sentence, stays, folder, options, tmp_path):
    model = shutil.copytree(folder("deepseek fp4"), tmp_path / "model")
    before = with_prediction_layer(model)
    apart = {name for name in open_checkpoint(model).prediction_keys if name.endswith(".weight")}
    assert apart == {name for name in before if name.endswith(".weight")}
    assert torch.equal(logits_of(streamed(open_checkpoint(model))), logits_of(moe_compress.load(model, torch.float32)))
    out = moe_compress.compress(sentence, model=str(model), eval=False, **options).folder
    after = {name: tensor for name, tensor in stored(out).items() if name.startswith("mtp.")}
    assert after.keys() == (before.keys() if stays else set())
    assert all(same_bits(before[name], tensor) for name, tensor in after.items())
    values, kept = config_of(out), "where=all" not in sentence
    assert bool(values["num_nextn_predict_layers"]) == stays
    assert values.get("quantization_config", {}).get("quant_method") == (
        "fp8" if kept else "gptq" if "gptq" in sentence else None
    )
    assert ("expert_dtype" in values) == kept
    assert logits_of(moe_compress.load(out, torch.float32)).isfinite().all()


def test_layers_that_look_experts_up_stay_whole_under_one_that_is_cut(folder, options):
    before, sentence = stored(folder("deepseek fp4")), "expert_drop score=weight_norm keep=6"
    made = moe_compress.compress(sentence, model=str(folder("deepseek fp4")), eval=False, **options).folder
    after, values = stored(made), config_of(made)
    first = {name for name in before if name.startswith("layers.0.")}
    assert first == {name for name in after if name.startswith("layers.0.")}
    assert all(same_bits(before[name], after[name]) for name in first)
    assert (
        values["expert_dtype"] == "fp4"
        and values["quantization_config"] == config_of(folder("deepseek fp4"))["quantization_config"]
    )
    held = [sum(".w1.weight" in name and f"layers.{i}.ffn.experts." in name for name in after) for i in range(3)]
    assert held == [8, 6, 6]
    assert not open_checkpoint(made).loads_as_stock and logits_of(moe_compress.load(made)).isfinite().all()


def test_blocks_at_the_edges_are_cut_off_and_tensors_called_scale_are_no_others():
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(24, 40, generator=generator)
    parts, number_OI = published.fp8_powers(weight_OI, "scale")
    assert parts["scale"].shape == (2, 3)
    assert torch.equal(Fp8BesideScale(parts["scale"], parts["weight"], block=(16, 16))[...], number_OI)
    parts, number_OI = published.fp4_experts(torch.randn(5, 64, generator=generator), "scale")
    assert torch.equal(Fp4BesideScale(parts["scale"], parts["weight"])[...], number_OI)
    for layout in (Fp8BesideScale, Fp4BesideScale):
        assert not layout.reads({".scale": "F32"}) and not layout.reads({".scale": "F32", ".weight": "BF16"})
