"""What every kind of edit means, against references by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import moe_compress
from moe_compress.checkpoints.load import load_model
from moe_compress.checkpoints.reader import Checkpoint, open_checkpoint
from moe_compress.edits.apply import apply_edits
from moe_compress.edits.edits import (
    DropLayer,
    Edit,
    KeepExperts,
    MergeExperts,
    SkipExperts,
)
from moe_compress.models import hf
from moe_compress.models.moe import MoEView, moe_views, permute_neurons
from moe_compress.models.sublayers import block_names
from support import readers, tiny
from support.edit_kinds import GROUPS, REFUSED, WEIGHTS, constants, edits_of, merge, reroutable
from support.editing import FOUR, logits_of, masked, moe_layers, original
from support.slow import DIFFERENT, slow_after, slow_families, slow_unless


def doubled(source: Checkpoint) -> PreTrainedModel:
    """The original in float64."""
    model = original(source).double()
    if reroutable(source):
        model.set_experts_implementation("batched_mm")
    return model


def edited(source: Checkpoint, edits: Sequence[Edit]) -> Tensor:
    model = doubled(source)
    apply_edits(model, edits)
    for name, value in config_lists(model.config, edits).items():
        setattr(model.config, name, value)
    return logits_of(model)


def config_lists(config: Any, edits: Sequence[Edit]) -> dict[str, Any]:
    """The layer kinds that are left, where the config lists them."""
    kept = list(range(config.num_hidden_layers))
    for edit in edits:
        if isinstance(edit, DropLayer):
            kept.pop(edit.layer)
    kinds = getattr(config, "layer_types", None)
    settable = not isinstance(getattr(type(config), "layer_types", None), property)
    return {"layer_types": [kinds[i] for i in kept]} if kinds and settable else {}


Run = Callable[[Tensor, int], Tensor]
Instead = Callable[[Run, Tensor, list[int], list[float]], Tensor]


def rerouted(view: MoEView, instead: Instead) -> None:
    """Replace the experts by a function of one token: it is given a way to run one expert, the token, ids and gates."""
    forward, count = view.experts.forward, view.num_experts

    def run(x: Tensor, expert: int) -> Tensor:
        assert 0 <= expert < count
        return forward(x[None], torch.tensor([[expert]]), torch.ones(1, 1, dtype=x.dtype))[0]

    def naive(hidden: Tensor, index_TK: Tensor, gate_TK: Tensor) -> Tensor:
        tokens = zip(hidden.flatten(0, -2), index_TK.tolist(), gate_TK.tolist(), strict=True)
        return torch.stack([instead(run, x, ids, gates) for x, ids, gates in tokens]).view_as(hidden)

    view.experts.forward = naive


REROUTABLE = [family for family in tiny.EDITABLE if family != "llama4_text"]


def mean_experts(view: MoEView, everyone: bool) -> None:
    """Let the representatives, or every member of a group, be the group's weighted mean."""
    for name, tensor in view.experts.named_parameters(recurse=False):
        for group, shares in zip(GROUPS, WEIGHTS, strict=True):
            mean = sum(share * tensor[e] for e, share in zip(group, shares, strict=True)) / sum(shares)
            for expert in group if everyone else group[:1]:
                tensor[expert] = mean
        assert name.startswith(("gate_up", "up", "down"))


