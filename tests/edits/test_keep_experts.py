"""Edits mean what they say: cut = masked, and every written checkpoint loads as exactly the model that was cut."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import moe_compress
from moe_compress.checkpoints.reader import Checkpoint, open_checkpoint
from moe_compress.edits.apply import check_edits, refuse_if_uneditable
from moe_compress.edits.edits import KeepExperts, from_json, to_json
from moe_compress.models import hf
from moe_compress.models.moe import MoEView, moe_views
from moe_compress.models.shape import MoEShape, moe_shapes
from support import tiny
from support.editing import FOUR, IDS, SIX, cut, greedy, logits_of, make, masked, moe_layers, original, write
from support.slow import slow_after, slow_families


def uniform(source: Checkpoint) -> list[KeepExperts]:
    return [KeepExperts(layer, SIX) for layer in moe_layers(source)]


def uneven(source: Checkpoint) -> list[KeepExperts]:
    """Four in the first MoE layer, six in the last, all others whole."""
    layers = moe_layers(source)
    return [KeepExperts(layers[0], FOUR), KeepExperts(layers[-1], SIX)]


@pytest.mark.parametrize("family", tiny.EDITABLE)
def test_cut_equals_masked(family, sources):
    source = sources(family)
    edits = uneven(source)
    model = original(source)
    whole = logits_of(model)
    with masked(model, edits):
        expected = logits_of(model)
    assert (expected - whole).abs().max() > 1e-3
    torch.testing.assert_close(logits_of(cut(source, edits)), expected, rtol=0, atol=1e-5)


def test_cut_equals_masked_where_groups_compete_by_their_best_expert(tmp_path):
    """DeepSeek-V2's own group-limited routing, which the other tiny models do not use."""
    grouped = {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1}
    source = open_checkpoint(tiny.save(tiny.make("deepseek_v2", **grouped), tmp_path))
    assert moe_shapes(original(source))[0].groups == 2
    model = original(source)
    with masked(model, uneven(source)):
        expected = logits_of(model)
    torch.testing.assert_close(logits_of(cut(source, uneven(source))), expected, rtol=0, atol=1e-5)


def activated(family: str, view: MoEView, index: int, x: Tensor) -> Tensor:
    """What enters the down projection of one expert, from the view's plain matrices."""
    expert = view.expert(index)
    up = nn.functional.linear(x, expert.up, expert.up_bias)
    if expert.gate is None:
        return view.experts.act_fn(up)
    gate = nn.functional.linear(x, expert.gate, expert.gate_bias)
    if family == "hy_v4":
        limit = view.experts.swiglu_limit
        return nn.functional.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)
    if family != "gpt_oss":
        return view.experts.act_fn(gate) * up
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


@pytest.mark.parametrize("family", tiny.EDITABLE)
def test_expert_view_is_the_expert(family):
    x = 3 * torch.randn(5, tiny.HIDDEN, generator=torch.Generator().manual_seed(0))
    view = next(iter(moe_views(make(family)).values()))
    for index in (0, 3, view.num_experts - 1):
        expert = view.expert(index)
        assert expert.down.shape == (tiny.HIDDEN, tiny.INNER) and expert.up.shape == (tiny.INNER, tiny.HIDDEN)
        with torch.no_grad():
            got = nn.functional.linear(activated(family, view, index, x), expert.down, expert.down_bias)
            if family == "llama4_text":
                expected = view.experts(x.repeat(view.num_experts, 1)).view(view.num_experts, *x.shape)[index]
            else:
                expected = view.experts(x, torch.full((5, 1), index), torch.ones(5, 1))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", slow_families(name for name in tiny.EDITABLE if name != "deepseek_v4"))
def test_uniform_cut_is_a_plain_checkpoint(family, sources, tmp_path):
    source = sources(family)
    written = write(source, uniform(source), tmp_path / "out")
    assert written.values["model_type"] == family and "moe_compress" not in written.values
    assert not list(written.folder.glob("*.py"))
    model, info = AutoModelForCausalLM.from_pretrained(written.folder, output_loading_info=True)
    assert not any(info.values()), info
    assert type(model) is type(make(family))
    hf.complete_experts(model)
    assert torch.equal(logits_of(model.eval()), logits_of(cut(source, uniform(source))))


