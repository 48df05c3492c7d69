"""Routing fidelity: against sets of numbers, where nothing should change, and through every kind of edit."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

import moe_compress
from moe_compress.edits.ancestry import Ancestry
from moe_compress.edits.edits import DropLayer, KeepExperts, MergeExperts
from moe_compress.evaluation.routing.fidelity import _layer as routing_layer
from moe_compress.evaluation.routing.fidelity import token_values, utilisation
from support import readers
from support.slow import slow_after


def sample(sets: list[set[int]], experts: int, seed: int = 0) -> dict[str, Tensor]:
    used = torch.tensor([[e in chosen for e in range(experts)] for chosen in sets])
    scores = torch.randn(len(sets), experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return {"used": used, "probability": scores.softmax(-1), "count": used.double().sum(0), "tokens": torch.tensor(4.0)}


BEFORE = [{0, 1}, {1, 2}, {2, 3}, {0, 3}]


def test_sets_of_experts_are_compared_as_sets():
    """Experts 0 and 1 went into one, 2 is where it was, 3 is gone."""
    place, after = [0, 0, 1, -1], [{0}, {0, 1}, {0, 1}, {1}]
    found = token_values(sample(BEFORE, 4), sample(after, 2, seed=1), place)
    expected = []
    for old, new in zip(BEFORE, after, strict=True):
        became = {place[e] if place[e] >= 0 else f"gone {e}" for e in old}
        expected.append(len(became & new) / len(became | new))
    assert found["overlap"].tolist() == pytest.approx(expected)
    assert found["flips"].tolist() == [float(share < 1) for share in expected]


def test_the_router_s_distribution_is_shared_out_anew():
    before, after = sample(BEFORE, 4), sample([{0, 1}] * 4, 2, seed=1)
    found = token_values(before, after, [0, 0, 1, -1])
    for t in range(4):
        p, q = before["probability"][t].tolist(), after["probability"][t].tolist()
        left = [p[0] + p[1], p[2]]
        left = [each / sum(left) for each in left]
        kl = sum(a * torch.log(torch.tensor(a / b, dtype=torch.float64)) for a, b in zip(left, q, strict=True))
        assert float(found["kl"][t]) == pytest.approx(float(kl)) and float(found["lost"][t]) == pytest.approx(p[3])
    same = token_values(before, before, [0, 1, 2, 3])
    assert same["overlap"].tolist() == [1] * 4 and float(same["kl"].abs().max()) == float(same["flips"].max()) == 0


def test_utilisation_counts():
    found = utilisation(torch.tensor([0.0, 2.0, 4.0, 2.0]), 4)
    assert found == {"cv": pytest.approx(2**0.5 / 2), "busiest": 2.0, "dead": [0], "dead_below": 0.75}


def test_the_shift_of_utilisation_by_hand():
    """Of 8 tokens' choices the dropped expert had a quarter; what is left of the others' shares moved by an eighth."""
    before, after = sample(BEFORE, 4), sample([{0, 1}] * 4, 3)
    before["count"], after["count"] = torch.tensor([2.0, 3, 1, 2]).double(), torch.tensor([3.0, 4, 1]).double()
    per_token = {name: torch.zeros(4, dtype=torch.float64) for name in ("overlap", "flips", "kl", "lost")}
    found = routing_layer(before, after, [0, 1, 2, -1], per_token, torch.tensor([0, 0, 1, 2]))
    # (|2/8 - 3/8| + |3/8 - 4/8| + |1/8 - 1/8| + the lost 2/8) / 2
    assert found["utilisation_shift"] == pytest.approx(0.25)
    assert found["before"]["dead_below"] == pytest.approx(3 / 3)


def test_ancestors_follow_the_edits():
    edits = [
        KeepExperts(2, (0, 2, 3, 5)),
        DropLayer(1),
        MergeExperts(1, ((1,), (0, 3), (2,)), ((1.0,), (1.0, 1.0), (1.0,)), "centroid"),
    ]
    found = Ancestry.of(edits, 4, {0: 4, 1: 6, 2: 6})
    assert found.source == [0, 2, 3]
    assert found.place == {0: [0, 1, 2, 3], 1: [1, -1, 0, 2, -1, 1]}


def report(sentence: str, folder: str, options: dict[str, object]) -> dict[str, object]:
    result = moe_compress.compress(sentence, model=folder, **options)
    found = moe_compress.routing(result.folder, **{k: v for k, v in options.items() if k not in ("data", "samples")})
    (kept,) = (result.folder.parents[1] / "routing").glob(f"{result.folder.name}-*.json")
    saved = json.loads(kept.read_text())
    assert saved["free_running"]["together"] == found.free_running.together
    # An evaluation watches the routing as it goes.
    for name, value in found.free_running.together.items():
        assert result.record.metrics[f"routing_{name}"].value == pytest.approx(value["value"])
    assert "Teacher-forced" in found.markdown()
    return saved


@pytest.mark.parametrize("family", slow_after(1, ["mixtral", "deepseek_v2", "llama4_text", "deepseek_v3"]))
def test_changed_weights_of_experts_change_no_routing_on_the_same_inputs(family, reader_folder, options):
    found = report("prune method=magnitude sparsity=0.5", str(reader_folder(family)), options)
    forced, free = found["teacher_forced"]["together"], found["free_running"]["together"]
    assert forced["overlap"]["value"] == 1 and forced["flips"]["value"] == 0 and forced["kl"]["value"] < 1e-9
    assert free["overlap"]["value"] < 1 and free["kl"]["value"] > 1e-6
    first = min(found["free_running"]["layers"], key=int)
    assert found["free_running"]["layers"][first]["flips"]["value"] == 0


@pytest.mark.parametrize(
    "sentence",
    slow_after(
        2,
        [
            "layer_drop drop=1 + expert_drop keep=6",
            "block_drop drop=1",
            "expert_merge keep=4 router=sum",
            "expert_drop keep=4 novice=mean",
            "activations where=sent",
            "quantize method=rtn bits=8 group_size=8 where=experts,router",
        ],
    ),
)
def test_every_kind_of_change_is_followed(sentence, reader_folder, options):
    found = report(sentence, str(reader_folder("mixtral")), options)
    for layer in found["teacher_forced"]["layers"].values():
        assert 0 <= layer["overlap"]["value"] <= 1 and 0 <= layer["utilisation_shift"] <= 1
        gone = layer["lost"]["value"] > 0
        assert gone == ("expert_drop" in sentence)
    if "drop=1" in sentence and "expert" in sentence:
        assert len(found["free_running"]["layers"]) == 2


def test_a_model_beside_itself(reader_folder, options):
    folder = str(reader_folder("mixtral"))
    found = moe_compress.routing(folder, **{k: v for k, v in options.items() if k not in ("data", "samples")})
    assert found.free_running == found.teacher_forced
    assert found.free_running.together["overlap"] == {"value": 1.0, "unit": "fraction", "interval": [1.0, 1.0]}


def test_bad_words(reader_folder, options, tmp_path):
    words = {"eval_data": options["eval_data"], "results": options["results"], "eval_length": 16, "eval_samples": 4}
    with pytest.raises(ValueError, match="original="):
        moe_compress.routing(str(reader_folder("mixtral")), model="tiny-mixtral", **words)
    other = readers.save_model("mixtral", tmp_path / "six", num_local_experts=6)
    with pytest.raises(ValueError, match=r"other layers or experts .* no plan\.json"):
        moe_compress.routing(other, original=str(reader_folder("mixtral")), **words)
    made = moe_compress.compress("expert_drop keep=6", model=str(reader_folder("mixtral")), **options).folder
    with pytest.raises(ValueError, match="was not made from"):
        moe_compress.routing(made, original=str(other), **words)
