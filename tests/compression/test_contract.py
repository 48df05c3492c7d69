"""Trimming from end to end: what every recipe must keep to, whatever the method; and what each method promises."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

import moe_compress
import readers
import tiny
from editing import IDS, cut, logits_of, original
from moe_compress.calibration import block_influence
from moe_compress.calibration.artefact import calibrate
from moe_compress.calibration.collect import observed
from moe_compress.calibration.model_statistics import ModelStatistics
from moe_compress.checkpoints import writer
from moe_compress.checkpoints.load import load_model
from moe_compress.checkpoints.reader import Checkpoint, open_checkpoint
from moe_compress.compression.search_objective import OriginalAgreement, agreement_objective
from moe_compress.edits.apply import check_edits
from moe_compress.edits.edits import Edit, KeepExperts, Plan, SetTopK, SkipSublayer
from moe_compress.edits.plan_file import read_plan
from moe_compress.engine import forward
from moe_compress.engine.layers import StreamedLayers
from moe_compress.methods import registry
from moe_compress.methods.allocation import AllocationSearch, Ladder, by_search, by_threshold, cheapest
from moe_compress.models import hf
from moe_compress.models.moe import moe_views
from moe_compress.models.shape import ModelShape, model_shape
from moe_compress.run.context import Run
from moe_compress.run.log import RunLog
from moe_compress.run.options import make_options
from test_identity import CPU, windows_of

Options = dict[str, object]
WORDS = torch.randint(3, readers.VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))
EIGHT = tiny.EXPERTS


@pytest.fixture(scope="session")
def lab(reader_folder, texts, tmp_path_factory) -> Callable[[str], Options]:
    """family -> options whose results, and with them calibrations, all tests on it share."""
    place = tmp_path_factory.mktemp("lab")
    files = {"data": str(texts / "calibration.txt"), "eval_data": str(texts / "heldout.txt"), "eval": False}

    def of(family: str) -> Options:
        return {**readers.OPTIONS, **files, "model": str(reader_folder(family)), "results": str(place / family)}

    return of


@pytest.fixture(scope="session")
def made(lab) -> Callable[[str, str], Path]:
    """(family, sentence) -> the checkpoint."""
    return functools.cache(lambda family, sentence: moe_compress.compress(sentence, **lab(family)).folder)


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("model*.safetensors"))}


def skeleton(folder: Path) -> Any:
    return hf.skeleton(open_checkpoint(folder).config, torch.float32)


def plan_edits(folder: Path) -> list[Edit]:
    return [edit for stage in read_plan(folder / "plan.json")[0] for edit in stage.plan.edits]


def parameters(folder: Path) -> int:
    model = skeleton(folder)
    tied = {id(p) for p in model.parameters()}
    assert len(tied) == len(list(model.parameters()))
    return sum(p.numel() for p in model.parameters())


# --- the contract ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Left:
    """What must be left. experts: in every MoE layer, or (even=False) on average; rows: of every router; moe, layers:
    how many fewer there are; active: experts per token on average, as the router says."""

    experts: int = EIGHT
    even: bool = True
    rows: int | None = None
    moe: int = 0
    layers: int = 0
    active: float | None = None


SIX, FOUR, UNEVEN = Left(experts=6), Left(experts=4), Left(experts=4, even=False)
SUMMED, NOVICES = Left(experts=4, rows=EIGHT), Left(experts=4, rows=EIGHT)
CONTRACT: list[tuple[str, Left, tuple[str, ...]]] = [
    ("expert_drop keep=6", SIX, ("nemotron_h",)),
    ("expert_drop preset=paper", Left(experts=6, even=False), ("deepseek_v2",)),
    ("expert_drop preset=naee", SIX, ("deepseek_v3", "gpt_oss")),
    ("expert_drop novice=mean", Left(experts=6, rows=EIGHT), ("deepseek_v3",)),
    ("expert_drop score=naee keep=4 budget=global", UNEVEN, ("olmoe",)),
    ("expert_drop score=naee keep=4 propagate=compressed", FOUR, ("mixtral", "deepseek_v3")),
    ("expert_drop score=remove_one keep=4", FOUR, ("granitemoeshared",)),
    ("expert_drop score=ranked_choice keep=4", FOUR, ("nemotron_h",)),
    ("expert_drop keep=4 propagate=compressed", FOUR, ("gpt_oss",)),
    ("expert_drop keep=4 novice=mean", NOVICES, ("mixtral",)),
    ("expert_drop keep=1 novice=mean", Left(experts=1, rows=EIGHT), ("gpt_oss",)),
    ("expert_drop keep=4 novice=mean propagate=compressed", NOVICES, ("granitemoeshared",)),
    ("expert_drop score=aimer keep=4 novice=mean budget=global", Left(experts=4, even=False, rows=EIGHT), ("mixtral",)),
    ("expert_drop keep=4 budget=search evaluations=5", UNEVEN, ("mixtral", "deepseek_v3")),
    ("expert_drop score=naee keep=4 budget=search evaluations=4", UNEVEN, ("qwen3_moe",)),
    ("expert_drop score=random keep=4 budget=search evaluations=3", UNEVEN, ("olmoe",)),
    ("expert_merge keep=4", FOUR, ("mixtral",)),
    ("expert_merge preset=hc_smoe keep=4", SUMMED, ("deepseek_v3", "gpt_oss")),
    ("expert_merge preset=m_smoe keep=4", Left(experts=4, even=False, rows=EIGHT), ("mixtral", "deepseek_v2")),
    ("expert_merge preset=ream keep=4", FOUR, ("qwen3_moe", "deepseek_v3")),
    ("expert_merge by=weights average=uniform keep=4", FOUR, ("olmoe",)),
    ("expert_merge by=logits linkage=complete router=sum keep=3", Left(experts=3, rows=EIGHT), ("granitemoeshared",)),
    ("expert_merge grouping=m_smoe by=coactivation average=saliency keep=4", FOUR, ("deepseek_v2",)),
    ("expert_merge grouping=m_smoe by=weights align=weights linkage=single keep=4", FOUR, ("nemotron_h",)),
    ("expert_merge grouping=ream align=activations cap=3 keep=4", FOUR, ("gpt_oss",)),
    ("expert_merge by=outputs+logits align=both router=sum keep=1", Left(experts=1, rows=EIGHT), ("mixtral",)),
    ("expert_merge keep=4 propagate=compressed router=sum", SUMMED, ("granitemoeshared",)),
    ("expert_merge keep=4 budget=search evaluations=4", UNEVEN, ("gpt_oss",)),
    ("expert_merge keep=4 budget=global align=weights", UNEVEN, ("olmoe",)),
    ("layer_drop drop=1", Left(moe=1), ("granitemoeshared",)),
    ("layer_drop drop=1 metric=without_norm", Left(moe=1), ("olmoe", "deepseek_v2")),
    ("layer_drop drop=1 part=attention", Left(), ("deepseek_v3",)),
    ("layer_drop layers=0,2", Left(moe=2), ("gpt_oss",)),
    ("layer_drop layers=1 part=attention metric=without_norm", Left(), ("gpt_oss",)),
    ("block_drop drop=1", Left(moe=1, layers=1), ("qwen3_moe",)),
    ("block_drop drop=2 mode=consecutive", Left(moe=2, layers=2), ("mixtral", "gpt_oss")),
    ("block_drop layers=0", Left(layers=1), ("deepseek_v2",)),
    ("layer_drop drop=1", Left(moe=1, layers=1), ("nemotron_h",)),
    ("top_k k=1", Left(active=1.0), ("deepseek_v3",)),
    ("top_k mean=1.5", Left(active=1.5), ("deepseek_v2", "nemotron_h")),
    ("top_k mean=1.7 on=noise", Left(active=5 / 3), ("granitemoeshared", "qwen3_moe")),
    ("skip", Left(), ("deepseek_v3",)),
    ("skip share=0.25", Left(), ("gpt_oss",)),
    ("skip beta=0.6", Left(), ("olmoe",)),
]
# What a forecast cannot know: which layers go, where that decides how many parameters go; how many experts are
# left in each layer, which decides the form.
UNKNOWN_SIZES = {("deepseek_v2", "layer_drop drop=1 metric=without_norm")}


def require_left(left: Left, before: ModelShape, folder: Path) -> None:
    model = skeleton(folder)
    shape, views = model_shape(model), moe_views(model)
    assert shape.total == before.total - left.layers
    assert len(shape.moe) == len(before.moe) - left.moe
    counts = [moe.num_experts for moe in shape.moe]
    assert sum(counts) == left.experts * len(counts)
    assert not left.even or len(set(counts)) == 1
    for moe, view in zip(shape.moe, views.values(), strict=True):
        assert view.router_rows == (left.rows or moe.num_experts)
        if left.rows is None:
            moe.require(moe.num_experts)
    active = sum(moe.top_k for moe in shape.moe) / len(shape.moe)
    assert active == (left.active or before.moe[0].top_k)


@pytest.mark.parametrize(
    ("sentence", "left", "family"), [(s, left, family) for s, left, families in CONTRACT for family in families]
)
def test_every_recipe_keeps_to_the_contract(sentence, left, family, lab, made):
    """As asked, loadable, the very model that its plan gives in memory, finite, and as forecast."""
    folder, source = made(family, sentence), open_checkpoint(Path(str(lab(family)["model"])))
    require_left(left, model_shape(hf.skeleton(source.config, torch.float32)), folder)
    model = load_model(folder, torch.float32)
    logits = logits_of(model, WORDS)
    assert logits.isfinite().all()
    assert torch.equal(logits, logits_of(cut(source, plan_edits(folder)), WORDS))
    forecast = moe_compress.plan(sentence, **lab(family))
    assert parameters(folder) == forecast.after.parameters or (family, sentence) in UNKNOWN_SIZES
    form = "edited" if "moe_compress" in open_checkpoint(folder).values else "plain"
    manifest = json.loads((folder / "moe_compress.json").read_text())
    assert manifest["form"] == form
    assert form == forecast.form or not left.even or (family, sentence) in UNKNOWN_SIZES


def test_the_contract_is_about_every_method_and_preset():
    said = [sentence.split() for sentence, _, _ in CONTRACT]
    trimming = {name for name, method in registry.METHODS.items() if method.group == "trimming"}
    assert {words[0] for words in said} == trimming
    for name in trimming:
        presets = {
            word.removeprefix("preset=") for words in said if words[0] == name for word in words if "preset" in word
        }
        assert presets == set(registry.METHODS[name].presets)


def test_a_forecast_counts_what_stands_in_for_dropped_blocks(lab, made):
    forecast = moe_compress.plan("layer_drop layers=1", **lab("qwen3_moe"))
    assert forecast.after.parameters == parameters(made("qwen3_moe", "layer_drop layers=1"))


@pytest.mark.xfail(strict=True, reason="in groups as many go as fill whole steps, although the router stays whole")
def test_novices_leave_any_count_in_groups(made):
    shape = model_shape(skeleton(made("deepseek_v3", "expert_drop keep=5 novice=mean")))
    assert {moe.num_experts for moe in shape.moe} == {5}


# --- every method on every family: plans -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seen(sources, tmp_path_factory) -> Callable[[str], tuple[Checkpoint, ModelStatistics]]:
    """family -> its checkpoint and what a method is given of it: one pass with probes over random tokens."""
    place = tmp_path_factory.mktemp("seen")

    @functools.cache
    def of(family: str) -> tuple[Checkpoint, ModelStatistics]:
        checkpoint, windows = sources(family), windows_of(tiny.token_ids(8, 16, seed=2))
        layers = StreamedLayers(checkpoint, CPU, torch.float32)
        found = calibrate(checkpoint, layers, windows, place / f"{family}.safetensors", "", None, probes=True)
        return checkpoint, observed(checkpoint, found, {})

    return of


def planned(model: ModelStatistics, sentence: str) -> Plan:
    name, *words = sentence.split()
    method = registry.find(name)
    return method.run(model, **method.bind(dict(word.split("=") for word in words)))


PLANS = (
    *(f"expert_drop score={score} keep=4" for score in ("reap", "ranked_choice", "naee", "remove_one", "gate_mass")),
    "expert_drop keep=6 novice=mean", "expert_drop preset=paper",
    "expert_merge keep=4", "expert_merge preset=hc_smoe keep=4", "expert_merge preset=m_smoe keep=4",
    "expert_merge grouping=ream by=outputs+logits align=both average=saliency keep=4",
    "layer_drop drop=1", "layer_drop drop=1 metric=without_norm", "layer_drop drop=1 part=attention",
    "block_drop drop=1", "block_drop drop=1 mode=consecutive",
    "top_k mean=1.5", "skip", "skip beta=0.5",
)  # fmt: skip
UNRULED = "its router follows no rule that is known here"
# family -> parts of sentences -> why there is no such plan.
NO_PLAN: dict[str, dict[str, str]] = {
    "llama4_text": {"naee": UNRULED, "remove_one": UNRULED, "top_k mean": "but fewer than 1, can be active"}
    | {"skip": "there is none to skip", "novice": "is not possible for llama4_text"}
    | {"hc_smoe": "is not possible for llama4_text", "m_smoe": "is not possible for llama4_text"},
    "phimoe": {"naee": UNRULED, "remove_one": UNRULED, "top_k mean": UNRULED},
    "nemotron_h": {"part=attention": "of 0 layers with attention"},
    "qwen3_next": {"part=attention": "of 1 layers with attention"},
    "lfm2_moe": {"part=attention": "of 1 layers with attention"},
}


@pytest.mark.parametrize("family", tiny.EDITABLE)
def test_every_method_plans_for_every_family(family, seen):
    checkpoint, model = seen(family)
    for sentence in PLANS:
        why = next((why for part, why in NO_PLAN.get(family, {}).items() if part in sentence), None)
        name, *words = sentence.split()
        method = registry.find(name)
        bound = method.bind(dict(word.split("=") for word in words))
        if why is not None:
            with pytest.raises(ValueError, match=why):
                method.check(model.shape, **bound)
                check_edits(hf.skeleton(checkpoint.config, torch.float32), planned(model, sentence).edits)
            continue
        plan, again = planned(model, sentence), planned(model, sentence)
        assert plan == again
        edits, expected = plan.edits, method.check(model.shape, **bound).edits
        assert edits and type(edits[0]) is type(expected[0])
        if bound.get("budget") == "layer":
            kept = [[len(getattr(e, "experts", getattr(e, "groups", ()))) for e in es] for es in (edits, expected)]
            assert kept[0] == kept[1]
        check_edits(hf.skeleton(checkpoint.config, torch.float32), edits)
        json.dumps(planning_report(plan), allow_nan=False)


GROUPINGS = ("hc_smoe", "m_smoe", "ream")
SIMILARITIES = ("outputs", "logits", "weights", "coactivation", "outputs+logits")


@pytest.mark.parametrize("router", ["centroid", "sum"])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_every_way_to_merge_shares_out_the_experts(family, router, seen):
    checkpoint, model = seen(family)
    skeleton = hf.skeleton(checkpoint.config, torch.float32)
    for grouping, by, align in itertools.product(GROUPINGS, SIMILARITIES, ("none", "weights", "activations", "both")):
        if align != "none" and (grouping, by) != ("hc_smoe", "weights"):
            continue  # how neurons are matched does not depend on how groups are found
        plan = planned(model, f"expert_merge grouping={grouping} by={by} align={align} router={router} keep=4 cap=3")
        assert len(plan.edits) == len(model.layers)
        for edit in plan.edits:
            edit.check(skeleton)
            assert len(edit.groups) == 4 and max(map(len, edit.groups)) <= 3 and edit.router == router
            assert edit.aligned is (align != "none") is bool(edit.arrays)
            assert all(list(group[1:]) == sorted(group[1:]) for group in edit.groups)
        assert planned(model, f"expert_merge grouping={grouping} by={by} router={router} keep=8").edits == []


def planning_report(plan: Plan) -> dict[str, Any]:
    """What goes into plan.json beside the edits."""
    return {"scores": {str(k): v for k, v in plan.scores.items()}, "report": plan.report}


# --- the same every time, from the recipe and from the plan ----------------------------------------------------------


ONE_OF_EACH = {
    "mixtral": "expert_drop score=naee keep=6 budget=search evaluations=4 + expert_merge preset=m_smoe keep=5",
    "deepseek_v3": "expert_merge preset=ream keep=6 + layer_drop drop=1 part=attention + skip",
    "gpt_oss": "expert_drop keep=6 propagate=compressed + top_k mean=1.5 + block_drop drop=1 mode=consecutive",
    "qwen3_moe": "layer_drop drop=1 + expert_merge by=weights average=uniform keep=6 align=both",
}
COMPOSED = "block_drop drop=1 + expert_drop keep=6 + layer_drop drop=1 + expert_merge keep=4"


def same_checkpoint(one: Path, other: Path, without: Sequence[str] = ()) -> None:
    names = {path.name for path in one.iterdir()} - {"moe_compress.json", "README.md", *without}
    assert names == {path.name for path in other.iterdir()} - {"moe_compress.json", "README.md", *without}
    different = [name for name in sorted(names) if (one / name).read_bytes() != (other / name).read_bytes()]
    assert different == []


@pytest.mark.parametrize("family", ONE_OF_EACH)
def test_two_runs_write_the_same_bytes(family, lab, tmp_path):
    """The second one measures everything anew, and is told in the YAML that the first one wrote."""
    sentence, options = ONE_OF_EACH[family], {**lab(family), "seed": 3}
    first = moe_compress.compress(sentence, **{**options, "out": tmp_path / "first"}).folder
    again = {"out": tmp_path / "again", "results": tmp_path / "elsewhere"}
    same_checkpoint(first, moe_compress.compress(str(first / "recipe.yaml"), **again).folder)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "jamba"])
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
        ("mixtral", "expert_merge preset=hc_smoe keep=6 + expert_drop score=weight_norm keep=4"),
        ("mixtral", "skip + expert_drop keep=6 novice=mean + expert_drop keep=4"),
        ("gpt_oss", "expert_drop keep=6 novice=mean + expert_drop keep=4 novice=mean"),
        ("gpt_oss", "expert_merge keep=4 align=both + block_drop drop=1"),
        ("qwen3_moe", "layer_drop drop=1 + layer_drop drop=1"),
        ("nemotron_h", "block_drop drop=1 + expert_merge preset=hc_smoe keep=4"),
        ("minimax", "block_drop layers=0 + top_k k=1"),
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
    [
        ("mixtral", "layer_drop drop=1"),
        ("qwen3_moe", "layer_drop drop=1"),
        ("mixtral", "block_drop drop=1"),
        ("minimax", "block_drop drop=1"),
        ("minimax", "block_drop drop=1 mode=consecutive"),
    ],
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


# --- killed runs -----------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    """Stands for whatever stops a run in the middle."""


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Stop a run at the n-th call of a function."""

    def stop(place: object, name: str, number: int, run: Callable[[], object]) -> None:
        calls: list[int] = []
        real = getattr(place, name)

        def counted(*args: object, **keywords: object) -> object:
            calls.append(1)
            if len(calls) > number:
                raise Interrupted
            return real(*args, **keywords)

        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(place, name, counted)
            run()

    return stop