@pytest.fixture(scope="session")
def edited(sources, tmp_path_factory) -> Callable[[str], tuple[Checkpoint, Tensor]]:
    """family -> its checkpoint with different counts per layer, and the logits of the same cut in memory."""
    folder = tmp_path_factory.mktemp("edited")

    @functools.cache
    def make_edited(family: str) -> tuple[Checkpoint, Tensor]:
        source = sources(family)
        return write(source, uneven(source), folder / family), logits_of(cut(source, uneven(source)))

    return make_edited


@pytest.mark.parametrize("family", slow_families(tiny.EDITABLE, 5))
def test_uneven_cut_is_an_edited_checkpoint(family, edited):
    checkpoint, expected = edited(family)
    stored = json.loads((checkpoint.folder / "config.json").read_text())
    assert stored["model_type"] == f"moe_compress_{family}"
    assert stored["architectures"] != [type(make(family)).__name__]
    assert [edit["experts"] for edit in stored["moe_compress"]["edits"]] == [list(FOUR), list(SIX)]
    model, info = AutoModelForCausalLM.from_pretrained(checkpoint.folder, output_loading_info=True)
    assert not any(info.values()), info
    loaded = moe_compress.load(str(checkpoint.folder))
    for one in (model.eval(), loaded):
        assert type(one) is not type(make(family)) and isinstance(one, type(make(family)))
        assert torch.equal(logits_of(one), expected)
    ids = IDS[:2, :6]
    made = loaded.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert torch.equal(made, greedy(loaded, ids, 3))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_an_edited_class_runs_experts_as_its_base_does(family, edited, monkeypatch):
    """transformers remembers the answer on the base class, so only a fresh process would ask the edited one."""
    model = moe_compress.load(str(edited(family)[0].folder))
    for cls in type(model).__mro__:
        if "_can_set_experts_implementation_cached_value" in cls.__dict__:
            monkeypatch.delattr(cls, "_can_set_experts_implementation_cached_value")
    assert type(model)._can_set_experts_implementation()
    assert model.config._experts_implementation == make(family).config._experts_implementation == "grouped_mm"


STRANGER = """
import json, sys
sys.modules["moe_compress"] = None
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
torch.set_num_threads(1)
folders, expected, ids = json.loads(sys.argv[1]), load_file(sys.argv[2]), torch.tensor(json.loads(sys.argv[3]))
for family, folder in folders.items():
    model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()), (family, info)
    with torch.no_grad():
        logits = model.eval()(ids, use_cache=False).logits
    assert torch.equal(logits, expected[family]), (family, float((logits - expected[family]).abs().max()))
    for load in (AutoConfig, AutoModelForCausalLM):
        try:
            load.from_pretrained(folder, trust_remote_code=False)
        except ValueError as error:
            assert "trust_remote_code" in str(error), error
        else:
            raise AssertionError(f"{family} loads without its own code")
    print(family)
"""