@torch.no_grad()
@pytest.mark.parametrize("family", slow_families(REROUTABLE))
def test_merging_with_summed_gates_is_every_member_replaced_by_the_mean(family, sources):
    source = sources(family)
    layer = moe_layers(source)[0]
    model = doubled(source)
    mean_experts(moe_views(model)[layer], everyone=True)
    expected = logits_of(model)
    assert (expected - logits_of(doubled(source))).abs().max() > 1e-4
    torch.testing.assert_close(edited(source, [merge(layer, "sum")]), expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", slow_families(tiny.EDITABLE))
def test_merging_into_a_centroid_is_dropping_the_others(family, sources):
    source = sources(family)
    layer = moe_layers(source)[0]
    model = doubled(source)
    mean_experts(moe_views(model)[layer], everyone=False)
    with masked(model, [KeepExperts(layer, tuple(group[0] for group in GROUPS))]):
        expected = logits_of(model)
    torch.testing.assert_close(edited(source, [merge(layer, "centroid")]), expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", slow_families(REROUTABLE))
def test_dropped_experts_leave_their_constants(family, sources):
    source = sources(family)
    layer = moe_layers(source)[0]
    arrays = constants(source, 4)
    dropped = [e for e in range(tiny.EXPERTS) if e not in FOUR]

    def instead(run: Run, x: Tensor, ids: list[int], gates: list[float]) -> Tensor:
        def output(e: int) -> Tensor:
            return run(x, e) if e in FOUR else arrays["outputs"][dropped.index(e)].double()

        return sum(g * output(e) for e, g in zip(ids, gates, strict=True))

    model = doubled(source)
    rerouted(moe_views(model)[layer], instead)
    expected = logits_of(model)
    got = edited(source, [KeepExperts(layer, FOUR, True, arrays=arrays)])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-7)


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "renormalise"), slow_unless(lambda family, _: family in DIFFERENT, REROUTABLE, [True, False])
)
def test_weak_experts_are_skipped(family, renormalise, sources, tmp_path):
    source = sources(family)
    if family == "phimoe":  # else both of its gates are one
        source = open_checkpoint(tiny.save(tiny.make(family, router_jitter_noise=0.5), tmp_path))
    layer = moe_layers(source)[0]
    threshold = 0.95 if family == "minimax_m2" else 0.7  # its gates differ little
    skipped = [0, 0]

    def instead(run: Run, x: Tensor, ids: list[int], gates: list[float]) -> Tensor:
        left = [(e, g) for e, g in zip(ids, gates, strict=True) if g >= threshold * max(gates)]
        skipped[0] += len(ids) - len(left)
        skipped[1] += len(ids)
        scale = sum(gates) / sum(g for _, g in left) if renormalise else 1.0
        return sum(scale * g * run(x, e) for e, g in left)

    model = doubled(source)
    rerouted(moe_views(model)[layer], instead)
    expected = logits_of(model)
    assert 0 < skipped[0] < skipped[1] / 2
    # Gates reach the experts in fp32 in some families, so a ratio near the threshold has no more digits than that.
    got = edited(source, [SkipExperts(layer, threshold, renormalise)])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def silenced(module: nn.Module) -> None:
    """A module that returns zeros."""

    def zeros(_module: nn.Module, _args: Any, output: Any) -> Any:
        return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)

    module.register_forward_hook(zeros)


