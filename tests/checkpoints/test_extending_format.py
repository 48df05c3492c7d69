"""docs/extending/format.md: its example is a storage format like any other, and its tables name every field."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import moe_compress
from moe_compress.checkpoints import formats
from moe_compress.checkpoints.formats import registry
from moe_compress.checkpoints.reader import Checkpoint, open_checkpoint
from moe_compress.engine.layers import StreamedLayers
from moe_compress.evaluation.verification.compatibility import compatibility
from moe_compress.models.modeling.packed_linear import PackedMatrix
from moe_compress.utils import declarations
from support.editing import logits_of

PAGE = Path(__file__).parents[2] / "docs" / "extending" / "format.md"
TEXT = PAGE.read_text(encoding="utf-8")
WORDS = "quantize method=rtn bits=8 group_size=0 where=experts,attention"
Q8 = f"{WORDS} format=rows-q8"


@pytest.fixture(scope="module", autouse=True)
def _example(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The page's file, as if it lay in the folder of formats; it is taken out again."""
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    place = tmp_path_factory.mktemp("formats")
    (place / "rows_q8.py").write_text(block, encoding="utf-8")
    formats.__path__.append(str(place))
    importlib.invalidate_caches()
    registry._import_all.cache_clear()
    declarations.declarations.cache_clear()
    yield
    formats.__path__.remove(str(place))
    registry._FORMATS.pop("rows-q8", None)
    sys.modules.pop(f"{formats.__name__}.rows_q8", None)
    declarations.declarations.cache_clear()


@pytest.fixture(scope="module")
def folder(made, _example: None) -> Path:
    return made("mixtral", Q8)


def weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Every parameter as the streamed engine reads it."""
    layers, found = StreamedLayers(checkpoint, torch.device("cpu"), torch.float32), {}
    for index in range(checkpoint.num_layers):
        with layers.layer(index) as layer:
            found |= {f"{index}.{name}": tensor.clone() for name, tensor in layer.state_dict().items()}
    return found


def test_its_numbers_are_read_back(folder, made):
    ours, dense = open_checkpoint(folder), open_checkpoint(made("mixtral", f"{WORDS} format=dense"))
    assert len(ours.packed) == len([name for name in dense.tensors if re.search(r"experts\.\d|self_attn", name)])
    with ours.read(ours.packed) as found, dense.read(ours.packed) as expected:
        assert all(torch.equal(found[name][...], expected[name][...]) for name in ours.packed)
    streamed, plain = weights(ours), weights(dense)
    assert streamed.keys() == plain.keys() and all(torch.equal(streamed[name], plain[name]) for name in plain)
    assert ours.bytes < 0.5 * dense.bytes


def test_it_lies_as_the_page_says(folder):
    stored = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    codes = {name: tensor for name, tensor in stored.items() if name.endswith(".weight_q8")}
    assert codes and all(tensor.dtype == torch.int8 for tensor in codes.values())
    assert all(stored[name.replace("weight_q8", "scale_q8")].shape == (len(codes[name]), 1) for name in codes)
    values = json.loads((folder / "config.json").read_text())
    assert values["quantization_config"]["quant_method"] == "rows-q8" and "moe_compress" not in values


def test_it_stays_packed_in_memory(folder, made):
    model = moe_compress.load(folder)
    assert any(isinstance(module, PackedMatrix) for module in model.modules())
    torch.testing.assert_close(
        logits_of(model), logits_of(moe_compress.load(made("mixtral", f"{WORDS} format=dense"))), rtol=1e-4, atol=1e-5
    )


def test_trimming_moves_its_bytes(folder, lab):
    result = moe_compress.compress("expert_drop keep=4 score=random", **{**lab("mixtral"), "model": str(folder)})
    before, after = open_checkpoint(folder), open_checkpoint(result.folder)
    assert 0 < len(after.packed) < len(before.packed)
    with before.read(before.packed) as old, after.read(after.packed) as new:
        known = {part.numpy().tobytes() for weight in old.values() for part in _read(weight)}
        assert {part.numpy().tobytes() for weight in new.values() for part in _read(weight)} <= known


def _read(weight: Any) -> list[torch.Tensor]:
    return [part[...] for part in weight.parts().values()]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("bits=4 group_size=0", "format=rows-q8 holds 8 bits and one scale a row (bits=8 group_size=0): use format="),
        ("bits=8 group_size=8", "format=rows-q8 holds 8 bits and one scale a row"),
        ("bits=auto budget=4", "format=rows-q8 holds one width for all experts"),
    ],
)
def test_what_it_cannot_hold_is_refused(words, said, lab):
    with pytest.raises(ValueError, match=re.escape(said)):
        moe_compress.compress(f"quantize method=rtn format=rows-q8 {words}", **lab("mixtral"))


def test_no_other_program_is_said_to_load_it(folder):
    assert [verdict.loads for verdict in compatibility(open_checkpoint(folder))] == [False, False, False]


def test_words_of_other_formats_are_offered_with_it(lab):
    with pytest.raises(ValueError, match=r"allowed: auto, .*compressed-tensors, .*gptq, .*rows-q8, packed, dense"):
        moe_compress.compress("quantize format=unheard", **lab("mixtral"))


@pytest.mark.parametrize("part", [registry.Format, registry.Loaders, registry.Writer])
def test_the_tables_name_every_field(part):
    rows = {name for row in re.findall(r"^\| (`.*?) \|", TEXT, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert {field.name for field in dataclasses.fields(part)} <= rows


def test_the_table_does_without_transformers():
    code = (
        "import sys; sys.modules['transformers'] = None; from moe_compress.checkpoints.formats.registry import formats"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; print(*formats())"], capture_output=True, text=True, check=True
    )
    assert {"compressed-tensors", "gptq", "fp8", "mxfp4", "packed", "dense"} <= set(done.stdout.split())


def test_a_format_says_whether_it_is_written(monkeypatch):
    monkeypatch.setattr(registry, "_FORMATS", {})
    with pytest.raises(ValueError, match="needs a writer, or written=False"):
        registry.storage_format("mine")(lambda: registry.Format())
    register = registry.storage_format("mine", written=False)
    register(lambda: registry.Format())
    with pytest.raises(ValueError, match="'mine' is registered twice"):
        register(lambda: registry.Format())