@pytest.mark.slow  # every kind of edit does, in test_written_checkpoints
def test_edited_checkpoints_load_where_the_package_is_unknown(edited, tmp_path):
    made = {family: edited(family) for family in tiny.EDITABLE}
    save_file({family: expected for family, (_, expected) in made.items()}, tmp_path / "expected.safetensors")
    folders = {family: str(checkpoint.folder) for family, (checkpoint, _) in made.items()}
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_MODULES_CACHE")}
    environment = {**kept, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    arguments = [json.dumps(folders), str(tmp_path / "expected.safetensors"), json.dumps(IDS.tolist())]
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == list(tiny.EDITABLE)


@pytest.mark.parametrize("family", slow_after(3, ["mixtral", "deepseek_v3", "gpt_oss", "minimax_m2", "jamba"]))
def test_edits_of_an_edited_checkpoint_compose(family, sources, edited, tmp_path):
    """Layers hold 4, (8,) 6; the second cut counts in what is left: 4 and 4, and with the middle ones 4 all over."""
    first, _ = edited(family)
    layers = moe_layers(first)
    second = [KeepExperts(layers[-1], (0, 2, 3, 5))]
    composed = [KeepExperts(layers[0], FOUR), KeepExperts(layers[-1], tuple(SIX[i] for i in (0, 2, 3, 5)))]
    expected = logits_of(cut(sources(family), composed))
    again = write(first, second, tmp_path / "again")
    assert torch.equal(logits_of(moe_compress.load(str(again.folder))), expected)
    middle = [KeepExperts(layer, FOUR) for layer in layers[1:-1]]
    assert (again.values["model_type"] == family) is (not middle)
    plain = write(again, middle, tmp_path / "plain") if middle else again
    assert plain.values["model_type"] == family
    assert torch.equal(logits_of(original(plain)), logits_of(cut(sources(family), composed + middle)))


def test_every_layer_cut_alike_but_not_at_the_same_places_is_plain(sources, tmp_path):
    source = sources("qwen3_moe")
    edits = [KeepExperts(layer, SIX if layer else (1, 2, 3, 4, 5, 6)) for layer in moe_layers(source)]
    assert write(source, edits, tmp_path / "out").values["model_type"] == "qwen3_moe"


def test_edits_survive_json():
    edit = KeepExperts(3, SIX)
    assert from_json(json.loads(json.dumps(to_json(edit)))) == edit


PLAIN = MoEShape(layer=4, num_experts=8, top_k=2)
GROUPED = MoEShape(layer=4, num_experts=16, top_k=4, groups=4, groups_used=2, min_per_group=2)


@pytest.mark.parametrize(
    ("shape", "kept", "says"),
    [
        (PLAIN, 1, "keep at least 2"),
        (PLAIN, 0, "has 8 experts"),
        (PLAIN, 9, "has 8 experts"),
        (GROUPED, 10, "possible counts are 8, 12, 16"),
        (GROUPED, 4, "possible counts are 8, 12, 16"),
        (GROUPED, 3, "at least"),
        (GROUPED, 20, "has 16 experts"),
    ],
)
def test_impossible_counts_are_refused_with_what_is_possible(shape, kept, says):
    with pytest.raises(ValueError, match=says):
        shape.require(kept)


@pytest.mark.parametrize("shape", [PLAIN, GROUPED])
def test_the_floor_is_the_smallest_possible_count(shape):
    def possible(kept: int) -> bool:
        try:
            shape.require(kept)
        except ValueError:
            return False
        return True

    counts = [kept for kept in range(-1, shape.num_experts + 2) if possible(kept)]
    assert counts == list(range(shape.floor, shape.num_experts + 1, shape.groups))


def test_group_limited_models_run_at_the_floor(tmp_path):
    """Two experts a group are enough for DeepSeek-V3's router, and fewer are refused."""
    model = tiny.make("deepseek_v3", n_routed_experts=16, n_group=4, topk_group=2, num_experts_per_tok=2)
    source = open_checkpoint(tiny.save(model, tmp_path / "source"))
    shape = moe_shapes(model)[0]
    assert shape.floor == 8
    ids = tuple(e for e in range(16) if e % 4 < 2)
    written = write(source, [KeepExperts(layer, ids) for layer in moe_layers(source)], tmp_path / "out")
    assert logits_of(original(written)).isfinite().all()


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        ((0, 1, 2, 3, 4, 5, 6, 7), r"equally many experts; this plan keeps \[4, 4, 0, 0\]"),
        ((1, 0, 4, 5, 8, 9, 12, 13), "ascending ids below 16"),
        ((0, 0, 4, 5, 8, 9, 12, 13), "ascending ids below 16"),
        ((0, 1, 4, 5, 8, 9, 12, 16), "ascending ids below 16"),
        ((-1, 1, 4, 5, 8, 9, 12, 13), "ascending ids below 16"),
        ((), "ascending ids below 16"),
    ],
)
def test_impossible_ids_are_refused(ids, says):
    with pytest.raises(ValueError, match=says):
        GROUPED.require_ids(ids)


@pytest.mark.parametrize(
    ("edits", "says"),
    [
        ([KeepExperts(0, SIX)], r"layer 0, which has no experts; MoE layers: \[1, 2\]"),
        ([KeepExperts(7, SIX)], "layer 7, which has no experts"),
        ([KeepExperts(1, SIX), KeepExperts(1, SIX)], "ascending ids below 6"),
        ([KeepExperts(1, (0, 1, 2, 4))], r"keeps \[3, 1\]"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(edits, says, sources):
    with pytest.raises(ValueError, match=says):
        check_edits(hf.skeleton(sources("deepseek_v3").config, torch.float32), edits)


@pytest.mark.parametrize("family", tiny.NO_EXPERT_EDITS)
def test_families_that_cannot_be_cut_say_why(family):
    with pytest.raises(ValueError, match=f"experts of {family} cannot be changed: its"):
        refuse_if_uneditable(AutoConfig.for_model(family))


@pytest.mark.parametrize("family", tiny.NO_EXPERT_EDITS)
def test_no_plan_is_accepted_for_them(family):
    with pytest.raises(ValueError, match="cannot be changed"):
        check_edits(hf.skeleton(tiny.make(family).config, torch.float32), [KeepExperts(0, SIX)])