def passing(module: nn.Module) -> None:
    """A module that returns what it was given, also of what the layer before hands on."""

    def same(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, kwargs["prev_topk_indices"]) if isinstance(output, tuple) else hidden

    module.register_forward_hook(same, with_kwargs=True)


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "part"), slow_unless(lambda family, _: family in DIFFERENT, tiny.EDITABLE, ["moe", "attention"])
)
def test_a_sublayer_that_is_gone_adds_nothing(family, part, sources):
    source = sources(family)
    kind = f"skip {part}"
    if (family, kind) in REFUSED:
        pytest.skip("refused")
    (edit,) = edits_of(kind, source)
    model = doubled(source)
    layer, names = hf.decoder_layers(model)[edit.layer], block_names(model)
    silenced(layer.get_submodule(names["block" if part == "moe" else "attention"]))
    if part == "moe" and hasattr(layer, "shared_mlp"):
        silenced(layer.shared_mlp)
    if family == "minimax":  # its stream itself passes through the norm, and is scaled
        passing(layer.post_attention_layernorm if part == "moe" else layer.input_layernorm)
        setattr(layer, "mlp_alpha_factor" if part == "moe" else "attn_alpha_factor", 1.0)
    expected = logits_of(model)
    assert (expected - logits_of(doubled(source))).abs().max() > 1e-4
    torch.testing.assert_close(edited(source, [edit]), expected, rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "place"),
    slow_unless(lambda family, place: place == 0 or family in DIFFERENT, tiny.EDITABLE, [0, 1, -1]),
)
def test_a_layer_that_is_gone_is_passed_by(family, place, sources):
    source = sources(family)
    model = doubled(source)
    layer = place % len(hf.decoder_layers(model))
    passing(hf.decoder_layers(model)[layer])
    expected = logits_of(model)
    torch.testing.assert_close(edited(source, [DropLayer(layer)]), expected, rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("family", [family for family in REROUTABLE if family != "deepseek_v3"])
def test_merged_experts_can_be_dropped_with_all_their_router_rows(family, sources):
    source = sources(family)
    layer = moe_layers(source)[0]
    kept = (0, 2, 3, 5)  # of the merged ones: 0 and 1, 3, 4 and 5, 7
    model = doubled(source)
    mean_experts(moe_views(model)[layer], everyone=True)
    with masked(model, [KeepExperts(layer, (0, 1, 3, 4, 5, 7))]):
        expected = logits_of(model)
    edits = [merge(layer, "sum"), KeepExperts(layer, kept)]
    torch.testing.assert_close(edited(source, edits), expected, rtol=0, atol=1e-5)
    final = doubled(source)
    apply_edits(final, edits)
    view = moe_views(final)[layer]
    assert (view.num_experts, view.router_rows, view.row_to_expert) == (4, 6, [0, 0, 1, 2, 2, 3])


PAIRS = ((0, 5), (1, 4), (2, 7), (3, 6))  # each across DeepSeek-V3's groups, which router=sum need not respect


def with_duplicates(family: str, permuted: bool) -> PreTrainedModel:
    """A tiny model with four pairs of equal experts, whose neurons may stand in another order; routers as they were."""
    model = tiny.make(family, vocab_size=readers.VOCAB)
    generator = torch.Generator().manual_seed(7)
    for view in moe_views(model).values():
        with torch.no_grad():
            for name, tensor in view.experts.named_parameters(recurse=False):
                for one, other in PAIRS:
                    tensor[other] = tensor[one]
                assert "proj" in name
            if permuted:
                order = torch.stack([torch.randperm(tiny.INNER, generator=generator) for _ in range(tiny.EXPERTS)])
                permute_neurons(view, order)
    return model


@torch.no_grad()
@pytest.mark.parametrize("family", REROUTABLE)
def test_merging_duplicates_with_summed_gates_loses_nothing(family, sources):
    model = doubled(sources(family))
    for view in moe_views(model).values():
        for tensor in view.experts.parameters(recurse=False):
            for one, other in PAIRS:
                tensor[other] = tensor[one]
    expected = logits_of(model)
    for layer in moe_views(model):
        apply_edits(model, [MergeExperts(layer, PAIRS, ((1.0, 3.0),) * 4, "sum")])
    assert {view.num_experts for view in moe_views(model).values()} == {4}
    # Means are taken in fp32.
    torch.testing.assert_close(logits_of(model), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "align"),
    slow_after(2, [("mixtral", "weights"), ("mixtral", "activations"), ("mixtral", "both"), ("gpt_oss", "weights"),
     ("nemotron_h", "weights"), ("deepseek_v3", "both")]),
)  # fmt: skip
def test_permuted_duplicates_are_aligned_and_merged_without_loss(family, align, options, tmp_path):
    """Through the whole recipe; without alignment much is lost."""
    folder = tiny.save(with_duplicates(family, permuted=True), tmp_path / "model")
    readers.tokenizer().save_pretrained(folder)
    words = {**options, "model": folder, "eval": False}
    sentence = "expert_merge keep=4 router=sum average=uniform"
    aligned = moe_compress.compress(f"{sentence} align={align}", **words).folder
    groups = json.loads((aligned / "plan.json").read_text())["stages"][0]["report"]["groups"]
    assert all(sorted(sorted(pair) for pair in found) == sorted(map(list, PAIRS)) for found in groups.values())
    expected = logits_of(load_model(folder, torch.float32))
    torch.testing.assert_close(logits_of(load_model(aligned, torch.float32)), expected, rtol=0, atol=2e-5)
    if (family, align) == ("mixtral", "weights"):
        plain = moe_compress.compress(sentence, **words).folder
        assert (logits_of(load_model(plain, torch.float32)) - expected).abs().max() > 1e-2


def test_a_trainable_model_in_memory_is_aligned_too(sources):
    """As stock transformers loads it, and outside of no_grad."""
    model = original(sources("mixtral"))
    order_EF = torch.arange(tiny.INNER).flip(0).repeat(tiny.EXPERTS, 1)
    assert all(parameter.requires_grad for parameter in model.parameters())
    apply_edits(model, [MergeExperts(0, GROUPS, WEIGHTS, "sum", aligned=True, arrays={"order": order_EF})])
