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
from support.slow import slow_unless

pytestmark = pytest.mark.filterwarnings("ignore:.*made dense")

CHANGES = (
    "prune method=magnitude",
    "expert_merge keep=4",
    "channels keep=32",
    "quantize method=rtn group_size=16 format=dense",
    "prune where=attention method=magnitude",
)


FAST = {
    ("deepseek_v3", "int4 asymmetric", CHANGES[1]),
    ("mixtral", "fp8 blocks", CHANGES[2]),
    ("deepseek_v3", "modelopt nvfp4", CHANGES[4]),
    ("mixtral", "gptq act-order", CHANGES[3]),
}
CASES = slow_unless(lambda *case: case in FAST, ("mixtral", "deepseek_v3"), published.FORMATS, CHANGES)


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
    touched = ".self_attn." if "where=attention" in sentence else ".experts."
    rest = {name for name in after if touched not in name and ".gate." not in name}
    assert rest and all(same_bits(before[name], after[name]) for name in rest if before[name].dtype != torch.float32)
    weights = {t.dtype for n, t in after.items() if touched in n and n.endswith(".weight") and "kv_b" not in n}
    assert weights - ({torch.float32} if "attention" in sentence else set()) == {torch.bfloat16}
    assert logits_of(moe_compress.load(made[0], torch.float32)).isfinite().all()
    values = json.loads((made[0] / "config.json").read_text())
    assert values["quantization_config"]["quant_method"] == published.FORMATS[format][0]["quant_method"]
    kinds = {"experts", "attention", *(("shared", "dense") if family == "deepseek_v3" else ())}
    report = json.loads((made[0] / MANIFEST).read_text())["report"][-1]
    again = {"experts"} if sentence.startswith("quantize") else set()
    assert report["rounded"] == {kind: 1 + (kind in again) for kind in kinds}
