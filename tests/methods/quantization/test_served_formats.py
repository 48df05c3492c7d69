"""Formats that engines serve: the library's own decoder and stock transformers make of them what we do."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_compress
from moe_compress.checkpoints.formats.stored_weight import StoredWeight
from moe_compress.checkpoints.load import load_model
from moe_compress.checkpoints.reader import open_checkpoint
from moe_compress.evaluation.verification.compatibility import compatibility
from support import readers
from support.decoders import decoded, stock_reads_the_same
from support.editing import logits_of
from support.pruned import report, stored
from support.slow import slow_unless

pytestmark = pytest.mark.filterwarnings("ignore:.*made dense")

SIZES = {"mixtral": "intermediate_size", "deepseek_v3": "moe_intermediate_size", "qwen3_moe": "moe_intermediate_size"}
# Words behind `quantize`, bits of a weight, and the largest relative error of a matrix's numbers.
FORMATS = {
    "fp8": ("method=rtn format=fp8", 8, 0.03),
    "fp8 gptq": ("format=fp8 min_tokens=4", 8, 0.06),
    "fp8-dynamic": ("method=rtn format=fp8-dynamic", 8, 0.03),
    "int8": ("method=rtn format=int8", 8, 0.01),
    "asymmetric": ("method=rtn format=asymmetric group_size=32", 4, 0.11),
    "asymmetric 2": ("format=asymmetric bits=2 group_size=32 min_tokens=4", 2, 0.7),
    "signed": ("method=rtn group_size=32 clip=signed", 4, 0.11),
    "nvfp4a16": ("method=rtn format=nvfp4a16", 4, 0.11),
    "nvfp4": ("method=rtn format=nvfp4", 4, 0.11),
    "nvfp4 gptq": ("format=nvfp4a16 min_tokens=4", 4, 0.2),
    "mxfp4": ("method=rtn format=mxfp4", 4, 0.13),
    "mxfp4a16": ("method=rtn format=mxfp4a16", 4, 0.13),
    "awq": ("method=rtn format=awq group_size=32", 4, 0.11),
}
STOCK = ("fp8", "fp8 gptq", "fp8-dynamic", "signed", "mxfp4", "mxfp4a16")


@pytest.fixture(scope="session")
def served(texts, tmp_path_factory) -> Callable[[str, str], tuple[Path, Path, dict[str, Any]]]:
    """(family, format) -> the model, the checkpoint, and the options of its run."""
    place = tmp_path_factory.mktemp("served")
    files = {"data": str(texts / "calibration.txt"), "eval": False}

    @functools.cache
    def model(family: str) -> Path:
        return readers.save_model(family, place / family, **{SIZES[family]: 128, "hidden_size": 128})

    @functools.cache
    def make(family: str, format: str) -> tuple[Path, Path, dict[str, Any]]:
        given = {**readers.OPTIONS, **files, "model": str(model(family)), "results": str(place / f"{family} runs")}
        return model(family), moe_compress.compress(f"quantize {FORMATS[format][0]}", **given).folder, given

    return make


FAST = {
    ("mixtral", "fp8 gptq"),
    ("deepseek_v3", "nvfp4"),
    ("qwen3_moe", "asymmetric 2"),
    ("deepseek_v3", "mxfp4"),
    ("qwen3_moe", "awq"),
    ("mixtral", "signed"),
}
CASES = slow_unless(lambda *case: case in FAST, SIZES, FORMATS)


@pytest.mark.parametrize(("family", "format"), CASES)
def test_its_own_decoder_makes_the_same_numbers(family, format, served):
    model, folder, _ = served(family, format)
    checkpoint, before, expected = open_checkpoint(folder), stored(model), decoded(folder)
    _, bits, most = FORMATS[format]
    assert report(folder)["bits"] == {"experts": bits} and report(folder)["rounded"] == {"experts": 1}
    names = [name for name in before if ".experts." in name]
    assert expected.keys() == {*names}
    with checkpoint.read(names) as found:
        for name in names:
            number = found[name][...].float()
            assert float((number - before[name]).norm() / before[name].norm()) < most, name
            torch.testing.assert_close(number, expected[name], rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize(("family", "format"), CASES)
def test_stock_transformers_gives_our_logits_where_it_is_said_to(family, format, served):
    _, folder, given = served(family, format)
    ours, said = logits_of(moe_compress.load(folder, torch.float32)), compatibility(open_checkpoint(folder))[0]
    assert said.loads == (format in STOCK), said.why
    assert moe_compress.plan(f"quantize {FORMATS[format][0]}", **given).after.bytes == pytest.approx(
        open_checkpoint(folder).bytes, rel=2e-3
    )
    try:
        theirs = logits_of(load_model(folder, torch.float32))
    except (ValueError, RuntimeError, ImportError):
        assert not said.loads
    else:
        assert torch.allclose(theirs, ours, rtol=0, atol=1e-5) == said.loads


EVERYWHERE = {("deepseek_v3", "awq"), ("mixtral", "gptq"), ("qwen3_moe", "nvfp4a16")}


@pytest.mark.parametrize(
    ("family", "format"), slow_unless(lambda *case: case in EVERYWHERE, SIZES, (*FORMATS, "gptq", "compressed-tensors"))
)
def test_everything_is_decoded_where_all_of_a_layer_is_packed(family, format, served, tmp_path):
    """Attention, dense and shared layers are in it as well, and routers are not."""
    model, _, given = served(family, "signed")
    words = FORMATS[format][0] if format in FORMATS else f"method=rtn format={format} group_size=16"
    folder = moe_compress.compress(f"quantize {words} where=all", **{**given, "out": tmp_path / "out"}).folder
    expected, checkpoint, before = decoded(folder), open_checkpoint(folder), stored(model)
    packed = {name for name, entry in checkpoint.tensors.items() if isinstance(entry, StoredWeight)}
    assert packed == expected.keys() and not any(name.endswith("gate.weight") for name in packed)
    assert {".experts." in name for name in packed} == {True, False}
    most = FORMATS[format][2] if format in FORMATS else 0.12
    with checkpoint.read(packed) as found:
        for name in packed:
            number = found[name][...].float()
            torch.testing.assert_close(number, expected[name], rtol=1e-3, atol=1e-6, msg=name)
            assert float((number - before[name]).norm() / before[name].norm()) < most, name
    assert logits_of(moe_compress.load(folder, torch.float32)).isfinite().all()
    said = compatibility(checkpoint)[0]
    assert stock_reads_the_same(folder) == said.loads == (format in (*STOCK, "compressed-tensors")), said.why


def test_equal_schemes_are_one_group_and_different_ones_are_said_to_be_refused_by_llama_cpp(served):
    for family, format, groups in (("mixtral", "signed", 1), ("deepseek_v3", "mxfp4", 2)):
        _, _, given = served(family, format)
        folder = moe_compress.compress("quantize method=rtn group_size=32 where=experts,attention", **given).folder
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        assert len(config["config_groups"]) == groups
        verdict = compatibility(open_checkpoint(folder))[2]
        assert verdict.loads == (groups == 1) and (groups == 1 or "takes one config group" in verdict.why)
        assert torch.allclose(
            logits_of(load_model(folder, torch.float32)), logits_of(moe_compress.load(folder, torch.float32)), atol=1e-5
        )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("format=fp8 bits=4", "format=fp8 holds 8 bits (bits=8)"),
        ("format=nvfp4a16 bits=8", "format=nvfp4a16 holds 4 bits (bits=4)"),
        ("format=awq bits=8", "format=awq holds 4 bits (bits=4)"),
        ("format=fp8 group_size=0", "has blocks of 128 x 128 (group_size=128)"),
        ("format=mxfp4 where=attention", "only where experts are packed, too"),
        ("format=int8 bits=auto budget=8", "bits=auto needs format=packed or dense"),
    ],
)
def test_what_a_format_cannot_hold_is_said_at_once(words, said, served, refused):
    model, _, _ = served("mixtral", "signed")
    assert said in refused(f"quantize {words}", model=str(model))
