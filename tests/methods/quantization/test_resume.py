"""Quantization that is stopped or made in parts, and experts that see too little."""

from __future__ import annotations

import pytest
import torch

import moe_compress
from moe_compress.checkpoints import writer
from moe_compress.engine import forward
from moe_compress.models.moe import moe_views
from support import naive_pruning, readers, tiny
from support.interrupted import Interrupted, counting, leftovers, outcome
from support.pruned import refused, report, stock
from support.quantized import FEW, Options, ours, packed_in, require_rounded
from support.slow import slow_after

pytestmark = pytest.mark.filterwarnings("ignore:packed weights are made dense")


@pytest.mark.parametrize(
    ("family", "place", "function", "number", "left"),
    slow_after(
        1,
        [
            ("mixtral", forward.hf, "run_layer", 3, 2),
            ("mixtral", writer, "write_shard", 2, 2),
            ("gpt_oss", writer, "write_shard", 3, 1),
        ],
    ),
)
def test_a_stopped_run_goes_on(family, place, function, number, left, wide_lab, wide_made, monkeypatch, tmp_path):
    options = {**wide_lab(family), "results": str(tmp_path), "out": str(tmp_path / "out")}
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        counting(patch, place, function, stop_at=number)
        moe_compress.compress(f"{FEW} bits=3", **options)
    with monkeypatch.context() as patch:
        layers, written = counting(patch, forward.hf, "run_layer"), counting(patch, writer, "write_shard")
        folder = moe_compress.compress(f"{FEW} bits=3", **options).folder
    assert len(layers) == 2 * left and len(written) == left
    assert outcome(folder) == outcome(wide_made(family, f"{FEW} bits=3")) and leftovers(tmp_path) == []


AT_ONCE = [("mixtral", "propagate=original"), ("deepseek_v3", "where=all act_order=true unseen=pooled shrink=8")]


@pytest.mark.parametrize(("family", "words"), slow_after(1, AT_ONCE))
def test_a_few_experts_at_a_time_or_all_at_once(family, words, wide_made):
    folder, other = wide_made(family, f"{FEW} {words}"), wide_made(family, f"{FEW} {words} experts_at_once=3")
    one, parts = (torch.cat([m.codes().flatten() for m in packed_in(ours(f)).values()]) for f in (folder, other))
    assert float((one == parts).double().mean()) > 0.995
    first, second = report(folder), report(other)
    assert all(first[key] == second[key] for key in ("tokens", "unseen", "quantized", "bits", "damping_raised"))


LONELY = 3


@pytest.fixture(scope="session")
def lonely(wide_lab, tmp_path_factory) -> Options:
    """Options for a model whose expert LONELY of layer 0 is never chosen."""
    folder = readers.save_lonely(tmp_path_factory.mktemp("lonely") / "model", LONELY)
    return {**wide_lab("gpt_oss"), "model": str(folder)}


@pytest.mark.parametrize("policy", slow_after(1, ["rtn", "pooled"]))
def test_an_expert_without_tokens(policy, lonely, tmp_path):
    words = f"quantize group_size=8 min_tokens=1 propagate=original unseen={policy}"
    folder = moe_compress.compress(words, **{**lonely, "out": str(tmp_path / "out")}).folder
    said, found = report(folder), moe_views(ours(folder))[0].stacks()
    assert said["unseen"] == {"0": [LONELY]} and said["tokens"]["0"][LONELY] == 0
    assert [len(each) for each in said["tokens"].values()] == [tiny.EXPERTS] * tiny.LAYERS
    assert {sum(each) for each in said["tokens"].values()} == {tiny.TOP_K * said["calibration"]["tokens"]}
    before = naive_pruning.matrices(stock(lonely["model"]), "gpt_oss", 0)[LONELY]
    for old, new in zip(before, found.values(), strict=True):
        assert float((new[LONELY] == 0).float().mean()) < 0.3
        if policy == "rtn":
            require_rounded(new[LONELY], old, 4)
        else:
            with pytest.raises(AssertionError):
                require_rounded(new[LONELY], old, 4)


def test_an_expert_without_tokens_can_be_an_error(lonely, tmp_path):
    said = refused("quantize min_tokens=1 unseen=error", lonely, tmp_path)
    assert said.startswith(f"expert {LONELY} of layer 0: fewer than 1 tokens of the calibration text")


def test_the_error_names_values_that_quantize_has(lonely, tmp_path):
    assert "magnitude" not in refused("quantize min_tokens=1 unseen=error", lonely, tmp_path)
