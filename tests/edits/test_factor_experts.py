"""Checkpoints whose experts are held in factors: what is written is what loads, everywhere; and what is refused."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from moe_compress.checkpoints.load import load_model
from moe_compress.checkpoints.reader import open_checkpoint
from moe_compress.edits.apply import check_edits
from moe_compress.edits.edits import (
    DropLayer,
    FactorExperts,
    KeepChannels,
    KeepExperts,
    MergeExperts,
    PackMatrices,
    from_json,
    to_json,
)
from moe_compress.edits.factors import Form
from moe_compress.models import hf
from moe_compress.models.moe import moe_views
from moe_compress.models.sizes import sizes
from support import tiny
from support.edit_kinds import GROUPS, WEIGHTS
from support.editing import IDS, logits_of, original
from support.editing import write as write_edits
from support.factored import FORMS, MIXED, OTHERS, factored, write
from support.slow import DIFFERENT, slow_unless
from support.stock_process import STRANGER, generated, stranger

ALL_FORMS = {**FORMS, "mixed": MIXED, "others": OTHERS}


def each_different(family, _forms):
    return family in DIFFERENT


@pytest.fixture(scope="module")
def written(sources, tmp_path_factory):
    """(family, forms) -> a checkpoint in factors, made once."""
    folder, made = tmp_path_factory.mktemp("factored"), {}

    def checkpoint(family, name):
        if (family, name) not in made:
            made[family, name] = write(sources(family), ALL_FORMS[name], folder / f"{family} {name}")[0]
        return made[family, name]

    return checkpoint


def in_memory(source, name):
    model = original(source)
    hf.use_experts_function(model)
    factored(model, ALL_FORMS[name])
    return model


@pytest.mark.parametrize(
    ("family", "name"), [*(("mixtral", name) for name in FORMS), *slow_unless(each_different, tiny.EDITABLE, ["mixed"])]
)
def test_a_written_checkpoint_is_the_model_in_memory(family, name, sources, written):
    checkpoint, memory = written(family, name), in_memory(sources(family), name)
    assert not list(checkpoint.folder.glob("*.bin")) and (checkpoint.folder / "factored_experts.py").is_file()
    for model in (
        load_model(checkpoint.folder, torch.float32),
        AutoModelForCausalLM.from_pretrained(checkpoint.folder),
    ):
        hf.use_experts_function(model)
        found, expected = model.eval().state_dict(), memory.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        # A copy lies where memory is aligned, which the last bits of products depend on.
        assert torch.equal(logits_of(copy.deepcopy(model)), logits_of(memory))
    skeleton = hf.skeleton(checkpoint.config, torch.float32)
    counted = sizes(skeleton, 16, torch.float32)
    assert counted.bytes == checkpoint.bytes
    assert counted == sizes(memory, 16, torch.float32)


def test_it_loads_and_generates_where_the_package_is_unknown(written, tmp_path):
    expected, folders = {}, {}
    for family, name in [
        ("mixtral", "others"),
        ("gpt_oss", "mixed"),
        ("llama4_text", "mixed"),
        ("deepseek_v3", "others"),
    ]:
        folder = written(family, name).folder
        model = load_model(folder, torch.float32)
        folders[family], expected[family] = str(folder), logits_of(model)
        expected[f"{family} generated"] = generated(model)
    save_file(expected, tmp_path / "expected.safetensors")
    ids = json.dumps([IDS.tolist(), tiny.token_ids(2, 18).tolist()])
    words = [json.dumps(folders), str(tmp_path / "expected.safetensors"), ids]
    done = stranger("-c", STRANGER, *words, home=tmp_path / "hf")
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_plan_and_a_config_say_it_briefly():
    edit = FactorExperts(
        3, {"up": FORMS["base and delta"], "down": FORMS["ragged svd"], "gate": FORMS["silu of bases"]}
    )
    said = to_json(edit)
    assert said == {
        "edit": "factor_experts",
        "layer": 3,
        "forms": {
            "up": {"rank": 4, "core": True},
            "down": {"rank": list(FORMS["ragged svd"].rank)},
            "gate": {"bases": [2, 5], "activation": "silu"},
        },
    }
    assert from_json(json.loads(json.dumps(said))) == edit


WRONG = [
    ({"edge": {"rank": 4}}, "forms.edge.[key]: input should be 'gate', 'up' or 'down'"),
    ({"up": {"rank": "4"}}, "is not valid: forms.up"),
    ({"up": {"rank": 4, "width": 3}}, "is not valid: forms.up.width"),
    ({"up": {"bases": [2, 4], "activation": "relu"}}, "forms.up.activation: input should be 'silu' or 'tanh'"),
    ({}, "nothing is said of how its experts are held in factors"),
    ({"up": {"core": True}}, "factors have a rank, a basis or bases, not none of them"),
    ({"up": {"rank": 4, "basis": 3}}, "factors have a rank, a basis or bases, not rank and basis"),
    ({"up": {"basis": 4, "core": True}}, "a core is added to a product that has a rank"),
    ({"up": {"bases": [2, 4], "residue": 3}}, "a residue is added to a product that has a rank"),
    ({"up": {"rank": 4, "activation": "tanh"}}, "an activation is that of mixed bases"),
    ({"up": {"rank": 4, "side": "in"}}, "a side is that of a basis"),
    ({"up": {"rank": 25}}, "matrices of 24 x 32 take a width from 1 to 24, not 25"),
    ({"up": {"rank": [4] * 7 + [0]}}, "take a width from 1 to 24, not 0"),
    ({"up": {"rank": [4] * 7}}, "7 ranks are given to 8 experts"),
    ({"up": {"basis": -1}}, "take a width from 1 to 32, not -1"),
    ({"up": {"bases": [9, 4]}}, "8 experts mix 1 to 8 bases, not 9"),
    ({"up": {"rank": 4, "residue": 33}}, "a row of 32 numbers has no 33 nonzeros"),
]


@pytest.mark.parametrize(("forms", "said"), WRONG, ids=[said for _, said in WRONG])
def test_what_means_nothing_is_one_sentence(forms, said, sources):
    skeleton = hf.skeleton(sources("mixtral").config, torch.float32)
    with pytest.raises(ValueError) as caught:
        check_edits(skeleton, [from_json({"edit": "factor_experts", "layer": 0, "forms": forms})])
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_layer_needs_experts_and_the_projection(sources):
    edit = FactorExperts(0, {"gate": Form(rank=4)})
    with pytest.raises(ValueError, match="the plan edits layer 0, which has no experts"):
        check_edits(hf.skeleton(sources("deepseek_v3").config, torch.float32), [edit])
    with pytest.raises(ValueError, match="its experts have no gate projection; they have up, down"):
        check_edits(hf.skeleton(sources("nemotron_h").config, torch.float32), [edit])


def test_a_changed_config_is_one_sentence(written, tmp_path):
    folder = tmp_path / "changed"
    shutil.copytree(written("mixtral", "mixed").folder, folder)
    values = json.loads((folder / "config.json").read_text())
    values["moe_compress"]["edits"][0]["forms"]["up"]["bases"] = [2, 500]
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="matrices of 24 x 32 take a width from 1 to 24, not 500"):
        open_checkpoint(folder)


# --- beside other edits -------------------------------------------------------------------------------------

WHOLE = "its experts are held in factors, and have to be whole matrices"
KEPT = (0, 2, 3, 5, 6, 7)


@pytest.mark.parametrize(
    "later",
    [
        MergeExperts(0, GROUPS, WEIGHTS, "centroid"),
        KeepChannels(0, 16),
        FactorExperts(0, {"up": Form(rank=4)}),
    ],
    ids=["merge", "channels", "factorise"],
)
def test_what_needs_whole_matrices_is_refused_behind_it(later, written):
    with pytest.raises(ValueError, match=WHOLE):
        check_edits(hf.skeleton(written("mixtral", "mixed").config, torch.float32), [later])


UNLIKE = [KeepChannels(0, 16, (8, 16) * 4), PackMatrices(0, {"mlp.experts.up": (4,) * 8}, {"mlp.experts.up": 32})]


@pytest.mark.parametrize("before", UNLIKE, ids=["widths", "packed"])
def test_experts_that_are_not_alike_are_refused(before, sources):
    skeleton = hf.skeleton(sources("mixtral").config, torch.float32)
    with pytest.raises(ValueError, match="its experts differ in width or are packed"):
        check_edits(skeleton, [before, FactorExperts(0, {"up": Form(rank=4)})])


@pytest.mark.parametrize("name", ["mixed", "ragged deltas", "sparse and low rank"])
def test_experts_are_dropped_before_and_behind_it(name, written, sources, tmp_path):
    """Behind: those that stay keep their factors and what all of them share."""
    checkpoint, layers = written("mixtral", name), range(tiny.LAYERS)
    fewer = write_edits(checkpoint, [KeepExperts(layer, KEPT) for layer in layers], tmp_path / "fewer")
    model, memory = load_model(fewer.folder, torch.float32), load_model(checkpoint.folder, torch.float32)
    for view, whole in zip(moe_views(model).values(), moe_views(memory).values(), strict=True):
        assert all(torch.equal(stack, whole.stacks()[part][list(KEPT)]) for part, stack in view.stacks().items())
        assert view.widths == [tiny.INNER] * len(KEPT) and view.unfused and view.factored
    assert logits_of(model).isfinite().all()
    dropped = write_edits(sources("mixtral"), [KeepExperts(layer, KEPT) for layer in layers], tmp_path / "dropped")
    forms = MIXED if name == "mixed" else Form(rank=4)
    again, _ = write(dropped, forms, tmp_path / "again")
    assert logits_of(load_model(again.folder, torch.float32)).isfinite().all()
    assert again.values["num_local_experts"] == len(KEPT)


def test_a_layer_is_dropped_behind_it(written, tmp_path):
    dropped = write_edits(written("mixtral", "mixed"), [DropLayer(0)], tmp_path / "dropped")
    assert logits_of(load_model(dropped.folder, torch.float32)).isfinite().all()


def test_single_layers_and_projections_are_factored_and_the_others_stay(sources, tmp_path):
    source = sources("deepseek_v3")
    checkpoint, edits = write(source, {"down": Form(rank=4)}, tmp_path / "one", layers=[2])
    assert [edit.layer for edit in edits] == [2]
    views, before = (moe_views(model) for model in (load_model(checkpoint.folder, torch.float32), original(source)))
    assert not views[1].unfused and views[2].factored
    for part in ("gate", "up"):
        assert torch.equal(views[2].stacks()[part], before[2].stacks()[part])
        assert torch.equal(getattr(views[2].expert(3), part), getattr(before[2].expert(3), part))
    assert views[2].expert(3).down.shape == (tiny.HIDDEN, tiny.INNER)


def test_half_precision_is_stored_as_it_is(sources, tmp_path):
    """What the source stores in 16 bits, factors do, and what goes on is what they say."""
    source = open_checkpoint(tiny.save(tiny.make("deepseek_v3"), tmp_path / "half", torch.bfloat16))
    checkpoint, _ = write(source, MIXED, tmp_path / "out")
    with checkpoint.read(checkpoint.tensors) as tensors:
        kinds = {
            name: tensors[name].get_dtype() for name in tensors if ".separate." in name or ".shared_parts." in name
        }
    assert set(kinds.values()) == {"BF16"}
    assert logits_of(load_model(checkpoint.folder, torch.float32)).isfinite().all()
