"""What is packed in a plain format changes layer by layer as a dense copy does, and all else keeps its bytes."""

from __future__ import annotations

import json

import pytest
import torch

import moe_compress
from moe_compress.checkpoints.folder import MANIFEST
from moe_compress.checkpoints.reader import open_checkpoint
from support import published
from support.editing import logits_of
from support.pruned import same_bits, stored

pytestmark = pytest.mark.filterwarnings("ignore:.*made dense")

CHANGES = (
    "prune method=magnitude",
    "expert_merge keep=4",
    "channels keep=32",
    "quantize method=rtn group_size=16 format=dense",
    "prune where=attention method=magnitude",
)


# Parts that families have beside experts and attention.
MORE_KINDS = {"deepseek_v3": ("shared", "dense"), "deepseek_v4": ("shared",)}
FAST = {
    ("deepseek_v3", "int4 asymmetric", CHANGES[1]),
    ("mixtral", "fp8 blocks", CHANGES[2]),
    ("deepseek_v3", "modelopt nvfp4", CHANGES[4]),
    ("mixtral", "gptq act-order", CHANGES[3]),
    ("deepseek_v4", "deepseek fp4", CHANGES[1]),
    ("deepseek_v4", "transformers fp4", CHANGES[0]),
}
PAIRS = [pair for pair in published.PAIRS if pair[0] != "qwen3_moe"]
CASES = [
    pytest.param(*case, marks=() if case in FAST else pytest.mark.slow)
    for case in ((*pair, sentence) for pair in PAIRS for sentence in CHANGES)
]


@pytest.mark.parametrize(("family", "format", "sentence"), CASES)
def test_it_changes_as_a_dense_copy_does(family, format, sentence, pair, options):
    packed, dense = pair(family, format)
    made = [moe_compress.compress(sentence, model=str(m), eval=False, **options).folder for m in (packed, dense)]
    ours, theirs = (open_checkpoint(folder) for folder in made)
    assert ours.tensors.keys() == theirs.tensors.keys()
    before, after = stored(packed), stored(made[0])
    with ours.read(ours.tensors) as found, theirs.read(theirs.tensors) as expected:
        for name in ours.tensors:
            one, other = found[name][...], expected[name][...]
            if sentence.startswith("quantize") and ".experts." in name:  # on scales of the dtype that each is stored in
                assert float((one - other).norm()) < 0.06 * float(other.norm()), name
            else:
                assert torch.equal(one.bfloat16(), other.bfloat16()), name
    # What is not touched stays packed, byte for byte; what is, is stored as the plain weights of the model are.
    part = published.attention_of(family) if "where=attention" in sentence else ".experts."
    # DeepSeek-V4's first layer looks its experts up: they may be rounded and pruned, no more.
    whole = "layers.0." if family == "deepseek_v4" and sentence in CHANGES[1:3] else "none"
    touched = {name for name in after if part in name and not name.startswith(whole)}
    rest = {name for name in after if name not in touched and ".gate." not in name}
    assert rest and all(same_bits(before[name], after[name]) for name in rest if before[name].dtype != torch.float32)
    weights = {after[name].dtype for name in touched if name.endswith(".weight") and "kv_b" not in name}
    assert weights - ({torch.float32} if "attention" in sentence else set()) == {torch.bfloat16}
    assert logits_of(moe_compress.load(made[0], torch.float32)).isfinite().all()
    values = json.loads((made[0] / "config.json").read_text())
    assert values["quantization_config"]["quant_method"] == published.FORMATS[format][0]["quant_method"]
    kinds = {"experts", "attention", *MORE_KINDS.get(family, ())}
    report = json.loads((made[0] / MANIFEST).read_text())["report"][-1]
    again = {"experts"} if sentence.startswith("quantize") else set()
    assert report["rounded"] == {kind: 1 + (kind in again) for kind in kinds}
