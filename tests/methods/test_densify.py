"""densify as a pure function: which experts, which gates, how wide; and words that mean nothing."""

from __future__ import annotations

import pytest
import torch

from moe_compress.calibration.artefact import calibrate
from moe_compress.calibration.collect import observed
from moe_compress.edits.edits import MakeDense
from moe_compress.engine.layers import StreamedLayers
from moe_compress.methods import registry
from moe_compress.methods.score_registry import scores
from moe_compress.models import hf
from moe_compress.models.families import FAMILIES
from moe_compress.recipes.parser import parse
from support import tiny
from support.tiny import CPU, windows_of
from support.trimming import planned

REFUSED = tuple(name for name in tiny.EDITABLE if not FAMILIES[name].dense_as)


@pytest.fixture(scope="module")
def seen(sources, tmp_path_factory):
    """family -> what a method is given of it, with output samples."""
    place, found = tmp_path_factory.mktemp("seen"), {}

    def of(family):
        if family not in found:
            checkpoint, windows = sources(family), windows_of(tiny.token_ids(8, 16, seed=2))
            layers = StreamedLayers(checkpoint, CPU, torch.float32)
            file = place / f"{family}.safetensors"
            sums = calibrate(checkpoint, layers, windows, file, "", None, output_samples=True)
            found[family] = observed(checkpoint, sums, {})
        return found[family]

    return of


@pytest.mark.parametrize("scale", ["mean", "share", "uniform"])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "qwen2_moe"])
def test_gates_are_what_the_router_gave(family, scale, seen):
    model = seen(family)
    plan = planned(model, f"densify keep=3 scale={scale}")
    by_layer = {edit.layer: edit for edit in plan.edits}
    for layer in model.layers:
        edit, mean_E = by_layer[layer.shape.layer], layer.sums["gate"] / layer.sums["tokens"]
        total = float(layer.sums["total"] / layer.sums["tokens"])
        assert float(mean_E.sum()) == pytest.approx(total)
        score_E = scores()["reap"].of(layer, 0)
        assert edit.experts == tuple(sorted(score_E.topk(3).indices.tolist()))
        kept_K = mean_E[list(edit.experts)]
        expected = {"mean": kept_K, "share": kept_K / kept_K.sum() * total, "uniform": torch.full((3,), total / 3)}
        assert edit.gates == pytest.approx(expected[scale].tolist())
        assert edit.shared == pytest.approx(_sigmoid_gate(layer)) and edit.width == plan.report["width"]
        assert plan.report["gates"][edit.layer] == pytest.approx({"kept": float(kept_K.sum()), "of": total})


def _sigmoid_gate(layer):
    gate = layer.sums.get("shared_gate")
    return 1.0 if gate is None else float(gate / layer.sums["tokens"])


def test_the_gate_of_shared_experts_is_the_mean_of_its_sigmoid(sources, seen):
    checkpoint, ids, heard = sources("qwen2_moe"), tiny.token_ids(8, 16, seed=2), {}
    model = tiny.make("qwen2_moe")
    for index, layer in enumerate(model.model.layers):
        layer.mlp.shared_expert_gate.register_forward_hook(
            lambda _m, _a, output, index=index: heard.update({index: float(output.sigmoid().mean())})
        )
    with torch.no_grad():
        model(ids)
    assert checkpoint.num_layers == len(heard)
    assert {
        each.shape.layer: pytest.approx(_sigmoid_gate(each), abs=1e-6) for each in seen("qwen2_moe").layers
    } == heard


@pytest.mark.parametrize("words", ["score=naee", "score=ranked_choice", "score=aimer", "score=random", "keep=all"])
def test_any_score_chooses(words, seen):
    plan = planned(seen("mixtral"), f"densify {words}")
    count = tiny.EXPERTS if words == "keep=all" else tiny.TOP_K
    assert [len(edit.experts) for edit in plan.edits] == [count] * tiny.LAYERS
    assert (words == "score=naee") == (not plan.scores)


def test_the_check_counts_as_the_plan_does(sources, seen):
    for family in ("deepseek_v3", "qwen2_moe", "granitemoeshared"):
        model = seen(family)
        parameters = registry.find("densify").bind({"keep": "1"})
        rough = registry.find("densify").check(model.shape, **parameters).edits
        exact = registry.find("densify").run(model, **parameters).edits
        assert [(e.layer, len(e.experts), e.width) for e in rough] == [
            (e.layer, len(e.experts), e.width) for e in exact
        ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("keep=0", "densify.keep=0: a whole number from 1 up, top_k or all is needed"),
        ("keep=2.5", "densify.keep=2.5: a whole number from 1 up, top_k or all is needed"),
        ("keep=topk", "densify.keep=topk: a whole number from 1 up, top_k or all is needed"),
        ("score=repa", "did you mean 'reap'"),
        ("scale=sum", "allowed: mean, share, uniform"),
        ("ratio=0.5", "unknown key 'ratio'"),
    ],
)
def test_words_that_mean_nothing(words, said):
    with pytest.raises(ValueError, match=said):
        parse(f"densify {words}")


def test_more_than_there_are(seen):
    with pytest.raises(ValueError, match="layer 0 has 8 experts, so keep=9 is not possible"):
        planned(seen("mixtral"), "densify keep=9")


@pytest.mark.parametrize("family", REFUSED)
def test_families_without_a_dense_architecture_are_refused(family, sources):
    skeleton = hf.skeleton(sources(family).config, torch.float32)
    with pytest.raises(ValueError, match=f"{family} cannot be made dense: no architecture of transformers"):
        MakeDense(0, (0,), (1.0,), 64).check(skeleton)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (MakeDense(9, (0,), (1.0,), 24), "there are layers 0 to 2"),
        (MakeDense(1, (0, 1), (1.0,), 72), "each of its 2 experts needs a gate"),
        (MakeDense(1, (0,), (float("inf"),), 72), "needs a gate, a finite number"),
        (MakeDense(1, (), (), 72), "name those that it is made dense of"),
        (MakeDense(1, (1, 0), (1.0, 1.0), 72), "ascending ids below 8"),
        (MakeDense(1, (0, 1), (1.0, 1.0), 71), "72 neurons do not fit into an MLP of width=71"),
        (MakeDense(0, (0,), (1.0,), 72), "and it has none"),
        (MakeDense(0, (), (), 47), "48 neurons do not fit"),
    ],
)
def test_edits_that_cannot_be(edit, said, sources):
    with pytest.raises(ValueError, match=said):
        edit.check(hf.skeleton(sources("deepseek_v3").config, torch.float32))
