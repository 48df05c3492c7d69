"""Checkpoints of `factorise`: what is stored is what was found, as large as it was asked to be."""

from __future__ import annotations

import pytest
import torch
import yaml

import moe_compress
from moe_compress.checkpoints.folder import STATISTICS
from moe_compress.checkpoints.reader import open_checkpoint
from moe_compress.edits.edits import FactorExperts, from_json
from moe_compress.methods.factorisation.sizes import Size
from moe_compress.methods.factorisation.solve import solve
from moe_compress.models import hf
from moe_compress.models.modeling.unfused_experts import CHILDREN
from moe_compress.models.moe import moe_views
from support import naive_factors as slow
from support import tiny
from support.editing import logits_of
from support.factorised import STRUCTURES, numbers_of, runs
from support.pruned import report, rows, stored
from support.slow import DIFFERENT, slow_after, slow_families, slow_unless

EVERY = (*STRUCTURES, "auto")
# The first structures on one family, every other family in one of them.
FEW = {(DIFFERENT[n % 4], structure) for n, structure in enumerate(EVERY)}


@pytest.fixture(scope="module")
def run(lab, tmp_path_factory):
    """See `runs`."""
    return runs(lab, tmp_path_factory.mktemp("factorised"))


def edits_of(folder):
    return [from_json(edit) for edit in open_checkpoint(folder).values["moe_compress"]["edits"]]


def same(module, value):
    assert torch.equal(module.weight, value.to(module.weight).view_as(module.weight))


@pytest.mark.parametrize(("family", "structure"), slow_unless(lambda f, s: (f, s) in FEW, tiny.EDITABLE, EVERY))
def test_a_checkpoint_holds_the_factors_that_were_found(family, structure, run):
    folder, seen = run(family, f"factorise structure={structure}")
    model = moe_compress.load(folder, torch.float32)
    views = moe_views(model)
    assert views.keys() == seen.keys()
    for index, layer in seen.items():
        experts = views[index].experts
        for part, factors in layer.factors.items():
            for e, expert in enumerate(experts.separate):
                matrix = expert[CHILDREN[part]]
                for module, values in ((matrix.left, factors.left), (matrix.right, factors.right)):
                    assert (module is None) == (not values)
                    if module is not None:
                        same(module, values[e])
                assert (matrix.residue is None) == (not factors.residue)
                if factors.residue:
                    assert torch.equal(matrix.residue.dense(), factors.residue[e].to(torch.float32))
                if factors.mix is not None:
                    same(matrix.mix, factors.mix[e])
                torch.testing.assert_close(matrix.dense(), factors.expert(e).float(), rtol=1e-4, atol=1e-5)
            shared = {"core": factors.core, "basis": factors.basis, "bases": factors.bases}
            held = dict(experts.shared_parts.items()).get(CHILDREN[part], {})
            assert set(held) == {kind for kind, value in shared.items() if value is not None}
            for kind, module in held.items():
                same(module, shared[kind])
    assert logits_of(model).isfinite().all()


@pytest.mark.parametrize(("family", "structure"), slow_unless(lambda f, s: (f, s) in FEW, tiny.EDITABLE, EVERY))
def test_it_is_as_large_as_its_edits_say(family, structure, run):
    """In the report, in compression_statistics.yaml and in the file; never more than the ratio's bytes."""
    folder, seen = run(family, f"factorise structure={structure}")
    edits, found, said = edits_of(folder), stored(folder), report(folder)["projections"]
    statistics = yaml.safe_load((folder / STATISTICS).read_text())
    assert [edit.layer for edit in edits] == [*map(int, said)] == [*statistics["layers"]]
    numbers = size = whole = 0
    for edit in edits:
        assert isinstance(edit, FactorExperts)
        layer, counted = statistics["layers"][edit.layer], 0
        for part, form in edit.forms.items():
            shape = tuple(seen[edit.layer].weights[part].shape)
            each = numbers_of(form, part, *shape)
            mask = shape[0] * shape[1] * shape[2] / 32 if form.residue else 0
            assert each + mask <= shape[0] * shape[1] * shape[2] / 2
            assert said[str(edit.layer)][part]["parameters"] == each
            assert layer["projections"][part]["total_params_compressed"] == each
            assert layer["projections"][part]["total_params_original"] == shape[0] * shape[1] * shape[2]
            counted += each
            whole += shape[0] * shape[1] * shape[2]
        assert layer["total_params_compressed"] == counted
        own = [t for name, t in found.items() if in_experts(name, edit.layer)]
        assert sum(t.numel() for t in own if t.is_floating_point()) == counted
        numbers, size = numbers + counted, size + sum(t.numel() * t.element_size() for t in own)
    assert statistics["total_params_compressed"] == numbers and statistics["total_params_original"] == whole
    assert statistics["total_compression_ratio"] == round(numbers / whole, 5) <= 0.5
    assert report(folder)["kept"] == pytest.approx(numbers / whole)
    assert statistics["total_memory_compressed_gb"] == round(size / 1e9, 9)
    assert statistics["total_memory_original_gb"] == round(4 * whole / 1e9, 9)