@pytest.mark.parametrize(
    ("sentence", "place", "name", "number"),
    [
        ("expert_drop keep=4 budget=search evaluations=5", OriginalAgreement, "__call__", 0),
        ("expert_drop keep=4 budget=search evaluations=5", OriginalAgreement, "__call__", 3),
        ("expert_drop keep=4 budget=search evaluations=5", writer, "write_shard", 2),
        ("expert_drop score=naee keep=4 propagate=compressed", forward.hf, "run_layer", 4),
        ("expert_drop score=naee keep=4 propagate=compressed", writer, "write_shard", 3),
        ("expert_merge preset=ream keep=4 + block_drop drop=1", forward.hf, "run_layer", 11),
        ("expert_merge preset=ream keep=4 + block_drop drop=1", writer, "write_config", 1),
    ],
)
def test_a_stopped_run_leaves_nothing_half_written_and_goes_on(
    sentence, place, name, number, lab, made, stopped, tmp_path
):
    options = {**lab("mixtral"), "out": tmp_path / "out", "results": str(tmp_path / "results")}
    stopped(place, name, number, lambda: moe_compress.compress(sentence, **options))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial" / "config.json").exists() or name == "write_config"
    folder = moe_compress.compress(sentence, **options).folder
    same_checkpoint(folder, made("mixtral", sentence))
    assert [path.name for path in tmp_path.rglob("*") if path.suffix in (".tmp", ".partial", ".stage1")] == []


