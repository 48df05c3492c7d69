"""Every kind of student learns in every way, or is refused in a sentence, and leaves a checkpoint like its own."""

from __future__ import annotations

import json

import pytest
import torch

import moe_compress
from moe_compress.checkpoints.folder import MANIFEST
from moe_compress.checkpoints.reader import open_checkpoint
from moe_compress.evaluation.verification.verify import verification
from support import tiny
from support.pruned import WORDS, refused, stored
from support.quantized import form
from support.recovered import changed_tensors, layer_notes, reports
from support.slow import slow_unless

BEFORE = {
    "dropped": "expert_drop score=weight_norm keep=4",
    "unevenly": "expert_drop score=weight_norm keep=4 budget=global",
    "constants": "expert_drop keep=4 novice=mean",
    "added up": "expert_merge preset=hc_smoe keep=4",
    "means": "expert_merge keep=4",
    "core": "factorise structure=base_delta ratio=0.6",
    "low rank": "factorise structure=svd ratio=0.5",
    "narrow": "channels ratio=0.5",
    "shallow": "layer_drop layers=1",
    "short": "block_drop layers=1",
    "skipping": "skip share=0.5",
    "added up, then dropped": "expert_merge preset=hc_smoe keep=6 + expert_drop score=weight_norm keep=4",
    "packed": "quantize bits=4 method=rtn group_size=8 clip=max",
    "rounded": "quantize format=packed bits=2 method=rtn group_size=8 clip=max",
}
AFTER = {
    "ridge": "router_kd solver=ridge",
    "router_kd": "router_kd steps=2",
    "layerwise": "layerwise steps=2",
    "distill": "distill steps=2 loss=logits,hidden,router",
}
FAMILIES = ("mixtral", "deepseek_v3", "gpt_oss", "qwen3_next")
SEVERAL = "expert_drop score=weight_norm keep=6 + distill steps=2 + expert_drop keep=4 + layerwise steps=2"
# One family each by default, and every way to learn from some student.
FAST = {("mixtral", "added up, then dropped", "distill"), ("deepseek_v3", "shallow", "layerwise")} | {
    ("gpt_oss", "constants", "ridge"),
    ("qwen3_next", "core", "router_kd"),
}
OTHERS = ("llama4_text", "minimax", "hunyuan_v1_moe", "jamba", "qwen2_moe", "phimoe", "ernie4_5_moe")
# Kinds of students that a family, or a stage for its experts, does not have.
GONE = {("llama4_text", "constants"), ("llama4_text", "added up"), ("llama4_text", "skipping")}
GONE |= {("llama4_text", "added up, then dropped"), ("jamba", "shallow"), ("jamba", "short")}


def require_student(family: str, before: str, after: str, lab, made) -> None:
    """What holds of every student that has learned."""
    first, folder = made(family, before), made(family, f"{before} + {after}")
    assert form(folder) == form(first) and changed_tensors(first, folder)
    old, new = (json.loads((each / "config.json").read_text()) for each in (first, folder))
    assert old == new
    assert {k: (t.dtype, t.shape) for k, t in stored(first).items()} == {
        k: (t.dtype, t.shape) for k, t in stored(folder).items()
    }
    assert moe_compress.load(str(folder), torch.float32)(WORDS, use_cache=False).logits.isfinite().all()
    kind = {"router_kd solver=ridge": "kl", "layerwise steps=2": "error"}.get(after)
    if kind is not None:
        notes = layer_notes(folder, kind)
        assert all(last <= earlier for earlier, last in notes) and any(last < earlier for earlier, last in notes)
    else:
        curve = reports(folder)[-1]["training"]["curve"]
        assert all(len(losses) == 2 and min(losses) >= 0 for losses in curve.values())


@pytest.mark.parametrize(
    ("family", "student", "way"), slow_unless(lambda *case: case in FAST, FAMILIES, list(BEFORE)[:-2], AFTER)
)
def test_a_student_learns(family, student, way, lab, made):
    require_student(family, BEFORE[student], AFTER[way], lab, made)


@pytest.mark.slow
@pytest.mark.parametrize("family", OTHERS)
@pytest.mark.parametrize("student", list(BEFORE)[:-2])
def test_a_student_of_another_family_learns(family, student, lab, made):
    if (family, student) in GONE:
        pytest.skip("refused by the stage before")
    ways = AFTER if family != "jamba" else {"distill": AFTER["distill"]}  # nothing differs before its one router
    for way in ways.values():
        require_student(family, BEFORE[student], way, lab, made)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("student", ["packed", "rounded"])
