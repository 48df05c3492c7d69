"""How many weights each expert loses: the best fractions, and as many zeros as if all were alike."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

import moe_compress
from moe_compress.checkpoints.reader import open_checkpoint
from moe_compress.compression.weights import sparsity_sensitivity
from moe_compress.compression.weights.stage_matrices import StageMatrices
from moe_compress.methods import sparsity_allocation
from moe_compress.recipes.parser import parse
from support import naive_pruning as slow
from support import readers, tiny
from support.pruned import PER_MATRIX, moe_layers, reference, report, rows, run_of, windows, zero_counts
from support.slow import slow_after


@pytest.mark.parametrize("seed", range(4))
def test_fractions_are_the_best_there_are(seed):
    generator = torch.Generator().manual_seed(seed)
    levels = (
        sparsity_allocation.levels(0.5, 0.3, 768)[3:6] if seed % 2 else sparsity_allocation.levels(0.5, 0.2, 40)[2:7]
    )
    table = {1: torch.rand(2, len(levels), generator=generator), 4: torch.rand(3, len(levels), generator=generator)}
    found = sparsity_allocation.choose(table, levels)
    assert list(found) == [1, 4] and [len(share) for share in found.values()] == [2, 3]
    costs = torch.cat(list(table.values())).tolist()
    best = min(
        sum(row[c] for row, c in zip(costs, chosen, strict=True))
        for chosen in itertools.product(range(len(levels)), repeat=5)
        if sum(chosen) == 5 * (len(levels) // 2)
    )
    taken = [levels.index(share) for share in torch.cat(list(found.values())).tolist()]
    assert sum(taken) == 5 * (len(levels) // 2)
    assert sum(row[c] for row, c in zip(costs, taken, strict=True)) == pytest.approx(best)


@pytest.mark.parametrize(("sparsity", "spread"), [(0.5, 0.1), (0.05, 0.3), (0.93, 0.2), (0.0, 0.1), (0.501, 0.499)])
def test_levels_are_whole_weights_apart(sparsity, spread):
    found = sparsity_allocation.levels(sparsity, spread, 768)
    counts = [share * 768 - sparsity * 768 for share in found]
    assert len(found) == sparsity_allocation.LEVELS and found[4] == sparsity
    assert all(abs(count - round(count)) < 1e-9 for count in counts)
    assert found[0] >= 0 and found[-1] <= 1 and found[-1] - found[0] <= 2 * spread + 1e-12
    assert len({round(b - a) for a, b in itertools.pairwise(counts)}) == 1


ALLOCATED = [("deepseek_v3", "utilisation"), ("gpt_oss", "sensitivity"), ("nemotron_h", "both"), ("mixtral", "owl")]
ALLOCATED += [("mixtral", allocate) for allocate in ("utilisation", "sensitivity", "both")]


@pytest.mark.parametrize(("family", "allocate"), slow_after(2, ALLOCATED))
def test_as_many_zeros_as_if_all_were_alike(family, allocate, lab, made):
    method = "sparsegpt" if family in ("mixtral", "gpt_oss") else "wanda"
    words = f"prune method={method} sparsity=0.43"
    folder, layers = made(family, f"{words} allocate={allocate} spread=0.3"), moe_layers(lab(family)["model"], family)
    counts = zero_counts(folder, family, layers)
    even = zero_counts(made(family, words), family, layers)
    assert len(set(even.flatten().tolist())) == 1
    said = torch.tensor([report(folder)["allocated"][str(layer)] for layer in layers])
    assert torch.equal(counts, (said.double() * PER_MATRIX + 0.5).long().unsqueeze(2).expand_as(counts))
    assert int(counts.sum()) == int(even.sum())
    assert allocate == "owl" or len(set(said.flatten().tolist())) > 1


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_what_is_used_less_loses_more(method, lab, made):
    folder = made("mixtral", f"prune method={method} allocate=utilisation spread=0.3 propagate=original")
    said = report(folder)["allocated"]
    pairs = sorted(
        (len(one.gates), -share)
        for layer, experts in rows("mixtral", lab("mixtral")).items()
        for one, share in zip(experts, said[str(layer)], strict=True)
    )
    lost = [-share for _, share in pairs]
    assert all(b <= a + 1e-9 for a, b in itertools.pairwise(lost)) and lost[0] > lost[-1]


@pytest.mark.parametrize("allocate", slow_after(2, ["sensitivity", "both", "owl"]))
def test_what_matters_more_loses_less(allocate, lab, tmp_path):
    """An expert with large outputs, or (for OWL) with a few weights that stick out."""
    model = tiny.make("mixtral", vocab_size=readers.VOCAB)
    with torch.no_grad():
        experts = model.model.layers[1].mlp.experts
        if allocate == "owl":
            experts.down_proj[5, ::2, ::2] *= 30
        else:
            experts.down_proj[5] *= 8
    folder = tiny.save(model, tmp_path / "model")
    readers.tokenizer().save_pretrained(folder)
    options = {**lab("mixtral"), "model": str(folder), "out": str(tmp_path / "out")}
    said = report(moe_compress.compress(f"prune allocate={allocate} spread=0.2", **options).folder)["allocated"]
    everyone = [share for layer in said.values() for share in layer]
    assert said["1"][5] == min(everyone) < 0.5 < max(everyone) <= 0.7


@pytest.mark.parametrize("family", slow_after(1, ["deepseek_v3", "llama4_text", "mixtral", "gpt_oss", "nemotron_h"]))
def test_sensitivity_is_what_the_experts_would_add_differently(family, lab, monkeypatch):
    """Squared change of an expert's contributions, a token, over the energy of the stream."""
    tables: dict[int, Tensor] = {}
    choose = sparsity_allocation.choose

    def seen(costs: Mapping[int, Tensor], levels: list[float]) -> dict[int, Tensor]:
        tables.update(costs)
        return choose(costs, levels)

    monkeypatch.setattr(sparsity_allocation, "choose", seen)
    options, level = lab(family), 4
    stage = parse("prune allocate=sensitivity", (), options).stages[0]
    run, source = run_of(options), open_checkpoint(Path(str(options["model"])))
    matrices = StageMatrices(stage, run.layers(source).model)
    sparsity_sensitivity.expert_sparsities(stage, matrices, source, run)
    model, found = reference(options["model"]), windows(options)
    energy = {i: e for i, (_, e) in slow.entering(model, family, found.ids_NS).items()}
    for layer, experts in rows(family, options).items():
        whole = copy.deepcopy(slow.block_of(model, family, layer).experts)
        less = copy.deepcopy(whole)
        for e, one in enumerate(experts):
            if not one.gates:
                continue
            old = slow.naive.expert(family, model.config, less, e).matrices
            for n, matrix in enumerate(old):
                gone = slow.wanda(matrix, one.source(down=n == len(old) - 1), 0.5)
                with torch.no_grad():
                    matrix.masked_fill_(gone, 0)
            before, after = (slow.naive.expert(family, model.config, m, e).run for m in (whole, less))
            on_input = family == "llama4_text"
            with torch.no_grad():
                change = sum(
                    float(((after(x) - before(x)) * (1 if on_input else gate)).square().sum())
                    for x, gate in zip(one.inputs, one.gates, strict=True)
                )
            expected = change / len(one.gates) / energy[layer]
            assert float(tables[layer][e, level]) == pytest.approx(expected, rel=0.02), (layer, e)
