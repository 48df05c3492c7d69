"""Models published in floating-point codes (FP8, MXFP4): read as stock transformers reads them, trimmed as bytes."""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import moe_compress
from moe_compress.checkpoints.formats.fp8 import Fp8Weight
from moe_compress.checkpoints.formats.mxfp4 import Mxfp4Weight
from moe_compress.checkpoints.load import load_model
from moe_compress.checkpoints.reader import open_checkpoint
from moe_compress.edits.apply import apply_edits
from moe_compress.edits.plan_file import PLAN, read_plan
from support import readers
from support.checkpoints import streamed
from support.editing import logits_of
from support.pruned import stored
from support.slow import each_once, slow_unless

BLOCK = (8, 8)
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)}
KEPT = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": KEPT}
LEVELS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
# Stock transformers makes widths dense that consist of whole blocks.
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v3": {},
    "qwen3_moe": {},
    "glm4_moe": {},
    "gpt_oss": {"intermediate_size": 64},
}


def to_fp8(weight: Tensor, size: int = BLOCK[0]) -> tuple[Tensor, Tensor]:
    """(codes, factors), block by block."""
    codes = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    rows, columns = (-(-length // size) for length in weight.shape)
    factors = torch.empty(rows, columns)
    for r in range(rows):
        for c in range(columns):
            here = (slice(r * size, (r + 1) * size), slice(c * size, (c + 1) * size))
            factors[r, c] = weight[here].float().abs().max() / 448
            codes[here] = (weight[here].float() / factors[r, c]).to(torch.float8_e4m3fn)
    return codes, factors


def to_mxfp4(weight_EIO: Tensor) -> tuple[Tensor, Tensor]:
    """(blocks uint8 [E, O, B, 16], scales uint8 [E, O, B])."""
    cut = weight_EIO.float().transpose(1, 2).unflatten(-1, (-1, 32))
    exponent = (cut.abs().amax(-1) / 6).log2().ceil()
    nearest = (cut.abs() / 2 ** exponent.unsqueeze(-1)).unsqueeze(-1).sub(LEVELS).abs().argmin(-1)
    code = (nearest + 8 * (cut < 0)).to(torch.uint8)
    return (code[..., ::2] | code[..., 1::2] << 4).contiguous(), (exponent + 127).to(torch.uint8)


def publish(family: str, folder: Path) -> Path:
    """A tiny model as its authors would publish it."""
    readers.save_model(family, folder, **FAMILIES[family])
    found: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if family == "gpt_oss" and name.endswith(("gate_up_proj", "down_proj")):
            found[f"{name}_blocks"], found[f"{name}_scales"] = to_mxfp4(tensor)
        elif family != "gpt_oss" and ".layers." in name and re.search(r"_(proj|proj_with_mqa)\.weight$", name):
            found[name], found[f"{name}_scale_inv"] = to_fp8(tensor)
        else:
            found[name] = tensor.bfloat16()
    save_file(found, folder / "model.safetensors", {"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    values |= {"dtype": "bfloat16", "quantization_config": MXFP4 if family == "gpt_oss" else FP8}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="session")
def published(tmp_path_factory) -> Callable[[str], Path]:
    place = tmp_path_factory.mktemp("published")
    return functools.cache(lambda family: publish(family, place / family))


def test_blocks_at_the_edges_are_cut_off():
    """As in DeepSeek-V3, whose latent projection has 576 rows of blocks of 128: a factor is found by position."""
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    codes, factors = to_fp8(weight, 16)
    found = Fp8Weight(factors, codes, block=(16, 16))[...]
    expected = [[float(codes[r, c]) * float(factors[r // 16, c // 16]) for c in range(40)] for r in range(24)]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-6, atol=0)
    assert float((found - weight).abs().max()) < 0.1 * float(weight.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_read_as_stock_transformers_reads_it(family, published):
    """transformers makes codes dense in bf16 where no accelerator is; here they are exact."""
    checkpoint = open_checkpoint(published(family))
    ours, stock = streamed(checkpoint), load_model(published(family))
    kinds = {type(entry) for entry in checkpoint.tensors.values()}
    assert kinds & {Fp8Weight, Mxfp4Weight} and not checkpoint.packed
    expected = dict(stock.named_parameters())
    assert expected.keys() == dict(ours.named_parameters()).keys()
    for name, tensor in ours.named_parameters():
        assert torch.equal(tensor.bfloat16(), expected[name].bfloat16()), name
    assert logits_of(moe_compress.load(published(family))).isfinite().all()


RECIPES = [
    "expert_drop keep=6",
    "layer_drop drop=1 + expert_drop keep=6",
    "expert_drop keep=6 + expert_drop keep=4",
    "block_drop drop=1",
]


@pytest.mark.parametrize(
    ("family", "sentence"),
    slow_unless(each_once(("deepseek_v3", "gpt_oss"), RECIPES), FAMILIES, RECIPES),
)
def test_trimming_moves_its_bytes(family, sentence, published, options):
    result = moe_compress.compress(sentence, model=str(published(family)), eval=False, **options)
    before, after = stored(published(family)), stored(result.folder)
    # Whatever is codes or factors has to be bytes of the source: a whole tensor, or experts of a stack.
    known = {part.view(torch.uint8).numpy().tobytes() for tensor in before.values() for part in pieces(tensor)}
    for name, tensor in after.items():
        if tensor.dtype in (torch.uint8, torch.float8_e4m3fn) or name.endswith(("_scales", "_inv")):
            assert all(part.contiguous().view(torch.uint8).numpy().tobytes() in known for part in pieces(tensor)), name
    config = json.loads((result.folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == ("mxfp4" if family == "gpt_oss" else "fp8")
    # The same edits on the dense model give the same logits.
    edits = [edit for stage in read_plan(result.folder / PLAN)[0] for edit in stage.plan.edits]
    dense = streamed(open_checkpoint(published(family)))
    apply_edits(dense, edits)
    torch.testing.assert_close(logits_of(streamed(open_checkpoint(result.folder))), logits_of(dense), rtol=0, atol=1e-5)
    assert open_checkpoint(result.folder).bytes < open_checkpoint(published(family)).bytes
    again = load_model(result.folder, torch.float32)
    torch.testing.assert_close(
        logits_of(again), logits_of(dense), rtol=0, atol=0.05 * float(logits_of(dense).abs().max())
    )


def pieces(tensor: Tensor) -> list[Tensor]:
    """A stack's matrices; a matrix."""
    return list(tensor) if tensor.dim() > 2 else [tensor]


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize(
    "sentence",
    ["quantize", "prune", "channels score=magnitude ratio=0.5", "expert_merge keep=4", "quantize where=attention"],
)
@pytest.mark.filterwarnings("ignore:packed weights are made dense")
def test_its_weights_change_without_a_dense_copy(family, sentence, published, options):
    """Either the rest stays in its codes, or what cannot be said in one config is refused in a sentence."""
    try:
        folder = moe_compress.compress(sentence, model=str(published(family)), eval=False, **options).folder
    except ValueError as error:
        assert "cannot be said in one config" in str(error) and sentence.startswith("quantize")
        return
    before, after = stored(published(family)), stored(folder)
    codes = {name for name, tensor in before.items() if tensor.dtype in (torch.uint8, torch.float8_e4m3fn)}
    still = {name for name in codes & after.keys() if after[name].dtype == before[name].dtype}
    assert all(torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)) for name in still)
    touched = ".self_attn." if "attention" in sentence else ".experts."
    assert still == {name for name in codes if touched not in name}
    config = json.loads((folder / "config.json").read_text())
    assert bool(still) == (config.get("quantization_config", {}).get("quant_method") in ("fp8", "mxfp4"))
    assert logits_of(moe_compress.load(folder, torch.float32)).isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_forecast_counts_codes(family, published):
    found = moe_compress.plan("expert_drop keep=6", model=str(published(family)))
    assert found.before.bytes == pytest.approx(open_checkpoint(published(family)).bytes, rel=0.12)


def test_published_sizes_are_forecast():
    """DeepSeek-V3's is among the forecasts of test_commands: 673 GB, and 14 more of its prediction layer."""
    found = moe_compress.plan("expert_drop ratio=0.25", model="openai/gpt-oss-20b").before
    assert found.bytes == pytest.approx(13.76e9, rel=0.01)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weight_block_size": [128]}, "is stored in fp8 format, which is not read"),
        ({"fmt": "e5m2"}, "is stored in fp8 format, which is not read"),
        ({}, "weight is missing beside"),
    ],
)
def test_broken_ones_are_named(change, said, published, tmp_path):
    tensors = stored(published("qwen3_moe"))
    if not change:
        tensors.pop(next(name for name in tensors if name + "_scale_inv" in tensors))
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    values = json.loads((published("qwen3_moe") / "config.json").read_text())
    values["quantization_config"] = {k: v for k, v in {**FP8, **change}.items() if v is not None}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=said):
        open_checkpoint(tmp_path)


def test_the_other_name_of_the_same_codes_is_read(published, tmp_path):
    """MiniMax-M2 calls them by torch's name."""
    source = published("qwen3_moe")
    shutil.copytree(source, tmp_path / "other")
    values = json.loads((source / "config.json").read_text())
    values["quantization_config"] = {**FP8, "fmt": "float8_e4m3fn"}
    (tmp_path / "other" / "config.json").write_text(json.dumps(values))
    one, other = open_checkpoint(source), open_checkpoint(tmp_path / "other")
    name = next(key for key in one.tensors if key.endswith("down_proj.weight"))
    with one.read([name]) as here, other.read([name]) as there:
        assert torch.equal(here[name][...], there[name][...])