# --- how far layers turn the stream ----------------------------------------------------------------------------------


Streams = dict[str, list[Tensor]]


@torch.no_grad()
def streams_of(model: Any, names: Mapping[str, str], ids: Tensor) -> Streams:
    """Per layer, flat over tokens, in float64: the stream in front of each sub-layer, what goes into and out of it.

    names: for `moe` and `attention` the module whose input is the stream, and (`_block`) the sub-layer itself.
    """
    found: Streams = {key: [] for key in ("in", "out", "moe", "moe_in", "moe_out", "attention_in", "attention_out")}
    model = batched(model).double()

    def into(key: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            found[key].append((args[0] if args else kwargs["hidden_states"]).reshape(-1, tiny.HIDDEN).clone())

        return hook

    def out_of(key: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            found[key].append((output[0] if isinstance(output, tuple) else output).reshape(-1, tiny.HIDDEN).clone())

        return hook

    for layer in model.model.layers:
        layer.register_forward_pre_hook(into("in"), with_kwargs=True)
        layer.register_forward_hook(out_of("out"))
        layer.get_submodule(names["stream"]).register_forward_pre_hook(into("moe"), with_kwargs=True)
        block, attention = layer.get_submodule(names["block"]), layer.self_attn
        block.register_forward_pre_hook(into("moe_in"), with_kwargs=True)
        block.register_forward_hook(out_of("moe_out"))
        attention.register_forward_pre_hook(into("attention_in"), with_kwargs=True)
        attention.register_forward_hook(out_of("attention_out"))
        if "beside" in names:
            layer.get_submodule(names["beside"]).register_forward_hook(out_of("beside"))
            found.setdefault("beside", [])
    model(ids, use_cache=False)
    return found


PRE_NORM = {"stream": "post_attention_layernorm", "block": "mlp"}
WHERE = {
    "mixtral": PRE_NORM,
    "flex_olmo": {"stream": "mlp", "block": "mlp"},  # its norms stand behind the sub-layers
    "minimax": PRE_NORM,  # the stream itself passes through its norms, and is scaled
    "granitemoeshared": {**PRE_NORM, "block": "block_sparse_moe", "beside": "shared_mlp"},
}
FACTORS = {"minimax": {"mlp_alpha_factor": 2.0, "mlp_beta_factor": 0.5, "full_attn_alpha_factor": 3.0}}
TURNED = tiny.token_ids(4, 16, seed=5)


def pass_over(family: str, tmp_path: Path, ids: Tensor = TURNED) -> tuple[Any, ModelStatistics]:
    """A tiny model and what one pass saw of it."""
    overrides = FACTORS.get(family, {})
    model = tiny.make(family, num_hidden_layers=5, **overrides)
    checkpoint = open_checkpoint(tiny.save(model, tmp_path / "model"))
    layers = StreamedLayers(checkpoint, CPU, torch.float32)
    found = calibrate(checkpoint, layers, windows_of(ids), tmp_path / "sums.safetensors", "", None)
    return model, observed(checkpoint, found, {})


def turn(one: Tensor, other: Tensor) -> float:
    return float((1 - cosine_similarity(one, other, dim=-1)).mean())


@pytest.mark.parametrize("family", WHERE)
def test_cosines_are_those_of_the_stock_model_in_float64(family, tmp_path):
    model, model_seen = pass_over(family, tmp_path)
    found = streams_of(model, WHERE[family], TURNED)
    for layer in range(5):
        moe_out = found["moe_out"][layer] + (found["beside"][layer] if "beside" in found else 0)
        expected = {
            "block": turn(found["in"][layer], found["out"][layer]),
            "moe": turn(found["moe"][layer], found["out"][layer]),
            "attention": turn(found["in"][layer], found["moe"][layer]),
            "moe_inner": turn(found["moe_in"][layer], moe_out),
            "attention_inner": turn(found["attention_in"][layer], found["attention_out"][layer]),
        }
        got = {name: model_seen.block_influence[layer][name] for name in expected}
        assert got == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("part", ["moe", "attention"])
@pytest.mark.parametrize("metric", ["with_norm", "without_norm"])
@pytest.mark.parametrize("family", ["mixtral", "flex_olmo"])
def test_layer_drop_takes_the_most_similar(family, metric, part, tmp_path):
    model, model_seen = pass_over(family, tmp_path)
    found = streams_of(model, WHERE[family], TURNED)
    before = (
        {"moe": "moe", "attention": "in"} if metric == "with_norm" else {p: f"{p}_in" for p in ("moe", "attention")}
    )
    after = (
        {"moe": "out", "attention": "moe"} if metric == "with_norm" else {p: f"{p}_out" for p in ("moe", "attention")}
    )
    turns_L = [turn(found[before[part]][i], found[after[part]][i]) for i in range(5)]
    plan = planned(model_seen, f"layer_drop drop=2 metric={metric} part={part}")
    least = sorted(np.argsort(turns_L)[:2].tolist())
    assert [(edit.layer, edit.part) for edit in plan.edits] == [(layer, part) for layer in least]
    assert plan.report["dropped"] == least
    assert [plan.scores[i][0] for i in range(5)] == pytest.approx([1 - t for t in turns_L], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("family", ["mixtral", "minimax"])
def test_block_drop_takes_the_best_layers_and_the_best_run(family, tmp_path):
    """Against all hidden states of the stock model, and every run of every length."""
    model, model_seen = pass_over(family, tmp_path)
    found = streams_of(model, WHERE[family], TURNED)
    stream = [*found["in"], found["out"][-1]]
    for count in (1, 2, 3, 4):
        single = [turn(stream[i], stream[i + 1]) for i in range(5)]
        plan = planned(model_seen, f"block_drop drop={count}")
        sets = [set(chosen) for chosen in itertools.combinations(range(5), count)]
        leaving = [chosen for chosen in sets if not set(model_seen.shape.attention) <= chosen]
        assert {edit.layer for edit in plan.edits} == min(leaving, key=lambda chosen: sum(single[i] for i in chosen))
        runs = [turn(stream[i], stream[i + count]) for i in range(5 - count + 1)]
        assert [float(model_seen.span_influence_LL[i, i + count]) for i in range(len(runs))] == pytest.approx(
            runs, rel=1e-4
        )
        plan = planned(model_seen, f"block_drop drop={count} mode=consecutive")
        best = int(np.argmin(runs))
        assert [edit.layer for edit in plan.edits] == list(range(best + count - 1, best - 1, -1))


def test_runs_are_judged_on_the_same_sample_of_tokens_in_every_layer(tmp_path, monkeypatch):
    """Where hidden states would be too large to keep: 16 of 64 tokens, every fourth."""
    monkeypatch.setattr(block_influence, "SAMPLE_BYTES", 16 * 4 * tiny.HIDDEN * (5 + 1))
    model, model_seen = pass_over("mixtral", tmp_path)
    found = streams_of(model, WHERE["mixtral"], TURNED)
    stream = [each[3::4] for each in [*found["in"], found["out"][-1]]]
    for i, j in itertools.combinations(range(6), 2):
        assert float(model_seen.span_influence_LL[i, j]) == pytest.approx(turn(stream[i], stream[j]), rel=1e-4)


def test_the_last_layer_with_experts_is_in_no_run(tmp_path):
    """DeepSeek with one dense layer: no run may hold all others."""
    model = tiny.make("deepseek_v2", num_hidden_layers=3)
    checkpoint = open_checkpoint(tiny.save(model, tmp_path / "model"))
    layers = StreamedLayers(checkpoint, CPU, torch.float32)
    found = calibrate(checkpoint, layers, windows_of(TURNED), tmp_path / "sums.safetensors", "", None)
    plan = planned(observed(checkpoint, found, {}), "block_drop drop=2 mode=consecutive")
    assert [edit.layer for edit in plan.edits] == [1, 0]


# --- budgets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_the_cheapest_choice_is_that_of_brute_force(seed):
    random = np.random.default_rng(seed)
    costs = [random.random(size).tolist() for size in random.integers(1, 6, 4)]
    costs[1][0] = float("inf")
    for total in range(sum(len(row) - 1 for row in costs) + 2):
        choices = [c for c in itertools.product(*(range(len(row)) for row in costs)) if sum(c) == total]
        worth = {c: sum(row[i] for row, i in zip(costs, c, strict=True)) for c in choices}
        possible = [c for c in choices if np.isfinite(worth[c])]
        if not possible:
            with pytest.raises(ValueError, match="adds up to"):
                cheapest(costs, total)
        else:
            assert worth[tuple(cheapest(costs, total))] == pytest.approx(min(worth.values()))


@pytest.mark.parametrize("seed", range(3))
def test_a_threshold_takes_the_cheapest_steps_in_order(seed):
    random = np.random.default_rng(seed)
    ladders = {layer: Ladder(tuple(random.random(n).tolist()), 2) for layer, n in enumerate((3, 5, 4))}
    for total in range(0, 25, 2):
        taken = by_threshold(ladders, total)
        assert sum(taken.values()) * 2 == total and all(n <= len(ladders[i].costs) for i, n in taken.items())
        # No layer could give its last step back for a cheaper one: costs count as at least those before them.
        rising = {i: np.maximum.accumulate(ladder.costs) for i, ladder in ladders.items()}
        last = max((rising[i][n - 1] for i, n in taken.items() if n), default=0)
        assert all(rising[i][n] >= last for i, n in taken.items() if n < len(rising[i]))
    with pytest.raises(ValueError, match="only 24 can go"):
        by_threshold(ladders, 26)


def search_over(evaluate: Callable[[Sequence[Any]], float], evaluations: int, seed: int = 0) -> AllocationSearch:
    return AllocationSearch(
        edits=lambda taken: [tuple(taken.items())], evaluate=evaluate, evaluations=evaluations, seed=seed
    )


@pytest.mark.parametrize("evaluations", [1, 2, 3, 40])
def test_a_search_is_never_worse_than_where_it_began(evaluations):
    ladders = {layer: Ladder((0.0,) * 6, 1) for layer in (1, 4, 6, 7)}
    first = [{1: 3, 4: 3, 6: 3, 7: 3}, {1: 6, 4: 0, 6: 1, 7: 5}]
    aim = np.array([0, 6, 1, 5])
    tried: list[tuple[int, ...]] = []

    def worth(edits: Sequence[Any]) -> float:
        genome = tuple(dict(edits[0]).values())
        tried.append(genome)
        assert sum(genome) == 12 and all(0 <= steps <= 6 for steps in genome)
        return -float(np.abs(np.array(genome) - aim).sum())

    taken, report = by_search(ladders, first, search_over(worth, evaluations, seed=1))
    assert len(tried) == len(set(tried)) == evaluations == report["search"]["evaluations"]
    assert tried[: len(first)] == [tuple(start.values()) for start in first][:evaluations]
    found = worth([tuple(taken.items())])
    assert (
        found == report["search"]["agreement"] == max(worth([tuple(zip(ladders, g, strict=True))]) for g in list(tried))
    )
    assert evaluations < 40 or found > max(worth([tuple(start.items())]) for start in first)
    assert by_search(ladders, first, search_over(worth, evaluations, seed=1)) == (taken, report)


def test_a_search_ends_where_there_is_nothing_else_to_try():
    """Two layers of one step each have three allocations of one step: no more can be evaluated."""
    taken, report = by_search(
        {0: Ladder((0.0,), 1), 1: Ladder((0.0,), 1)}, [{0: 1, 1: 0}], search_over(lambda _: 0.5, 50)
    )
    assert report["search"]["evaluations"] == 2 and sum(taken.values()) == 1
    taken, report = by_search({0: Ladder((0.0,) * 3, 1)}, [{0: 2}], search_over(lambda _: 0.5, 50))
    assert (taken, report["search"]["evaluations"]) == ({0: 2}, 1)


@torch.no_grad()
def test_agreement_is_the_mean_overlap_of_next_token_distributions(sources):
    source = sources("mixtral")
    mask = torch.arange(12)[None] < torch.tensor([12, 7, 3])[:, None]
    worth = OriginalAgreement(original(source), windows_of(IDS, mask))
    edits = [KeepExperts(0, (0, 2, 5)), KeepExperts(2, (1, 3, 4, 6)), SkipSublayer(1, "attention")]
    total = count = 0.0
    for row, real in zip(IDS, mask, strict=True):
        both = (batched(cut(source, some)).double() for some in ([], edits))
        p, q = (logits_of(model, row[real][None])[0, :-1].softmax(-1) for model in both)
        total, count = total + float(torch.minimum(p, q).sum()), count + len(p)
    assert worth(edits) == pytest.approx(total / count, rel=1e-5)
    assert worth([]) == pytest.approx(1, abs=1e-6)
    assert worth.evaluations == 2


def batched(model: Any) -> Any:
    model.set_experts_implementation("batched_mm")
    return model


@pytest.mark.parametrize(
    ("family", "sentence"),
    [("mixtral", "expert_drop keep=4 budget=search evaluations=5"),
     ("gpt_oss", "expert_merge keep=4 budget=search evaluations=4")],
)  # fmt: skip
def test_a_search_reports_what_its_checkpoint_is_worth(family, sentence, lab, made):
    """On the windows that no sum has seen."""
    folder = made(family, sentence)
    report = json.loads((folder / "plan.json").read_text())["stages"][0]["report"]["search"]
    assert 0 < report["agreement_of_even"] <= report["agreement"] < 1
    run = Run(make_options(lab(family)).resolved(), RunLog(None))
    worth = agreement_objective(open_checkpoint(Path(str(lab(family)["model"]))), run)
    assert worth(plan_edits(folder)) == pytest.approx(report["agreement"], abs=1e-6)
    assert len(worth.windows) == 2


# --- what plans say of the layers, against the models themselves -----------------------------------------------------


def routed_outputs(model: Any, windows: Tensor) -> dict[int, Tensor]:
    """Layer -> what its routed experts return on all windows."""
    found: dict[int, Tensor] = {}
    handles = []
    for layer, view in moe_views(model).items():

        def keep(_module: nn.Module, _args: Any, output: Tensor, layer: int = layer) -> None:
            found[layer] = output.detach().double()

        handles.append(view.experts.register_forward_hook(keep))
    logits_of(model, windows)
    for handle in handles:
        handle.remove()
    return found


def calibration_ids(options: Options) -> Tensor:
    run = Run(make_options(options).resolved(), RunLog(None))
    windows = run.windows("calibration", open_checkpoint(Path(str(options["model"]))))
    assert bool(windows.mask_NS.all())
    return windows.ids_NS


@pytest.mark.parametrize("propagate", ["original", "compressed"])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_reconstruction_errors_are_those_of_the_model(family, propagate, lab, made):
    """compressed: what is left of a layer behind all earlier cuts, against the original on the original stream."""
    folder = made(family, f"expert_drop score=naee keep=4 propagate={propagate}")
    (stage,), _ = read_plan(folder / "plan.json")
    source, ids = open_checkpoint(Path(str(lab(family)["model"]))), calibration_ids(lab(family))
    target = routed_outputs(original(source), ids)
    for number, edit in enumerate(stage.plan.edits):
        edits = stage.plan.edits[: number + 1] if propagate == "compressed" else [edit]
        rebuilt = routed_outputs(cut(source, edits), ids)[edit.layer]
        error = float((rebuilt - target[edit.layer]).norm() / target[edit.layer].norm())
        reported = stage.plan.report["reconstruction"][str(edit.layer)]
        assert reported["relative_error"] == pytest.approx(error, rel=1e-3)
        assert reported["tokens_with_unknown_experts"] == 0


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2", "deepseek_v3", "gpt_oss"])
def test_fewer_active_experts_cost_what_they_change(family, lab, made):
    folder = made(family, "top_k mean=1.5" if family.startswith("deepseek") else "top_k mean=1.34")
    (stage,), _ = read_plan(folder / "plan.json")
    source, ids = open_checkpoint(Path(str(lab(family)["model"]))), calibration_ids(lab(family))
    target = routed_outputs(original(source), ids)
    for layer, losses in stage.plan.scores.items():
        changed = routed_outputs(cut(source, [SetTopK(layer, 1)]), ids)[layer]
        expected = float((changed - target[layer]).norm() / target[layer].norm()) ** 2
        assert losses == [pytest.approx(expected, rel=1e-3), pytest.approx(0, abs=1e-6)]
    # The layers that go on with two are those whose change would be largest.
    dropped = {edit.layer for edit in stage.plan.edits}
    least = sorted(stage.plan.scores, key=lambda layer: stage.plan.scores[layer][0])[: len(dropped)]
    assert dropped == set(least)


@pytest.mark.parametrize("sentence", ["skip", "skip share=0.25", "skip beta=0.6"])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2", "deepseek_v3"])
def test_as_many_experts_are_skipped_as_asked(family, sentence, lab, made):
    """On the calibration text, to the width of a bin: judged on each layer of the original model."""
    folder = made(family, sentence)
    (stage,), _ = read_plan(folder / "plan.json")
    source, ids = open_checkpoint(Path(str(lab(family)["model"]))), calibration_ids(lab(family))
    model = original(source)
    for edit in stage.plan.edits:
        gates: list[Tensor] = []
        view = moe_views(model)[edit.layer]
        handle = view.experts.register_forward_pre_hook(lambda _m, args, gates=gates: gates.append(args[2]))
        logits_of(model, ids)
        handle.remove()
        ratio_T = gates[0].amin(1) / gates[0].amax(1)
        skipped = float((ratio_T < edit.threshold).double().mean())
        if "beta" in sentence:
            assert edit.threshold == 0.6
        else:
            share = 0.25 if "share" in sentence else 0.5
            bins = [float((ratio_T < edit.threshold + step / 256).double().mean()) for step in (-1, 0, 1)]
            assert bins[0] <= share <= bins[2]
        assert edit.active == pytest.approx(2 - skipped, abs=0.02)
        assert edit.renormalise is (family != "deepseek_v2")  # whose gates are a softmax over all experts


@torch.no_grad()
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h"])
def test_novices_are_mean_outputs_over_the_tokens_routed_to_them(family, lab, made):
    sentence = "expert_drop keep=1 novice=mean" if family == "gpt_oss" else "expert_drop keep=4 novice=mean"
    (stage,), _ = read_plan(made(family, sentence) / "plan.json")
    source, ids = open_checkpoint(Path(str(lab(family)["model"]))), calibration_ids(lab(family))
    model = batched(original(source)).double()
    for edit in stage.plan.edits:
        view, seen = moe_views(model)[edit.layer], []
        handle = view.experts.register_forward_pre_hook(lambda _m, args, seen=seen: seen.append(args))
        logits_of(model, ids)
        handle.remove()
        ((hidden_TD, index_TK, _),) = seen
        gone = [e for e in range(EIGHT) if e not in edit.experts]
        used = 0.0
        for row, expert in zip(edit.arrays["outputs"], gone, strict=True):
            mine_TD = hidden_TD[(index_TK == expert).any(1)]
            ones = torch.ones(len(mine_TD), 1, dtype=torch.float64)
            mean_D = (
                view.experts(mine_TD, torch.full((len(mine_TD), 1), expert), ones).mean(0) if len(mine_TD) else 0 * row
            )
            torch.testing.assert_close(row.double(), mean_D.double(), rtol=1e-4, atol=1e-5)
            used += len(mine_TD)
        assert edit.active == pytest.approx(2 - used / len(hidden_TD), abs=1e-6)
