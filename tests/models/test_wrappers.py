"""Multimodal wrappers: the language model inside is calibrated and changed, all else passes as it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, AutoTokenizer

import moe_compress
from moe_compress import zoo
from moe_compress.checkpoints.reader import Checkpoint, open_checkpoint
from moe_compress.engine.forward import forward_layers
from moe_compress.engine.layers import StreamedLayers
from moe_compress.models import hf
from moe_compress.models.families import family_of
from moe_compress.models.moe import moe_views
from moe_compress.utils.files import read_json
from support import identity, tiny, wrappers
from support.slow import each_once, slow_after, slow_unless

TOKENIZER = zoo.path("tiny-mixtral")
VOCAB = 2056
# Published names of the language model's layers and of a tensor of another tower, by model_type.
NAMES = {
    "qwen3_5_moe": ("model.language_model.layers.", "model.visual."),
    "qwen3_vl_moe": ("model.language_model.layers.", "model.visual."),
    "glm4v_moe": ("model.language_model.layers.", "model.visual."),
    "llama4": ("language_model.model.layers.", "vision_model."),
    "gemma4": ("model.language_model.layers.", "model.vision_tower."),
    "kimi_k25": ("language_model.model.layers.", "vision_tower."),
    "minimax_m3_vl": ("language_model.model.layers.", "vision_tower."),
    "step3p7": ("model.layers.", "vision_model."),
    "qwen3_omni_moe": ("thinker.model.layers.", "talker."),
}


def stock(folder: Path, kind: Any = AutoModelForMultimodalLM) -> Tensor:
    """Logits of a model that stock transformers loads without a word."""
    model, info = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        found: Tensor = getattr(model.eval(), "thinker", model)(tiny.token_ids()).logits
    return found


def streamed(checkpoint: Checkpoint) -> Tensor:
    """Logits of layers that are read one by one."""
    layers, windows = StreamedLayers(checkpoint, tiny.CPU, torch.float32), tiny.windows_of(tiny.token_ids())
    _, hidden_NSD = forward_layers(layers, windows)
    return hf.head(layers.model, hidden_NSD.flatten(0, 1)).unflatten(0, hidden_NSD.shape[:2])


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A wrapper as it is published, made once."""
    made: dict[str, Path] = {}

    def folder(model_type: str) -> Path:
        if model_type not in made:
            made[model_type] = wrappers.save(model_type, tmp_path_factory.mktemp(model_type), vocab_size=VOCAB)
            AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(made[model_type])
            (made[model_type] / "preprocessor_config.json").write_text('{"size": 4}')
        return made[model_type]

    return folder


@pytest.fixture
def compressed(tmp_path: Path) -> Callable[[str, Path], Checkpoint]:
    """What a recipe makes of a folder."""

    def made(recipe: str, folder: Path) -> Checkpoint:
        options = {"data": "zoo", "samples": 4, "length": 16, "eval": False, "results": tmp_path / "runs"}
        return open_checkpoint(moe_compress.compress(recipe, model=folder, out=tmp_path / "out", **options).folder)

    return made


@pytest.mark.parametrize("model_type", wrappers.WRAPPERS)
def test_layers_one_by_one_are_stock_transformers(model_type, published):
    source = open_checkpoint(published(model_type))
    layers, tower = NAMES[model_type]
    assert all(key.startswith(layers) for index in range(tiny.LAYERS) for key in source.keys(index))
    assert any(key.startswith(tower) for key in source.keys(None)) and source.num_layers == tiny.LAYERS
    assert torch.equal(streamed(source), stock(source.folder))


@pytest.mark.parametrize("model_type", slow_unless(lambda kind: kind in ("kimi_k25", "step3p7"), wrappers.WRAPPERS))
def test_rewriting_changes_no_name_and_no_byte(model_type, published, tmp_path):
    source = open_checkpoint(published(model_type))
    made = identity.rewritten(source, tmp_path / "out")
    assert made.tensors.keys() == source.tensors.keys()
    with source.read(source.tensors) as before, made.read(made.tensors) as after:
        assert all(torch.equal(before[key][...], after[key][...]) for key in before)


RECIPES = ("expert_drop score=reap keep=6", "expert_merge keep=6", "prune", "quantize bits=4 group_size=8 format=dense")