def in_experts(name: str, layer: int) -> bool:
    """Whether a tensor is a part of the factored experts of a layer, and no bias."""
    held = ".separate." in name or ".shared_parts." in name
    return held and hf.layer_of(name) == layer and not name.endswith(".bias")


@pytest.mark.parametrize("structure", slow_after(3, EVERY))
def test_the_report_says_what_was_lost(structure, run):
    """Errors over all experts, before and after the sweeps; of auto the least that was tried."""
    folder, seen = run("mixtral", f"factorise structure={structure}")
    found = report(folder)
    for index, layer in seen.items():
        for part, weight in layer.weights.items():
            said = found["projections"][str(index)][part]
            made = layer.factors[part].dense()
            assert said["plain"] == pytest.approx(
                float((weight - made).square().sum() / weight.square().sum()), rel=1e-4
            )
            wanted = slow.whitened(weight, made, layer.grams[part])
            assert said["whitened"] == pytest.approx(wanted, rel=1e-3)
            assert said["whitened"] <= said["whitened_at_first"] * (1 + 1e-9)
            assert ("tried" in said) == (structure == "auto")
            if structure == "auto":
                assert said["whitened"] == min(said["tried"].values()) == said["tried"][said["structure"]]
    parts = [said for layer in found["projections"].values() for said in layer.values()]
    assert found["whitened"] == pytest.approx(sum(said["whitened"] for said in parts) / len(parts))


@pytest.mark.parametrize("family", slow_families(("mixtral", "llama4_text", "deepseek_v3", "gpt_oss", "nemotron_h"), 1))
@pytest.mark.parametrize("structure", slow_after(2, STRUCTURES))
def test_factors_are_those_of_what_experts_multiply(family, structure, run, lab):
    """Of the first layer with experts, whose inputs nothing has changed: as near as factors of Grams by hand."""
    _, seen = run(family, f"factorise structure={structure} ratio=0.4")
    index = min(seen)
    for part, weight in seen[index].weights.items():
        grams = slow.grams(rows(family, lab(family))[index], part == "down", family, weight.shape[2])
        made = seen[index].factors[part]
        size = size_like(structure, made, part)
        expected, _ = solve(structure, weight, grams, size)
        ours, theirs = (slow.whitened(weight, each.dense(), grams) for each in (made, expected))
        assert ours == pytest.approx(theirs, rel=2e-2)


def size_like(structure, factors, part):
    """The size of factors that were found."""
    if structure == "shared_basis":
        return Size(rank=min(factors.basis.shape), side="out" if part == "down" else "in")
    if structure == "basis_mixture":
        return Size(rank=factors.bases.shape[1], bases=factors.bases.shape[0])
    if structure == "wrapper":
        return Size(rank=factors.left[0].shape[1] // 2)
    each = max((int((part != 0).sum(1).max()) for part in factors.residue), default=0)
    return Size(ranks=[left.shape[1] for left in factors.left], nonzeros=each)


@pytest.mark.parametrize("family", slow_families(("mixtral", "llama4_text", "deepseek_v3", "gpt_oss", "nemotron_h"), 2))
def test_low_ranks_lose_the_least_that_a_rank_can(family, run, lab):
    _, seen = run(family, "factorise structure=svd rank=6")
    index = min(seen)
    for part, weight in seen[index].weights.items():
        grams = slow.grams(rows(family, lab(family))[index], part == "down", family, weight.shape[2])
        for e, gram in enumerate(grams):
            if float(gram.trace()) > 0:
                least = slow.distance(weight[e] - slow.nearest(weight[e], gram, 6), gram)
                whole = slow.distance(weight[e], gram)
                found = slow.distance(weight[e] - seen[index].factors[part].expert(e), gram)
                assert least - 1e-6 * whole <= found <= least + 1e-4 * whole


def test_other_projections_stay_what_they_were(run, lab):
    folder, seen = run("gpt_oss", "factorise structure=base_delta projections=up,down")
    assert all(set(layer.factors) == {"up", "down"} for layer in seen.values())
    before = moe_compress.load(lab("gpt_oss")["model"], torch.float32)
    views = moe_views(moe_compress.load(folder, torch.float32))
    for index, view in moe_views(before).items():
        assert torch.equal(views[index].stacks()["gate"], view.stacks()["gate"])
    statistics = yaml.safe_load((folder / STATISTICS).read_text())
    whole = [layer["projections"]["gate"]["total_compression_ratio"] for layer in statistics["layers"].values()]
    assert whole == [1] * tiny.LAYERS and statistics["total_compression_ratio"] < 2 / 3
    assert report(folder)["kept"] <= 0.5
