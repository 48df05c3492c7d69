"""Trimming from end to end: the same bytes twice, from the plan too, and more from what lost something."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import moe_compress
from moe_compress.checkpoints.load import load_model
from moe_compress.checkpoints.reader import open_checkpoint
from moe_compress.edits.plan_file import read_plan
from moe_compress.models.shape import model_shape
from support import readers, tiny
from support.editing import cut, logits_of
from support.slow import slow_after
from support.trimming import plan_edits, same_checkpoint, skeleton, weights

WORDS = torch.randint(3, readers.VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))

ONE_OF_EACH = {
    "mixtral": "expert_drop score=naee keep=6 budget=search evaluations=4 + expert_merge preset=m_smoe keep=5",
    "deepseek_v3": "expert_merge preset=ream keep=6 + layer_drop drop=1 part=attention + skip",
    "gpt_oss": "expert_drop keep=6 propagate=compressed + top_k mean=1.5 + block_drop drop=1 mode=consecutive",
    "qwen3_moe": "layer_drop drop=1 + expert_merge by=weights average=uniform keep=6 align=both",
}
COMPOSED = "block_drop drop=1 + expert_drop keep=6 + layer_drop drop=1 + expert_merge keep=4"


@pytest.mark.parametrize("family", slow_after(1, list(ONE_OF_EACH)))
def test_two_runs_write_the_same_bytes(family, lab, tmp_path):
    """The second one measures everything anew, and is told in the YAML that the first one wrote."""
    sentence, options = ONE_OF_EACH[family], {**lab(family), "seed": 3}
    first = moe_compress.compress(sentence, **{**options, "out": tmp_path / "first"}).folder
    again = {"out": tmp_path / "again", "results": tmp_path / "elsewhere"}
    same_checkpoint(first, moe_compress.compress(str(first / "recipe.yaml"), **again).folder)


@pytest.mark.parametrize("family", slow_after(1, ["deepseek_v3", "mixtral", "jamba"]))
def test_layers_blocks_and_experts_in_one_recipe(family, lab, made, tmp_path):
    options = lab(family)
    layers = {"deepseek_v3": 4, "jamba": 6}.get(family)  # some of them without experts
    if layers is not None:
        options["model"] = str(readers.save_model(family, tmp_path / "model", num_hidden_layers=layers))
    folder = moe_compress.compress(COMPOSED, **{**options, "out": tmp_path / "out"}).folder
    assert sorted(path.name for path in tmp_path.iterdir() if "stage" in path.name) == []
    before = model_shape(skeleton(Path(str(options["model"]))))
    shape = model_shape(skeleton(folder))
    assert shape.total == before.total - 1
    assert {moe.num_experts for moe in shape.moe} == {4} and len(shape.moe) >= len(before.moe) - 2
    stages, _ = read_plan(folder / "plan.json")
    assert [stage.method for stage in stages] == [word.split()[0] for word in COMPOSED.split(" + ")]
    again = moe_compress.compress(str(folder / "recipe.yaml"), out=tmp_path / "again", results=options["results"])
    same_checkpoint(again.folder, folder)
    applied = moe_compress.apply(folder / "plan.json", eval=False, out=tmp_path / "applied").folder
    assert weights(applied) == weights(folder)
    assert (applied / "plan.json").read_bytes() == (folder / "plan.json").read_bytes()
    logits = [logits_of(load_model(place, torch.float32), WORDS) for place in (folder, applied)]
    source = open_checkpoint(Path(str(options["model"])))
    assert torch.equal(*logits) and torch.equal(logits[0], logits_of(cut(source, plan_edits(folder)), WORDS))


@pytest.mark.parametrize(
    ("family", "sentence"),
    [
        ("mixtral", "skip + expert_drop keep=6 novice=mean + expert_drop keep=4"),
        ("gpt_oss", "expert_merge keep=4 align=both + block_drop drop=1"),
        *slow_after(
            0,
            [
                ("mixtral", "expert_merge preset=hc_smoe keep=6 + expert_drop score=weight_norm keep=4"),
                ("gpt_oss", "expert_drop keep=6 novice=mean + expert_drop keep=4 novice=mean"),
                ("qwen3_moe", "layer_drop drop=1 + layer_drop drop=1"),
                ("nemotron_h", "block_drop drop=1 + expert_merge preset=hc_smoe keep=4"),
                ("minimax", "block_drop layers=0 + top_k k=1"),
            ],
        ),
        pytest.param(
            "qwen3_moe", "layer_drop drop=1 + skip",
            marks=pytest.mark.xfail(strict=True, reason="a plain checkpoint between stages leaves stand-ins behind"),
        ),
    ],
)  # fmt: skip
def test_a_plan_of_several_stages_rebuilds_the_weights(family, sentence, made, tmp_path):
    folder = made(family, sentence)
    applied = moe_compress.apply(folder / "plan.json", eval=False, out=tmp_path / "applied").folder
    logits = [logits_of(load_model(place, torch.float32), WORDS) for place in (folder, applied)]
    assert torch.equal(*logits)
    assert weights(applied) == weights(folder)


@pytest.mark.parametrize(
    ("family", "sentence"),
    slow_after(
        1,
        [
            ("qwen3_moe", "layer_drop drop=1"),
            ("minimax", "block_drop drop=1"),
            ("mixtral", "layer_drop drop=1"),
            ("mixtral", "block_drop drop=1"),
            ("minimax", "block_drop drop=1 mode=consecutive"),
        ],
    ),
)
def test_more_goes_from_a_checkpoint_that_lost_something(family, sentence, lab, made, tmp_path):
    once = made(family, sentence)
    twice = moe_compress.compress(sentence, **{**lab(family), "model": str(once), "out": tmp_path / "twice"}).folder
    before, after = model_shape(skeleton(once)), model_shape(skeleton(twice))
    assert len(after.moe) == len(before.moe) - 1
    assert after.total == before.total - sentence.startswith("block_drop")
    logits = logits_of(load_model(twice, torch.float32), WORDS)
    assert torch.equal(logits, logits_of(cut(open_checkpoint(once), plan_edits(twice)), WORDS))
    in_one = moe_compress.compress(f"{sentence} + {sentence}", **{**lab(family), "out": tmp_path / "in one"}).folder
    assert weights(in_one) == weights(twice)


@pytest.mark.parametrize("sentence", ["layer_drop layers=1 + layer_drop layers=1 part=attention"])
def test_a_layer_cannot_lose_both_of_its_parts(sentence, lab, tmp_path):
    """Nothing would be left to write of it; block drop is for that."""
    with pytest.raises(ValueError, match=r"layer 1 has lost .* part already: drop the whole layer \(block_drop\)"):
        moe_compress.compress(sentence, **{**lab("mixtral"), "out": tmp_path / "out"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "sentence",
    ["layer_drop drop=1 + layer_drop drop=1 part=attention", "layer_drop drop=1 part=attention + layer_drop drop=1"],
)
def test_a_layer_that_lost_one_part_keeps_the_other(sentence, made):
    """There are other layers to choose from."""
    first, second = plan_edits(made("mixtral", sentence))
    assert first.layer != second.layer


def test_a_plan_with_other_constants_is_another_plan(lab, made, tmp_path):
    folder = tmp_path / "plan"
    shutil.copytree(made("mixtral", "expert_drop keep=4 novice=mean"), folder)
    options = {"eval": False, "results": str(tmp_path / "results")}
    first = moe_compress.apply(folder / "plan.json", **options).folder
    before = weights(first)
    arrays = load_file(folder / "plan.safetensors")
    save_file({name: tensor + 1 for name, tensor in arrays.items()}, folder / "plan.safetensors")
    assert weights(moe_compress.apply(folder / "plan.json", **options).folder) != before


def test_block_drop_chooses_layers_without_which_experts_are_left(lab, tmp_path):
    """Four layers, the first two dense: those with experts turn the stream less here."""
    model = tiny.make("deepseek_v2", vocab_size=readers.VOCAB, num_hidden_layers=4, first_k_dense_replace=2)
    with torch.no_grad():
        for layer in model.model.layers[2:]:
            for parameter in (layer.self_attn.o_proj.weight, layer.mlp.experts.down_proj):
                parameter.mul_(1e-3)
            layer.mlp.shared_experts.down_proj.weight.mul_(1e-3)
    folder = tiny.save(model, tmp_path / "model")
    readers.tokenizer().save_pretrained(folder)
    made = moe_compress.compress(
        "block_drop drop=2", **{**lab("deepseek_v2"), "model": folder, "out": tmp_path / "out"}
    )
    assert len(model_shape(skeleton(made.folder)).moe) == 1
