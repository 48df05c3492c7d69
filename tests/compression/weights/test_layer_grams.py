"""What experts multiply, summed up layer by layer, against loops over tokens in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import moe_compress
from moe_compress.checkpoints.reader import open_checkpoint
from moe_compress.compression.weights.layer_grams import GramCollector
from moe_compress.engine.forward import walk_layers
from moe_compress.methods.stage_options import WeightStageOptions
from moe_compress.models.families import family_of
from moe_compress.models.matrices import INNER, ROUTED
from moe_compress.models.moe import learned_view
from support import naive_factors as slow
from support import readers, tiny
from support.pruned import report, rows, run_of
from support.slow import slow_families

WORDS = {"where": "experts", "spare": "", "propagate": "compressed", "unseen": "plain", "shrink": 0.0}
WORDS |= {"min_tokens": 1, "allocate": "uniform", "spread": 0.0, "experts_at_once": 0}
# Behind those of several streams, the slow way tells no token apart.
FAMILIES = [family for family in tiny.EDITABLE if family not in ("deepseek_v4", "hy_v4")]
WIDTHS = {ROUTED: tiny.HIDDEN, INNER: tiny.INNER}


def collected(options, scratch: Path, *, pools: bool = False, **words):
    """Layer -> source -> (the Gram matrix of every expert, tokens, what is reported)."""
    run, source = run_of(options), open_checkpoint(Path(str(options["model"])))
    layers, family, given = run.layers(source), family_of(source.config), WeightStageOptions(**{**WORDS, **words})
    collector, found = GramCollector(family, given, pools, scratch, tiny.CPU, torch.float32), {}

    def visit(index, layer, go):
        view = learned_view(layer, family)
        if view is None:
            go([], True)
            return
        collector.collect(view, go, True)
        found[index] = {
            source: torch.stack([grams[e] for e in range(len(grams))]) for source, grams in collector.found.items()
        }
        found[index]["counts"] = collector.counts
        collector.release()

    walk_layers(layers, run.windows("calibration", source), visit)
    assert not list(scratch.iterdir())
    return found


def expected(family, options, layer: int, source: str) -> torch.Tensor:
    return slow.grams(rows(family, options)[layer], source == INNER, family, WIDTHS[source])


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("family", slow_families(FAMILIES, 4))
def test_every_expert_s_tokens_count_as_much_as_their_gates(family, lab, tmp_path):
    options = lab(family)
    found = collected(options, tmp_path)
    assert found.keys() == rows(family, options).keys()
    for layer, sums in found.items():
        assert sums["counts"]["tokens"] == [len(each.gates) for each in rows(family, options)[layer]]
        for source in WIDTHS:
            close(sums[source], expected(family, options, layer, source))


@pytest.mark.parametrize("pools", [False, True])
def test_experts_in_turns_have_the_same_sums(pools, lab, tmp_path):
    """And leave nothing in the folder in which they lay meanwhile."""
    (tmp_path / "turns").mkdir(), (tmp_path / "once").mkdir()
    turns = collected(lab("mixtral"), tmp_path / "turns", pools=pools, experts_at_once=3)
    once = collected(lab("mixtral"), tmp_path / "once", pools=pools)
    for layer, sums in once.items():
        assert turns[layer]["counts"] == sums["counts"]
        for source in WIDTHS:
            close(turns[layer][source], sums[source].double())


@pytest.mark.parametrize("family", slow_families(("mixtral", "llama4_text"), 1))
def test_a_pooled_matrix_has_each_expert_s_own_diagonal(family, lab, tmp_path):
    options = lab(family)
    for layer, sums in collected(options, tmp_path, pools=True).items():
        for source in WIDTHS:
            own = expected(family, options, layer, source)
            pool = own.sum(0)
            size = pool.diagonal().sqrt()
            for e, gram in enumerate(own):
                mine = gram.diagonal().sqrt()
                wanted = pool / torch.outer(size, size).clamp(min=1e-30) * torch.outer(mine, mine)
                close(sums[source][e], wanted)


def test_rare_experts_lean_on_all_others(lab, tmp_path):
    """H = n / (n + s) (S_e + s S / n_all), n tokens of an expert."""
    options = lab("mixtral")
    for layer, sums in collected(options, tmp_path, shrink=8.0, unseen="pooled").items():
        counts = [len(each.gates) for each in rows("mixtral", options)[layer]]
        for source in WIDTHS:
            own = expected("mixtral", options, layer, source)
            mean = own.sum(0) / sum(counts)
            for e, count in enumerate(counts):
                close(sums[source][e], (own[e] + 8 * mean) * (count / (count + 8)) if count else mean)


@pytest.mark.parametrize("unseen", ["pooled", "plain"])
def test_experts_with_too_few_tokens(unseen, lab, tmp_path):
    options, least = lab("mixtral"), 30
    few = 0
    for layer, sums in collected(options, tmp_path, unseen=unseen, min_tokens=least).items():
        counts = [len(each.gates) for each in rows("mixtral", options)[layer]]
        rare = [e for e, count in enumerate(counts) if count < least]
        assert sums["counts"] == {"tokens": counts, "unseen": rare}
        few += len(rare)
        own = expected("mixtral", options, layer, ROUTED)
        for e in range(tiny.EXPERTS):
            instead = own.sum(0) / sum(counts) * max(counts[e], 1) if unseen == "pooled" else torch.zeros_like(own[e])
            close(sums[ROUTED][e], instead if e in rare else own[e])
    assert 0 < few < tiny.EXPERTS * tiny.LAYERS


@pytest.mark.parametrize("unseen", ["pooled", "plain", "error"])
def test_an_expert_that_no_token_reaches(unseen, options, tmp_path):
    words = {**options, "eval": False, "model": str(readers.save_lonely(tmp_path / "lonely", 5))}
    sentence = f"factorise structure=svd unseen={unseen}"
    if unseen == "error":
        with pytest.raises(ValueError, match="experts 5 of layer 0: fewer than 1 tokens of the calibration text"):
            moe_compress.compress(sentence, **words)
        return
    folder = moe_compress.compress(sentence, **words).folder
    found = report(folder)
    assert found["unseen"] == {"0": [5]} and found["tokens"]["0"][5] == 0
    assert 0 < found["whitened"] < found["plain"] < 1
