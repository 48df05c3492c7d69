"""What others packed is packed anew, dropped or factored as a dense copy is, and the rest keeps its bytes."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from safetensors.torch import save_file

import moe_compress
from moe_compress.checkpoints.formats.registry import format_in
from moe_compress.checkpoints.formats.stored_weight import StoredWeight
from moe_compress.checkpoints.quantization_config import packed_edits
from moe_compress.checkpoints.reader import open_checkpoint
from moe_compress.evaluation.verification.compatibility import compatibility
from moe_compress.models import hf
from moe_compress.models.moe import moe_views
from support import published
from support.decoders import decoded, stock_reads_the_same
from support.editing import logits_of
from support.pruned import same_bits, stored
from support.quantized import form, packed_in
from support.slow import slow_after

pytestmark = pytest.mark.filterwarnings("ignore:.*made dense")

FAMILIES, SOURCES = ("mixtral", "deepseek_v3", "qwen3_moe"), tuple(published.FORMATS)
# Words behind `quantize method=rtn`, and whether the scales are the same whatever dtype a model is stored in.
TARGETS = {
    "compressed-tensors": ("group_size=16 format=compressed-tensors", False),
    "asymmetric": ("group_size=16 format=asymmetric", False),
    "awq": ("group_size=16 format=awq", True),
    "gptq": ("group_size=16 format=gptq", True),
    "fp8-dynamic": ("format=fp8-dynamic", False),
    "int8": ("format=int8", False),
    "nvfp4a16": ("format=nvfp4a16", True),
    "nvfp4": ("format=nvfp4", True),
    "mxfp4": ("format=mxfp4", True),
    "packed": ("group_size=16 format=packed", False),
}
OWN = {"awq", "gptq", "fp8"}


def cases(targets, every, fast):
    """Every source with some of the targets, the families in turn; slow but for the fast ones."""
    for (i, source), (j, target) in itertools.product(enumerate(SOURCES), enumerate(targets)):
        if (i + j) % every == 0:
            marks = () if (source, target) in fast else pytest.mark.slow
            yield pytest.param(family_of(source, i // 2 + j), source, target, marks=marks)


def family_of(source, number):
    """The family that a source is of, or the families in turn."""
    return published.ALONE.get(source, FAMILIES[number % len(FAMILIES)])


def both(sentence, pair, options):
    """The checkpoints that a recipe makes of a packed model and of its dense copy."""
    return [moe_compress.compress(sentence, model=str(model), eval=False, **options).folder for model in pair]


def require_equal(one, other, exact=lambda _name: True, most=0.06):
    """Checkpoints of the same numbers; where scales are of the dtype that each is stored in, of almost the same."""
    ours, theirs = open_checkpoint(one), open_checkpoint(other)
    assert ours.tensors.keys() == theirs.tensors.keys()
    with ours.read(ours.tensors) as found, theirs.read(theirs.tensors) as expected:
        for name in ours.tensors:
            here, there = found[name][...].float(), expected[name][...].float()
            if exact(name):
                assert torch.equal(here, there), name
            else:
                assert float((here - there).norm()) <= most * float(there.norm()), name


DROPS = [
    pytest.param(family_of(source, i), source, marks=() if i in (5, 11) else pytest.mark.slow)
    for i, source in enumerate(SOURCES)
]


@pytest.mark.parametrize(("family", "source"), DROPS)
def test_the_same_experts_stay_as_of_a_dense_copy(family, source, pair, options):
    packed, dense = both("expert_drop score=weight_norm keep=6", pair(family, source), options)
    require_equal(packed, dense)
    ours, theirs = (moe_compress.load(folder, torch.float32) for folder in (packed, dense))
    # What stays packed in memory multiplies codes and scales in fp32, which its decoder rounds.
    if not packed_in(ours):
        torch.testing.assert_close(logits_of(ours), logits_of(theirs), rtol=0, atol=1e-5)
    for index, view in moe_views(ours).items():
        for part, stack in moe_views(theirs)[index].stacks().items():
            torch.testing.assert_close(view.stacks()[part], stack, rtol=5e-3, atol=1e-6)


FAST = {("modelopt fp8", "mxfp4"), ("gptq act-order", "nvfp4"), ("fp8 rows", "awq")}


@pytest.mark.parametrize(("family", "source", "target"), cases(TARGETS, 4, FAST))
def test_all_of_it_is_packed_anew(family, source, target, pair, options):
    words, exact = TARGETS[target]
    folder, dense = both(f"quantize method=rtn {words} where=all", pair(family, source), options)
    assert not any(name.endswith("k_scale") for name in stored(folder))  # of a cache that config.json is silent about
    assert logits_of(moe_compress.load(folder, torch.float32)).isfinite().all()
    if target == "packed":
        require_alike_modules(folder, dense)
        return
    require_equal(folder, dense, lambda name: exact or "layers." not in name)
    require_decoded(folder)


@pytest.mark.parametrize(
    "source", slow_after(1, ["modelopt fp8", "awq", "fp8 blocks", "mistral fp8", "gptq act-order"])
)
def test_all_of_it_is_packed_in_blocks_of_fp8(source, options, tmp_path):
    """Where widths are whole blocks of 128."""
    pair = published.publish_both("mixtral", source, tmp_path, hidden_size=128, intermediate_size=128)
    folder, dense = both("quantize method=rtn format=fp8 where=experts,attention", pair, options)
    require_equal(folder, dense, lambda name: ".experts." in name, most=0.01)  # heads are no whole blocks
    require_decoded(folder)
    assert stock_reads_the_same(folder)


@pytest.mark.parametrize(
    ("sentence", "stays"),
    slow_after(
        2,
        [
            ("prune method=magnitude", True),
            ("quantize method=rtn group_size=16 format=gptq where=all", False),
            ("prune method=magnitude where=all", False),
            ("quantize method=rtn format=nvfp4a16 where=all", False),
        ],
    ),
)
@pytest.mark.parametrize("source", slow_after(1, ["deepseek fp8", "fp8 rows"]))
def test_layers_that_predict_stay_packed_or_are_left_out(source, sentence, stays, options, tmp_path):
    folder = tmp_path / "model"
    published.publish("deepseek_v3", source, folder)
    tensors, values = stored(folder), json.loads((folder / "config.json").read_text())
    last = values["num_hidden_layers"]
    before = {n.replace(f".{last - 1}.", f".{last}.", 1): t.clone() for n, t in tensors.items() if f".{last - 1}." in n}
    before = {name: tensor for name, tensor in before.items() if f"layers.{last}." in name}
    save_file({**tensors, **before}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**values, "num_nextn_predict_layers": 1}))
    notes = moe_compress.plan(sentence, model=str(folder), **options).notes
    assert any(("copied as they are" if stays else "left out") in note for note in notes)
    out = moe_compress.compress(sentence, model=str(folder), eval=False, **options).folder
    after = {name: tensor for name, tensor in stored(out).items() if f"layers.{last}." in name}
    assert after.keys() == (before.keys() if stays else set())
    assert all(same_bits(before[name], tensor) for name, tensor in after.items())
    assert json.loads((out / "config.json").read_text())["num_nextn_predict_layers"] == stays


def require_alike_modules(one, other):
    """Edited checkpoints with the same matrices packed, as nearly as the dtype of their scales lets them be."""
    ours, theirs = (packed_in(moe_compress.load(folder, torch.float32)) for folder in (one, other))
    assert form(one) == form(other) == "edited" and ours and ours.keys() == theirs.keys()
    for name, matrix in ours.items():
        here, there = matrix.dense(), theirs[name].dense()
        assert float((here - there).norm()) < 0.06 * float(there.norm()), name


def require_decoded(folder):
    """Every packed matrix reads as its own decoder makes it."""
    found, checkpoint = decoded(folder), open_checkpoint(folder)
    packed = {name for name, entry in checkpoint.tensors.items() if isinstance(entry, StoredWeight)}
    assert packed and found.keys() == packed
    with checkpoint.read(found) as tensors:
        for name, expected in found.items():
            torch.testing.assert_close(tensors[name][...].float(), expected, rtol=1e-3, atol=1e-6, msg=name)


SOME = {("int4", "nvfp4a16"), ("fp8 rows", "compressed-tensors"), ("deepseek fp8", "nvfp4a16"), ("gptq", "awq")}
ANEW = ("compressed-tensors", "awq", "nvfp4a16", "fp8-dynamic", "packed")


@pytest.mark.parametrize(("family", "source", "target"), cases(ANEW, 1, SOME))
def test_experts_alone_are_packed_anew_where_one_config_says_so(family, source, target, pair, options):
    words, exact = TARGETS[target]
    sentence, (packed, dense) = f"quantize method=rtn {words}", pair(family, source)
    method = published.FORMATS[source][0]["quant_method"]
    if target in (*OWN, "packed") or method != "compressed-tensors":
        with pytest.raises(ValueError, match=r"attention.*cannot be said in one config: choose where=all, or format="):
            moe_compress.plan(sentence, model=str(packed), **options)
        for other in (f"{sentence} where=all", "quantize method=rtn group_size=16 format=dense"):
            moe_compress.plan(other, model=str(packed), **options)
        return
    folder, copy = both(sentence, (packed, dense), options)
    require_equal(folder, copy, lambda name: exact or ".experts." not in name)
    before, after = stored(packed), stored(folder)
    rest = {name for name in before if ".experts." not in name}
    assert rest == {name for name in after if ".experts." not in name}
    assert all(same_bits(before[name], after[name]) for name in rest)
    require_decoded(folder)
    # Stock transformers either has the same weights, or it is said that it does not.
    assert stock_reads_the_same(folder) == compatibility(open_checkpoint(folder))[0].loads


FACTORISE = "factorise structure=svd rank=8 propagate=original"
FACTORED = [
    pytest.param(family, source, marks=() if number in (1, 3) else pytest.mark.slow)
    for number, (source, family) in enumerate(
        itertools.product(("deepseek fp8", "gptq", "gptq act-order", "fp8 blocks", "modelopt nvfp4"), FAMILIES[:2])
    )
]


@pytest.mark.parametrize(("family", "source"), FACTORED)
def test_its_experts_become_factors_and_the_rest_stays_packed(family, source, pair, options):
    packed, dense = pair(family, source)
    folder, copy = both(FACTORISE, (packed, dense), options)
    before, after = stored(packed), stored(folder)
    layers = {name.split(".layers.")[1].split(".")[0] for name in before if ".experts." in name}
    factors = {name for name in after if ".separate." in name or ".shared_parts." in name}
    assert {name.split(".layers.")[1].split(".")[0] for name in factors} == layers
    assert {after[name].dtype for name in factors} == {torch.bfloat16}
    rest = {name for name in before if ".experts." not in name}
    assert rest == after.keys() - factors and all(same_bits(before[name], after[name]) for name in rest)
    values = open_checkpoint(folder).values
    assert format_in(values).name == published.FORMATS[source][0]["quant_method"]
    found = moe_compress.plan(FACTORISE, model=str(packed), **options).after
    assert found.bytes == pytest.approx(open_checkpoint(folder).bytes, rel=0.1)
    said = packed_edits(hf.skeleton(open_checkpoint(packed).config, torch.float32), values)
    assert said and not any(".experts." in name for edit in said for name in edit.bits)
    ours, theirs = (moe_compress.load(each, torch.float32) for each in (folder, copy))
    assert logits_of(ours).isfinite().all()
    wanted = moe_views(theirs)
    for index, view in moe_views(ours).items():
        for part, stack in view.stacks().items():
            assert float((stack - wanted[index].stacks()[part]).norm()) < 0.01 * float(stack.norm()), (index, part)
