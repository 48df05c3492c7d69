"""Linear maps of shared experts in low ranks, beside routed experts and alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

import moe_compress
from moe_compress.calibration.input_moments import InputMomentCollector
from moe_compress.checkpoints.folder import STATISTICS
from moe_compress.checkpoints.load import load_model
from moe_compress.checkpoints.reader import open_checkpoint
from moe_compress.edits import checks
from moe_compress.edits.edits import FactorExperts, from_json
from moe_compress.engine import forward
from moe_compress.engine.forward import walk_layers
from moe_compress.evaluation.verification.verify import verification
from moe_compress.methods.factorisation.sizes import Size
from moe_compress.methods.factorisation.solve import solve
from moe_compress.models import hf
from moe_compress.models.families import family_of
from moe_compress.models.matrices import layer_matrices
from moe_compress.models.modeling.factored_experts import FactoredLinear
from moe_compress.models.modeling.packed_linear import PackedMatrix
from moe_compress.models.moe import moe_views
from moe_compress.models.sizes import sizes
from support import tiny
from support.editing import greedy, logits_of
from support.interrupted import Interrupted, counting, leftovers, outcome
from support.pruned import refused, report, run_of, stored
from support.slow import slow_after, slow_unless

SHARED = (
    *("deepseek_v3", "qwen2_moe", "granitemoeshared", "llama4_text", "nemotron_h", "hunyuan_v1_moe", "ernie4_5_moe"),
    *("deepseek_v2", "qwen3_next", "glm4_moe", "dots1", "afmoe", "exaone_moe", "glm_moe_dsa", "hy_v4"),
    "deepseek_v4",
)
ROUNDED = "quantize method=rtn bits=4 group_size=8 clip=max format=packed where=experts,shared"
BOTH, ALONE = "factorise where=experts,shared ratio=0.6", "factorise where=shared ratio=0.6"


def pairs_of(model):
    """(layer, name) -> the pair of maps that stands for one."""
    layers = enumerate(hf.decoder_layers(model))
    return {(i, n): m for i, layer in layers for n, m in layer.named_modules() if isinstance(m, FactoredLinear)}


def edits_of(folder):
    return [from_json(edit) for edit in open_checkpoint(folder).values["moe_compress"]["edits"]]


@pytest.mark.parametrize(
    ("family", "sentence"),
    slow_unless(lambda f, s: (f, s) in {("deepseek_v3", BOTH), ("qwen2_moe", ALONE)}, SHARED, (BOTH, ALONE)),
)
def test_shared_experts_are_held_in_low_ranks(family, sentence, made, lab):
    """What is loaded is what is stored, as much of it as the ratio says; whatever else there is stays."""
    folder = made(family, sentence)
    model, before = moe_compress.load(folder, torch.float32), moe_compress.load(lab(family)["model"], torch.float32)
    pairs, views = pairs_of(model), moe_views(model)
    edits = edits_of(folder)
    assert pairs and {(edit.layer, name) for edit in edits for name in edit.linears} == pairs.keys()
    assert all(view.factored == (sentence == BOTH) for view in views.values())
    for edit in edits:
        assert isinstance(edit, FactorExperts)
        old = {
            m.name: m.weight_BOI[0]
            for m in layer_matrices(hf.decoder_layers(before)[edit.layer], family_of(before.config), ["shared"])
        }
        assert old.keys() == edit.linears.keys()
        for name, rank in edit.linears.items():
            pair, said = pairs[edit.layer, name], report(folder)["projections"][str(edit.layer)][name]
            outputs, inputs = old[name].shape
            assert rank == int(0.6 * outputs * inputs + 1e-6) // (outputs + inputs) == pair.right.out_features
            assert said["parameters"] == rank * (outputs + inputs) and said["parameters_before"] == outputs * inputs
            error = float((pair.dense() - old[name]).square().sum() / old[name].square().sum())
            assert said["plain"] == pytest.approx(error, rel=1e-3) and said["whitened"] <= said["plain"]
    stock = load_model(folder, torch.float32)
    torch.testing.assert_close(logits_of(stock), logits_of(model), rtol=1e-4, atol=1e-4)
    if family != "qwen3_next":  # whose tiny model has no attention that a cache could count by
        ids = tiny.token_ids(1, 8)
        made = model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
        assert torch.equal(made, greedy(model, ids, 3))


@pytest.mark.parametrize("family", slow_after(1, SHARED))
def test_counts_are_those_of_the_file(family, made):
    folder = made(family, BOTH)
    checkpoint = open_checkpoint(folder)
    assert sizes(hf.skeleton(checkpoint.config, torch.float32), 16, torch.float32).bytes == checkpoint.bytes
    found = yaml.safe_load((folder / STATISTICS).read_text())
    held = {name: t for name, t in stored(folder).items() if not name.endswith(".bias")}
    routed = sum(t.numel() for name, t in held.items() if ".separate." in name or ".shared_parts." in name)
    pairs = {name: t for name, t in held.items() if name.endswith((".left.weight", ".right.weight"))}
    own = sum(t.numel() for name, t in pairs.items() if ".separate." not in name)
    assert own > 0 and found["total_params_compressed"] == own + routed
    assert found["total_params_compressed"] <= 0.6 * found["total_params_original"]


@pytest.mark.parametrize("family", slow_after(1, SHARED))
def test_an_export_joins_them(family, made, tmp_path):
    for number, sentence in enumerate((BOTH, ALONE)):
        folder = made(family, sentence)
        plain = open_checkpoint(moe_compress.export(folder, tmp_path / str(number)))
        assert "moe_compress" not in plain.values
        model, stock = load_model(folder, torch.float32), load_model(plain.folder, torch.float32)
        torch.testing.assert_close(logits_of(stock), logits_of(model), rtol=1e-3, atol=2e-4)


def test_each_is_the_best_of_its_rank_as_its_inputs_see_it(made, lab):
    options = lab("deepseek_v3")
    run, source = run_of(options), open_checkpoint(Path(str(options["model"])))
    layers, family = run.layers(source), family_of(source.config)
    pairs = pairs_of(moe_compress.load(made("deepseek_v3", ALONE), torch.float32))
    first = min(index for index, _ in pairs)

    def visit(index, layer, go):
        observer = InputMomentCollector(family, ["shared"], "input_grams", None)
        go([observer], True)
        for matrix in layer_matrices(layer, family, ["shared"]) if index == first else []:
            pair, gram = pairs[index, matrix.name], observer.found[matrix.source].total
            best, _ = solve("svd", matrix.weight_BOI, gram, Size(ranks=[pair.right.out_features]))
            torch.testing.assert_close(pair.dense(), best.expert(0), rtol=1e-3, atol=1e-4)

    walk_layers(layers, run.windows("calibration", source), visit)


@pytest.mark.parametrize(
    ("family", "sentence"),
    slow_after(
        1,
        [
            ("deepseek_v3", f"factorise where=experts,shared rank=8 + {ROUNDED}"),
            ("deepseek_v3", "factorise where=experts,shared rank=8 + activations where=all"),
            ("deepseek_v3", "factorise where=shared rank=1 objective=plain"),
            ("deepseek_v3", "factorise where=shared + factorise where=experts structure=svd"),
            ("deepseek_v3", "factorise structure=svd + factorise where=shared"),
            ("qwen2_moe", "factorise where=shared + expert_drop ratio=0.25"),
            ("qwen2_moe", "factorise where=experts,shared align=true grams=pooled"),
            ("qwen2_moe", "factorise where=experts,shared experts_at_once=3"),
            ("qwen2_moe", "factorise where=experts,shared structure=svd budget=global propagate=original"),
            ("qwen2_moe", "factorise where=experts,shared structure=auto objective=anchored"),
            ("granitemoeshared", "factorise where=shared + prune where=attention"),
        ],
    ),
)  # fmt: skip
def test_other_words_and_stages(family, sentence, made):
    folder = made(family, sentence)
    model = moe_compress.load(folder, torch.float32)
    assert pairs_of(model) and logits_of(model).isfinite().all()
    if "quantize" in sentence:
        assert all(isinstance(pair.left, PackedMatrix) for pair in pairs_of(model).values())
    assert verification(open_checkpoint(folder)).passed


def test_a_narrower_stream_stores_the_same_exactly(lab, tmp_path):
    words = {**lab("deepseek_v3"), "dtype": "bfloat16", "out": str(tmp_path / "out")}
    folder = moe_compress.compress(ALONE, **words).folder
    old, new = stored(lab("deepseek_v3")["model"]), stored(folder)
    assert all(torch.equal(new[name], tensor) for name, tensor in old.items() if name in new)
    assert len(set(old) - set(new)) == len(pairs_of(moe_compress.load(folder, torch.float32)))


@pytest.mark.parametrize(
    ("sentence", "said"),
    [
        ("factorise where=shared rank=25", "structure=svd of matrices 24 x 32: rank=25 is not in 1..24."),
        ("factorise where=shared ratio=0.05", "structure=svd keeps at least 0.0730 of 1 experts (rank 1)"),
        (
            "factorise where=shared + factorise where=shared",
            "shared experts are held in factors already: use where=experts.",
        ),
        (
            "factorise where=shared structure=svd budget=global",
            "budget=global is for routed experts alone: where=shared names none of them.",
        ),
        ("factorise where=all", "where=all: factors are made of experts alone (where=experts, shared or both)."),
    ],
)
def test_what_cannot_be(sentence, said, lab, tmp_path):
    assert said in refused(sentence, lab("deepseek_v3"), tmp_path)


def test_shared_experts_that_cannot_be_told_apart(lab, tmp_path):
    """Routed and shared ones are stored in the same tensors."""
    assert "has no such part that can be told apart" in refused(ALONE, lab("inkling_text"), tmp_path)


def test_matrices_that_are_joined_while_they_are_read(sources):
    model = hf.skeleton(sources("deepseek_v3").config, torch.float32)
    edit = FactorExperts(1, linears={"mlp.shared_experts.up_proj": 4})
    edit.check(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "family_of", lambda config: replace(family_of(config), joins_shared=True))
        with pytest.raises(ValueError, match="transformers joins matrices of shared experts while it reads them"):
            edit.check(model)


@pytest.mark.parametrize(
    ("linears", "said"),
    [
        ({"mlp.shared_experts.side_proj": 4}, "layer 1: mlp.shared_experts.side_proj is no linear map"),
        ({"mlp.shared_experts.up_proj": 25}, "layer 1: mlp.shared_experts.up_proj takes a rank from 1 to 24, not 25."),
        ({"mlp.shared_experts.up_proj": 0}, "layer 1: mlp.shared_experts.up_proj takes a rank from 1 to 24, not 0."),
    ],
)
def test_edits_of_maps_that_are_not_there(linears, said, sources):
    with pytest.raises(ValueError, match=said):
        FactorExperts(1, linears=linears).check(hf.skeleton(sources("deepseek_v3").config, torch.float32))


@pytest.mark.parametrize(("sentence", "kept"), slow_after(1, [(ALONE, ".experts."), ("factorise", ".shared_experts.")]))
def test_what_is_packed_and_does_not_change_stays_packed(sentence, kept, lab, tmp_path):
    packed = "quantize method=rtn bits=8 group_size=8 clip=max where=experts,shared,attention format=compressed-tensors"
    words = lab("deepseek_v3")
    source = moe_compress.compress(packed, **{**words, "out": str(tmp_path / "packed")}).folder
    folder = moe_compress.compress(sentence, **{**words, "model": str(source), "out": str(tmp_path / "out")}).folder
    before, after = stored(source), stored(folder)
    same = [name for name in before if kept in name or ".self_attn." in name]
    assert any("packed" in name for name in same) and all(torch.equal(before[name], after[name]) for name in same)
    model = moe_compress.load(folder, torch.float32)
    assert bool(pairs_of(model)) == (sentence == ALONE) and logits_of(model).isfinite().all()
    assert not verification(open_checkpoint(folder)).problems


@pytest.mark.parametrize("call", slow_after(1, [4, 1, 6]))
def test_a_stopped_run_goes_on(call, made, lab, monkeypatch, tmp_path):
    options = {**lab("deepseek_v3"), "results": str(tmp_path), "out": str(tmp_path / "out")}
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        counting(patch, forward.hf, "run_layer", stop_at=call)
        moe_compress.compress(BOTH, **options)
    folder = moe_compress.compress(BOTH, **options).folder
    assert outcome(folder) == outcome(made("deepseek_v3", BOTH)) and leftovers(tmp_path) == []