@pytest.mark.parametrize(
    ("model_type", "recipe"),
    slow_unless(
        lambda kind, recipe: (
            (kind, recipe) in zip(("gemma4", "step3p7", "llama4", "qwen3_vl_moe"), RECIPES, strict=True)
        ),
        wrappers.WRAPPERS,
        RECIPES,
    ),
)
def test_what_a_recipe_makes_loads_as_it_came(model_type, recipe, published, compressed):
    folder = published(model_type)
    before, after = open_checkpoint(folder), compressed(recipe, folder)
    assert torch.equal(streamed(after), stock(after.folder))
    assert after.values["architectures"] == before.values["architectures"]
    for key in ("vision_config", "talker_config", "code2wav_config"):
        assert after.values.get(key) == before.values.get(key)
    assert "AutoModelForMultimodalLM.from_pretrained" in (after.folder / "README.md").read_text()
    assert (after.folder / "preprocessor_config.json").read_text() == '{"size": 4}'
    assert after.keys(None) == before.keys(None)
    with before.read(before.keys(None)) as was, after.read(after.keys(None)) as now:
        assert all(torch.equal(was[key][...], now[key][...]) for key in was)
    experts = 6 if "keep=6" in recipe else 8
    views = moe_views(hf.skeleton(after.config, torch.float32))
    assert {view.num_experts for view in views.values()} == {experts}


@pytest.mark.parametrize("model_type", slow_after(1, ["qwen3_5_moe", "glm4v_moe", "kimi_k25"]))
def test_packed_weights_of_a_wrapper(model_type, published, compressed):
    made = compressed(
        "quantize bits=4 group_size=8 where=experts,attention format=compressed-tensors", published(model_type)
    )
    tower = NAMES[model_type][1].strip(".").rpartition(".")[2]
    assert rf"re:.*\b{tower}\..*" in made.values["quantization_config"]["ignore"]
    assert made.packed and not any(NAMES[model_type][1] in key for key in made.packed)
    assert (streamed(made) - stock(made.folder)).abs().max() < 1e-5
    assert (moe_compress.load(made.folder)(tiny.token_ids()).logits - stock(made.folder)).abs().max() < 1e-4


def test_what_its_language_model_says_of_packed_weights_is_read(published, compressed, tmp_path):
    """Kimi-K2.5 is published with its quantization_config inside text_config."""
    made = compressed(
        "quantize bits=4 group_size=8 where=experts,attention format=compressed-tensors", published("kimi_k25")
    )
    folder = Path(shutil.copytree(made.folder, tmp_path / "inside"))
    values = read_json(folder / "config.json")
    values["text_config"]["quantization_config"] = values.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(values))
    sizes = [moe_compress.plan("expert_drop keep=6", model=each).before for each in (made.folder, folder)]
    assert sizes[0] == sizes[1]
    (folder / "moe_compress.json").unlink()
    words = {"results": tmp_path / "runs", "out": tmp_path / "cut", "eval": False}
    cut = open_checkpoint(moe_compress.compress("expert_drop keep=6 score=weight_norm", model=folder, **words).folder)
    assert cut.packed and "quantization_config" not in cut.values["text_config"]
    assert (streamed(cut) - stock(cut.folder)).abs().max() < 1e-5


def test_experts_of_a_stack_that_are_packed_one_by_one_are_refused(published, tmp_path):
    """As Llama-4 and Gemma-4 are published in FP8 and NVFP4: names that no class of transformers has."""
    folder = Path(shutil.copytree(published("llama4"), tmp_path / "packed"))
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}
    packed = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}
    values = read_json(folder / "config.json") | {"quantization_config": packed}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="packs experts one by one, but llama4 stores them as one stack"):
        moe_compress.plan("expert_drop keep=6", model=folder)


def test_a_wrapper_of_stacks_is_rounded_where_no_format_holds_its_codes(published, tmp_path, caplog):
    words = {"data": "zoo", "samples": 4, "length": 16, "results": tmp_path, "eval": False}
    made = moe_compress.compress("quantize bits=4 method=rtn group_size=8", model=published("gemma4"), **words)
    assert "no format holds the codes of gemma4" in caplog.text
    assert "quantization_config" not in open_checkpoint(made.folder).values
    with pytest.raises(ValueError, match=r"needs an edited architecture, .*: use format=dense\."):
        moe_compress.compress("quantize bits=4 format=packed", model=published("gemma4"), **words)


def test_packed_experts_beside_plain_ones_of_another_model_are_refused(published, compressed):
    """Of Qwen3-Omni, both the model that thinks and the one that talks have experts."""
    with pytest.raises(ValueError, match=r"leaves the experts beside the language model plain, .*: use format=dense\."):
        compressed("quantize bits=4 group_size=8 format=compressed-tensors", published("qwen3_omni_moe"))


def test_a_wrapper_is_compared_with_its_original(published, tmp_path):
    text = {"data": "zoo", "samples": 4, "length": 16, "eval_data": "zoo", "eval_samples": 4, "eval_length": 16}
    folder = published("qwen3_vl_moe")
    made = moe_compress.compress("top_k k=1", model=folder, out=tmp_path / "out", results=tmp_path / "runs", **text)
    assert made.record.metrics["perplexity"].value > 1 and made.record.metrics["kl"].value > 0


def test_layers_that_a_wrapper_cannot_say_are_refused_before_anything_is_read(published, compressed):
    with pytest.raises(ValueError, match="language model inside qwen3_vl_moe would have layers that differ"):
        compressed("expert_drop budget=global keep=6", published("qwen3_vl_moe"))


