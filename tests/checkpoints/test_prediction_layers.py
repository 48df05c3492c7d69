"""Multi-token-prediction layers: copied as long as config.json stays true of them, left out otherwise, never run."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.utils.match import match_name
from safetensors.torch import load_file, save_file
from torch import Tensor

import moe_compress
from moe_compress.checkpoints.reader import open_checkpoint
from moe_compress.edits.edits import DropLayer
from moe_compress.engine.forward import forward_layers
from moe_compress.engine.layers import StreamedLayers
from moe_compress.evaluation.verification.verify import _wrong_tensors, verify
from moe_compress.models import hf
from moe_compress.models.prediction_layers import prediction_layers, without_prediction_layers
from support import readers, tiny
from support.editing import IDS, logits_of, original, write
from support.identity import rewritten
from support.slow import each_once, slow_after, slow_unless
from support.tiny import windows_of

# A family, how its checkpoints name such a layer, and what stands outside of it.
KINDS = [
    ("qwen3_next", "mtp.layers.0.", "mtp.fc.weight"),
    ("glm4_moe", "model.layers.3.", "model.layers.3.eh_proj.weight"),
]
COUNT = "num_nextn_predict_layers"
FORMATS = ("compressed-tensors", "gptq")


def prediction_tensors(layer: str, joint: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """A layer like the last one of a tiny model, and the map that joins its two inputs."""
    width, inner = tiny.HIDDEN, tiny.INNER
    found = {joint: torch.randn(width, 2 * width), f"{layer}input_layernorm.weight": torch.ones(width)}
    found[f"{layer}mlp.gate.weight"] = torch.randn(tiny.EXPERTS, width)
    for e in range(tiny.EXPERTS):
        for part in ("gate", "up", "down"):
            shape = (width, inner) if part == "down" else (inner, width)
            found[f"{layer}mlp.experts.{e}.{part}_proj.weight"] = torch.randn(shape)
    return {name: tensor.to(dtype) for name, tensor in found.items()}


@pytest.fixture
def predicting(reader_folder: Callable[[str], Path], tmp_path: Path) -> Callable[..., tuple[Path, dict[str, Tensor]]]:
    """(family, layer, joint) -> a tiny checkpoint with such a layer, and its tensors."""

    def made(family: str, layer: str, joint: str) -> tuple[Path, dict[str, Tensor]]:
        folder = Path(shutil.copytree(reader_folder(family), tmp_path / family))
        file = folder / "model.safetensors"
        added = prediction_tensors(layer, joint, torch.float32)
        save_file({**load_file(file), **added}, file, metadata={"format": "pt"})
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, COUNT: 1}))
        return folder, added

    return made


def stored(folder: Path) -> dict[str, Tensor]:
    return {
        key: tensor for file in sorted(folder.glob("model-*.safetensors")) for key, tensor in load_file(file).items()
    }


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("family, layer, joint", KINDS)
def test_they_are_no_layers_of_the_model(family, layer, joint, predicting):
    folder, added = predicting(family, layer, joint)
    source = open_checkpoint(folder)
    assert set(source.prediction_keys) == set(added)
    assert not set(added) & {key for index in (None, *range(source.num_layers)) for key in source.keys(index)}
    layers = StreamedLayers(source, tiny.CPU, torch.float32)
    _, hidden = forward_layers(layers, windows_of(IDS))
    expected = logits_of(original(source))
    assert torch.equal(hf.head(layers.model, hidden.flatten(0, 1)).view_as(expected), expected)
    assert logits_of(moe_compress.load(folder)).equal(expected)


@pytest.mark.parametrize("family, layer, joint", KINDS)
def test_they_are_copied_where_nothing_is_edited(family, layer, joint, predicting, tmp_path):
    folder, added = predicting(family, layer, joint)
    out = write(open_checkpoint(folder), [], tmp_path / "copied")
    before, after = load_file(folder / "model.safetensors"), stored(out.folder)
    assert before.keys() == after.keys()
    assert all(after[key].equal(before[key]) for key in added)
    assert config_of(out.folder)[COUNT] == 1
    assert rewritten(out, tmp_path / "again").prediction_keys == out.prediction_keys


@pytest.mark.parametrize("family, layer, joint", KINDS)
@pytest.mark.parametrize("recipe", slow_after(1, ["expert_drop score=frequency keep=6", "layer_drop drop=1", "skip"]))
def test_edits_leave_them_out(recipe, family, layer, joint, predicting, options, reader_folder, tmp_path):
    folder, _ = predicting(family, layer, joint)
    given = {**options, "eval": False}
    out = moe_compress.compress(recipe, model=folder, out=tmp_path / "out", **given).folder
    alone = moe_compress.compress(recipe, model=reader_folder(family), out=tmp_path / "alone", **given).folder
    assert not open_checkpoint(out).prediction_keys and config_of(out)[COUNT] == 0
    expected = stored(alone)
    assert stored(out).keys() == expected.keys()
    assert all(tensor.equal(expected[key]) for key, tensor in stored(out).items())


@pytest.mark.parametrize("family, layer, joint", KINDS)
def test_weights_beside_them_may_change(family, layer, joint, predicting, options, tmp_path):
    folder, added = predicting(family, layer, joint)
    given = {**options, "eval": False, "model": folder}
    pruned = moe_compress.compress("prune method=magnitude", out=tmp_path / "pruned", **given).folder
    assert all(stored(pruned)[key].equal(tensor) for key, tensor in added.items())
    assert config_of(pruned)[COUNT] == 1


@pytest.mark.slow
def test_stock_transformers_passes_over_them(predicting):
    assert verify(predicting(*KINDS[1])[0]).passed


def test_tensors_of_theirs_that_stock_does_not_load_are_no_problem():
    names = ["model.layers.3.eh_proj.weight", "mtp.fc.weight", "model.layers.2.odd.weight"]
    assert _wrong_tensors({"unexpected_keys": names[:2]}, 3) == []
    assert _wrong_tensors({"unexpected_keys": names}, 3) == [f"unexpected keys: {names[2]}"]
    assert _wrong_tensors({"missing_keys": names[:1]}, 3) == [f"missing keys: {names[0]}"]


@pytest.mark.parametrize(("format", "kind"), slow_unless(each_once(FORMATS, KINDS), FORMATS, KINDS))
def test_a_packed_format_excepts_them(format, kind, predicting, options, tmp_path):
    folder, added = predicting(*kind)
    sentence = f"quantize method=rtn bits=4 group_size=8 format={format}"
    out = moe_compress.compress(sentence, model=folder, out=tmp_path / "out", **{**options, "eval": False}).folder
    assert all(stored(out)[key].equal(tensor) for key, tensor in added.items())
    said = config_of(out)["quantization_config"]
    modules = {key.removesuffix(".weight") for key in added}
    ours = "model.layers.1.mlp.experts.0.down_proj"
    if format == "gptq":
        spared = [pattern.removeprefix("-:") for pattern in said["dynamic"]]
        assert all(any(re.match(pattern, name) for pattern in spared) for name in modules)
        assert not any(re.match(pattern, ours) for pattern in spared)
    else:
        assert all(any(match_name(name, target) for target in said["ignore"]) for name in modules)
        assert not any(match_name(ours, target) for target in said["ignore"])
    assert open_checkpoint(out).prediction_keys
    assert logits_of(moe_compress.load(out)).isfinite().all()


def test_an_edited_packed_model_has_none(predicting, options, tmp_path):
    folder, _ = predicting(*KINDS[0])
    sentence = "quantize method=rtn bits=4 group_size=8 format=packed"
    out = moe_compress.compress(sentence, model=folder, out=tmp_path / "out", **{**options, "eval": False}).folder
    assert not open_checkpoint(out).prediction_keys and config_of(out)[COUNT] == 0


def test_a_config_that_counts_none_says_so_once_they_are_gone(predicting, tmp_path):
    folder, _ = predicting(*KINDS[0])
    values = config_of(folder)
    del values[COUNT]
    (folder / "config.json").write_text(json.dumps(values))
    out = write(open_checkpoint(folder), [DropLayer(1)], tmp_path / "out")
    assert out.values[COUNT] == 0


def test_a_plan_says_what_becomes_of_them(predicting):
    for kind, which in zip(KINDS, ("(1 by its config)", "(1 by its config)"), strict=True):
        folder, _ = predicting(*kind)
        fates = {"expert_drop keep=6": "left out", "prune": "copied", "quantize bits=4 format=packed": "left out"}
        for recipe, fate in {**fates, "quantize bits=4 group_size=8 format=gptq": "copied"}.items():
            note = moe_compress.plan(recipe, model=folder).notes[-1]
            assert which in note and fate in note, recipe


def test_what_configs_call_their_number():
    nested = {"text_config": {"mtp_num_hidden_layers": 2}, "hidden_size": 8, "use_mtp": True, "num_mtp_modules": 3}
    assert prediction_layers(nested) == 3 and prediction_layers({"text_config": nested["text_config"]}) == 2
    gone = without_prediction_layers(nested)
    assert prediction_layers(gone) == 0 and gone["use_mtp"] is False and gone["hidden_size"] == 8
    assert readers.VOCAB not in gone.values()
    assert prediction_layers({"hidden_size": 8}) == 0


@pytest.mark.parametrize(
    "key, number",
    [
        ("mtp.layers.0.mlp.gate.weight", None),
        ("model.mtp.layers.0.eh_proj.weight", None),
        ("model.mtp_layers.1.norm.weight", None),
        ("mtp_dspark.layers.2.norm.weight", None),
        ("model.layers.4.mlp.gate.weight", 4),
        ("model.language_model.layers.4.mlp.gate.weight", 4),
        ("lm_head.weight", None),
    ],
)
def test_which_names_are_those_of_a_decoder_layer(key, number):
    assert hf.layer_of(key) == number
    assert hf.is_prediction_key(key, 4) == ("mtp" in key or number == 4)
