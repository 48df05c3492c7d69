"""Packed weights move as bytes, or the stage that would change them is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from moe_compress.checkpoints.reader import open_checkpoint
from moe_compress.engine import forward
from moe_compress.models.moe import moe_views
from support import naive_pruning
from support.identity import rewritten
from support.interrupted import counting
from support.pruned import refused, report, same_bits, stock, stored
from support.quantized import BLIND, FEW, form, ours, packed_in, require_alike, theirs
from support.slow import slow_after

pytestmark = pytest.mark.filterwarnings("ignore:packed weights are made dense")


def pieces(folder: Path) -> dict[tuple[str, int], dict[str, Tensor]]:
    """(layer, expert) -> what is stored of the expert, by the rest of the name."""
    found: dict[tuple[str, int], dict[str, Tensor]] = {}
    for name, tensor in stored(folder).items():
        if place := re.search(r"layers\.(\d+)\..*experts\.(?:separate\.)?(\d+)\.(.*)", name):
            found.setdefault((place[1], int(place[2])), {})[place[3]] = tensor
    return found


def same_parts(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(same_bits(tensor, other[name]) for name, tensor in one.items())


DROPS = [("gpt_oss", "keep=4 novice=mean"), ("mixtral", "keep=4 budget=global"), ("mixtral", "keep=6")]


@pytest.mark.parametrize(("family", "words"), slow_after(1, DROPS))
def test_dropping_experts_moves_the_bytes_of_the_others(family, words, wide_made):
    score = "reap" if "novice" in words else "weight_norm"
    folder = wide_made(family, f"{BLIND} + expert_drop score={score} {words}")
    before, after = pieces(wide_made(family, BLIND)), pieces(folder)
    edits = json.loads((folder / "plan.json").read_text())["stages"][-1]["edits"]
    assert sum(len(edit["experts"]) for edit in edits) == len(after)
    for edit in edits:
        layer = str(edit["layer"])
        assert all(same_parts(before[layer, old], after[layer, new]) for new, old in enumerate(edit["experts"]))
    assert len(open_checkpoint(folder).packed) in (0, 3 * len(after))
    require_alike(ours(folder), theirs(folder))


OTHERS: list[Any] = [
    ("mixtral", BLIND, "layer_drop layers=1"),
    ("mixtral", BLIND, "block_drop layers=1"),
    ("gpt_oss", BLIND, "block_drop layers=1"),
    ("deepseek_v3", f"{BLIND} where=all", "layer_drop layers=1 part=attention"),
    ("deepseek_v3", f"{BLIND} where=all", "layer_drop layers=1"),
]


def test_what_is_packed_goes_through_the_model_as_bytes(wide_made, tmp_path):
    folder = wide_made("mixtral", BLIND)
    again = rewritten(open_checkpoint(folder), tmp_path / "again")
    one, other = stored(folder), stored(again.folder)
    assert one.keys() == other.keys() and all(same_bits(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("family", "first", "second"), slow_after(1, OTHERS))
def test_what_stays_keeps_its_bytes(family, first, second, wide_made):
    one, folder = stored(wide_made(family, first)), wide_made(family, f"{first} + {second}")
    if "block" in second:
        one = {name.replace("layers.2.", "layers.1."): t for name, t in one.items() if "layers.1." not in name}
    moved = stored(folder)
    filled = moved.keys() - one.keys()
    assert all("norm" in name or not bool(moved[name].count_nonzero()) for name in filled)
    assert all(same_bits(moved[name], one[name]) for name in moved.keys() - filled)
    assert len(moved.keys() - filled) >= (0.6 if "layer_drop" in second else 1) * len(one)
    require_alike(ours(folder), theirs(folder))


BEFORE = [
    ("mixtral", "expert_drop score=weight_norm keep=6 budget=global", "edited"),
    ("gpt_oss", "expert_drop keep=4 novice=mean", "edited"),
]


@pytest.mark.parametrize(("family", "before", "kind"), slow_after(1, BEFORE))
def test_quantizing_after_other_stages(family, before, kind, wide_made):
    folder, fake = wide_made(family, f"{before} + {FEW}"), theirs(wide_made(family, f"{before} + {FEW} format=dense"))
    assert form(folder) == kind
    assert len(packed_in(ours(folder))) == sum(3 * view.num_experts for view in moe_views(fake).values())
    require_alike(fake, ours(folder), theirs(folder))


@pytest.mark.parametrize(("family", "words"), slow_after(1, [("mixtral", FEW), ("gpt_oss", BLIND)]))
def test_zeros_of_pruning_stay(family, words, wide_made):
    first = "prune method=magnitude pattern=2:4"
    pruned, folder = wide_made(family, first), wide_made(family, f"{first} + {words} bits=3")
    for layer, view in moe_views(ours(folder)).items():
        for e, old in enumerate(naive_pruning.matrices(stock(pruned), family, layer)):
            for weight, stack in zip(old, view.stacks().values(), strict=True):
                assert bool((stack[e][weight == 0] == 0).all())
    assert report(folder)["zeros"]["experts"] >= 0.5


LATER = "put this stage before the one that made them so"
REFUSED: list[Any] = [
    ("mixtral", "prune method=magnitude", LATER),
    ("gpt_oss", "prune method=sparsegpt pattern=2:4", LATER),
    ("mixtral", BLIND, LATER),
    ("gpt_oss", FEW, LATER),
    ("mixtral", "expert_merge keep=4", "have to be alike"),
    ("gpt_oss", "channels keep=16", "have to be alike"),
]


@pytest.mark.parametrize(("family", "second", "said"), REFUSED)
def test_what_is_packed_in_modules_does_not_change_any_more(
    family, second, said, wide_lab, wide_made, monkeypatch, tmp_path
):
    first = f"{BLIND} format=packed"
    folder, calls = wide_made(family, first), counting(monkeypatch, forward.hf, "run_layer")
    sentence = refused(f"{first} + {second}", wide_lab(family), tmp_path)
    assert sentence.startswith(f"stage 2 ({second.split()[0]}): ") and said in sentence
    assert said in refused(second, {**wide_lab(family), "model": str(folder)}, tmp_path) and not calls


ASIDE: list[Any] = [
    ("mixtral", BLIND, f"{BLIND} where=attention"),
    ("mixtral", BLIND, "prune where=attention"),
    ("gpt_oss", BLIND, "prune where=attention"),
    ("gpt_oss", f"{BLIND} where=attention", "prune"),
]


@pytest.mark.parametrize(("family", "first", "second"), slow_after(2, ASIDE))
def test_what_is_packed_outlasts_a_stage_on_other_parts(family, first, second, wide_made):
    """Either refused, or what is packed keeps its bytes and the result loads."""
    try:
        folder = wide_made(family, f"{first} + {second}")
    except ValueError as error:
        assert "packed" in str(error)
        return
    before, after = stored(wide_made(family, first)), stored(folder)
    packed = {name for name in before if name.endswith(("_packed", "_scale", ".words", ".scales"))}
    assert packed and packed <= after.keys() and all(same_bits(before[name], after[name]) for name in packed)
    require_alike(ours(folder), theirs(folder))


def test_attention_is_packed_beside_experts_that_are(wide_made):
    """One config says both, so that they need not be packed at once."""
    folder, first = wide_made("mixtral", f"{BLIND} + {BLIND} bits=8 where=attention"), wide_made("mixtral", BLIND)
    before, after = stored(first), stored(folder)
    assert form(folder) == "plain" and all(same_bits(before[name], after[name]) for name in before if "experts" in name)
    assert any("self_attn" in name and name.endswith("_packed") for name in after)
    require_alike(ours(folder), theirs(folder))


def test_plain_formats_are_not_for_experts_held_one_by_one(wide_lab, wide_made, tmp_path):
    model = {**wide_lab("mixtral"), "model": str(wide_made("mixtral", f"{BLIND} format=packed"))}
    said = refused(f"{BLIND} where=attention format=gptq", model, tmp_path)
    assert said.startswith("format=gptq is for plain checkpoints, and the experts of this one are held one by one: use")