# --- the same types without towers --------------------------------------------------------------------------


def text_only(folder: Path, out: Path, config: Any) -> Path:
    """A published wrapper without its towers, under another config."""
    shutil.copytree(folder, out)
    wrappers.only(out, lambda name: not any(word in name for word in wrappers.TOWERS))
    config.save_pretrained(out)
    return out


TEXT_RECIPES = ("expert_drop keep=6", "quantize bits=4 group_size=8")


@pytest.mark.parametrize(
    ("recipe", "wrapped"), slow_unless(each_once(TEXT_RECIPES[::-1], [False, True]), TEXT_RECIPES, [False, True])
)
def test_text_only_under_published_names(recipe, wrapped, published, compressed, tmp_path):
    folder = published("qwen3_5_moe")
    config = open_checkpoint(folder).config
    text = text_only(folder, tmp_path / "text", config if wrapped else config.get_text_config())
    source = open_checkpoint(text)
    assert torch.equal(streamed(source), stock(text, AutoModelForCausalLM))
    made = compressed(recipe, text)
    assert all(key.startswith(("model.language_model.", "lm_head.")) for key in made.tensors)
    assert made.values["model_type"] == config.model_type + ("" if wrapped else "_text")
    assert (streamed(made) - stock(made.folder, AutoModelForCausalLM)).abs().max() < 1e-5
    assert type(moe_compress.load(made.folder)).__name__ == "Qwen3_5MoeForCausalLM"


def test_experts_that_are_published_in_one_tensor_are_packed_one_by_one(published, compressed, tmp_path):
    folder = tmp_path / "fused"
    shutil.copytree(published("qwen3_5_moe"), folder)
    wrappers.fuse_experts(folder)
    assert torch.equal(streamed(open_checkpoint(folder)), stock(folder))
    made = compressed("quantize bits=4 group_size=8 format=compressed-tensors", folder)
    assert len(made.packed) == 3 * 8 * tiny.LAYERS
    assert not any(key.endswith("gate_up_proj") for key in made.tensors)
    assert (streamed(made) - stock(folder)).abs().max() > 1e-3
    assert (streamed(made) - stock(made.folder)).abs().max() < 1e-5


# --- what is said of them -----------------------------------------------------------------------------------


def test_towers_are_counted_but_touched_by_no_token(published):
    folder = published("qwen3_vl_moe")
    found = moe_compress.plan("expert_drop keep=6", model=folder)
    tensors = load_file(folder / "model.safetensors")
    assert found.before.parameters == sum(tensor.numel() for tensor in tensors.values())
    layer, embedded = "model.language_model.layers.0.", VOCAB * tiny.HIDDEN
    experts = sum(tensors[f"{layer}mlp.experts.{name}_proj"].numel() for name in ("gate_up", "down"))
    towers = sum(tensor.numel() for name, tensor in tensors.items() if ".visual." in name)
    rest = found.before.parameters - towers - tiny.LAYERS * experts - embedded
    assert found.before.touched == rest + tiny.LAYERS * experts * tiny.TOP_K // 8 + tiny.HIDDEN


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "name"), [("qwen3_vl_moe", "Qwen3VLMoe"), ("qwen3_omni_moe", "Qwen3OmniMoe")])
def test_verify_knows_the_class(model_type, name, published, tmp_path):
    folder = published(model_type)
    found = moe_compress.verify(folder, results=tmp_path)
    assert found.passed and found.error == 0.0 and found.stock_class == f"{name}ForConditionalGeneration"
    assert type(moe_compress.load(folder)).__name__ == found.stock_class


def test_gemma_routes_by_probabilities(published, compressed):
    """Its layers hold router and experts themselves, beside a dense MLP, and its router gives no logits."""
    source = open_checkpoint(published("gemma4"))
    view = moe_views(hf.skeleton(source.config, torch.float32))[0]
    assert view.in_layer and view.names == {"block": "", "experts": "experts", "router": "router"}
    assert family_of(source.config).top_k_key == "top_k_experts"
    for recipe, why in (("layer_drop drop=1", "in no block of their own"), ("top_k k=1", "always uses 2 experts")):
        with pytest.raises(ValueError, match=why):
            compressed(recipe, source.folder)


@pytest.mark.parametrize("model_type", ["step3p5", "mistral4", "qwen3_vl_moe_text"])
def test_a_type_without_a_class_is_one_sentence(model_type, tmp_path):
    config = wrappers.config_of("qwen3_vl_moe").get_text_config().to_dict()
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": model_type, "per_layer_config": None}))
    with pytest.raises(ValueError, match=f"{model_type} is no causal language model of transformers") as error:
        moe_compress.plan("expert_drop ratio=0.25", model=tmp_path)
    assert len(str(error.value)) < 200 and "\n" not in str(error.value)