@pytest.mark.parametrize("way", ["ridge", "router_kd"])
def test_a_student_whose_experts_are_packed_learns(family, student, way, wide_lab, wide_made):
    require_student(family, BEFORE[student], AFTER[way], wide_lab, wide_made)


@pytest.mark.parametrize(
    ("family", "before"),
    slow_unless(lambda f, b: f == "mixtral" and b == "core", FAMILIES, ["constants", "core", "low rank"]),
)
@pytest.mark.parametrize("engine", ["layerwise", "distill"])
def test_what_a_stage_made_anew_learns_alone(family, before, engine, made):
    """Factors, or constants in place of experts."""
    first = made(family, BEFORE[before])
    folder = made(family, f"{BEFORE[before]} + {engine} train=new steps=2")
    changed, word = changed_tensors(first, folder), "novices" if before == "constants" else "experts"
    assert changed and all(word in name for name in changed)


def test_a_model_without_such_has_nothing_new(lab, tmp_path):
    said = refused(f"{BEFORE['dropped']} + distill train=new", lab("mixtral"), tmp_path)
    assert said == "stage 2 (distill): train=new: mixtral as it is here has none of these."


@pytest.mark.parametrize("family", slow_unless(lambda family: family == "mixtral", ["mixtral", "gpt_oss", "qwen3_moe"]))
@pytest.mark.parametrize("words", ["router_kd", "distill train=routers loss=labels,hidden"])
def test_routers_that_no_loss_feels_are_refused(family, words, lab, tmp_path):
    """Of one expert per token the gate is always 1; its choice has no gradient."""
    said = refused(f"top_k k=1 + {words} steps=2", lab(family), tmp_path)
    assert said.startswith("the loss has no gradient at what would be trained") and "solver=ridge" in said


@pytest.mark.parametrize("words", ["router_kd solver=ridge", "distill train=routers loss=router steps=2"])
def test_routers_of_one_expert_per_token_are_taught_by_routing(words, made):
    first, folder = made("mixtral", "top_k k=1"), made("mixtral", f"top_k k=1 + {words}")
    assert all("gate.weight" in name for name in changed_tensors(first, folder))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "student", "way"),
    [("mixtral", "dropped", "distill"), ("deepseek_v3", "unevenly", "layerwise"), ("gpt_oss", "core", "router_kd")],
)
def test_stock_transformers_agrees_in_a_process_of_its_own(family, student, way, made):
    found = verification(open_checkpoint(made(family, f"{BEFORE[student]} + {AFTER[way]}")))
    assert found.passed, found.problems


def test_stages_may_follow_a_recovery(made):
    """What was learned is cut, and learns again."""
    folder = made("mixtral", SEVERAL)
    manifest = json.loads((folder / MANIFEST).read_text())
    assert [stage["method"] for stage in manifest["stages"]] == ["expert_drop", "distill", "expert_drop", "layerwise"]
    assert len(layer_notes(folder, "error")) == tiny.LAYERS


def test_what_is_lost_grows_smaller_on_the_text_that_is_learned_from(made):
    """All windows in every step: routers alone, and experts with them."""
    ends = {}
    for words in ("router_kd steps=20", "distill steps=20"):
        (curve,) = reports(made("mixtral", f"{BEFORE['dropped']} + {words}"))[-1]["training"]["curve"].values()
        ends[words] = curve[-1] / curve[0]
    assert ends["distill steps=20"] < 0.6 < ends["router_kd steps=20"] < 0.95


def test_the_report_says_what_was_trained_and_on_how_much(made):
    folder = made("mixtral", f"{BEFORE['dropped']} + distill train=routers steps=50 batch=3")
    found = reports(folder)[-1]
    training = found["training"]
    assert training["tokens"] == 50 * 3 * 16 and training["steps"] == 50 and training["seconds"] > 0
    assert training["trained"] == 3 * 4 * tiny.HIDDEN and training["optimiser_bytes"] == 8 * training["trained"]
    at = training["curve_steps"]
    assert at[0] == 1 and at[-1] == 50 and len(at) == 40 == len(training["curve"]["logits"]) and at == sorted({*at})
    assert found["calibration"]["tokens"] == 8 * 16 and found["teacher"]
