"""Weight pruning from end to end, against naive references in float64, and what every recipe of it must keep to."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import moe_compress
import naive_pruning as slow
import readers
import tiny
from editing import logits_of
from moe_compress.calibration.input_moments import Moments
from moe_compress.checkpoints import safetensors_file, writer
from moe_compress.checkpoints.folder import MANIFEST, SCRATCH
from moe_compress.checkpoints.load import load_model
from moe_compress.checkpoints.reader import open_checkpoint
from moe_compress.compression.weights import sparsity_sensitivity, stage
from moe_compress.data.windows import Windows
from moe_compress.engine import forward
from moe_compress.methods.column_solver import inverse_factor
from moe_compress.methods.pruning import masks, sparsity_allocation
from moe_compress.methods.pruning import prune as pruning
from moe_compress.methods.pruning.sparsegpt import sparsegpt
from moe_compress.methods.weight_method import MatrixGroup
from moe_compress.run.context import Run
from moe_compress.run.log import RunLog
from moe_compress.run.options import make_options
from test_resume import Interrupted, counting, leftovers, outcome

Options = dict[str, object]
Made = Callable[[str, str], Path]
WORDS = torch.randint(3, readers.VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))
PER_MATRIX = tiny.HIDDEN * tiny.INNER
FAMILIES = tiny.EDITABLE
NAMES = re.compile(r"experts\.(gate_up_proj|up_proj|down_proj)$")


@functools.cache
def _stock(folder: Path) -> PreTrainedModel:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def stock(folder: object) -> PreTrainedModel:
    """The checkpoint as stock transformers loads it, with nothing missing and nothing left over."""
    return _stock(Path(str(folder)))


def reference(folder: object) -> PreTrainedModel:
    """The same, of one's own and in float64."""
    return copy.deepcopy(stock(folder)).double()


def run_of(options: Options) -> Run:
    return Run(make_options(options).resolved(), RunLog(None))


def windows(options: Options) -> Windows:
    return run_of(options).windows("calibration", open_checkpoint(Path(str(options["model"]))))


@functools.cache
def _rows(family: str, folder: str, given: tuple[tuple[str, Any], ...]) -> dict[int, list[slow.Rows]]:
    found = windows(dict(given))
    return slow.rows(reference(folder), family, found.ids_NS, found.mask_NS)


def rows(family: str, options: Options) -> dict[int, list[slow.Rows]]:
    """What the experts of the original see of the calibration text."""
    return _rows(family, str(options["model"]), tuple(options.items()))


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text())["report"][-1]


def stored(folder: object) -> dict[str, Tensor]:
    return {k: t for path in sorted(Path(str(folder)).glob("model*.safetensors")) for k, t in load_file(path).items()}


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def changed(before: object, after: object) -> set[str]:
    """Parameters that differ, by name."""
    old, new = stock(before).state_dict(), stock(after).state_dict()
    assert old.keys() == new.keys()
    return {name for name in old if not torch.equal(old[name], new[name])}


def zero_counts(folder: object, family: str, layers: list[int]) -> Tensor:
    """Zeros of every expert's every matrix, [layers, experts, matrices]."""
    found = [slow.matrices(stock(folder), family, layer) for layer in layers]
    return torch.tensor([[[int((m == 0).sum()) for m in expert] for expert in layer] for layer in found])


def moe_layers(folder: object, family: str) -> list[int]:
    model = stock(folder)
    return [
        index
        for index, layer in enumerate(model.model.layers)
        if hasattr(getattr(layer, slow.naive.BLOCK.get(family, "mlp"), None), "experts")
    ]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [10**6, 5, 2, 1], ids="{}-values".format)
def test_exactly_so_many_go_whatever_is_tied(values):
    score = (random(6, 40).abs() * values).floor() / values
    score[:, :7] = 0
    count = torch.tensor([0, 1, 7, 20, 39, 40])
    gone = masks.lowest(score, count)
    assert torch.equal(gone.sum(1), count)
    for row, mask in zip(score, gone, strict=True):
        assert not mask.any() or mask.all() or row[mask].max() <= row[~mask].min()
        tied = mask[row == row[mask].max()] if mask.any() else mask[:0]
        assert torch.equal(tied, tied.sort(descending=True, stable=True).values)  # of equal ones the first


@pytest.mark.parametrize("values", [10**6, 3])
def test_rows_lose_equally_many(values):
    score = (random(4, 5, 12, seed=1).abs() * values).floor()
    count = torch.tensor([0, 30, 33, 60])
    gone = masks.lowest_in_rows(score, count)
    assert gone.sum((1, 2)).tolist() == count.tolist()
    assert gone.sum(2).tolist() == [[0] * 5, [6] * 5, [7, 7, 7, 6, 6], [12] * 5]
    for row, mask in zip(score.flatten(0, 1), gone.flatten(0, 1), strict=True):
        assert not mask.any() or mask.all() or row[mask].max() <= row[~mask].min()
    if values > 3:
        assert torch.equal(gone[1], slow.in_rows(score[1], 0.5))


@pytest.mark.parametrize(("kept", "group"), [(2, 4), (4, 8), (1, 4), (1, 2), (3, 24)])
@pytest.mark.parametrize("values", [10**6, 2])
def test_groups_keep_their_highest(kept, group, values):
    score = (random(3, 5, 24, seed=2).abs() * values).floor()
    gone = masks.lowest_in_groups(score, kept, group)
    assert (gone.unflatten(2, (-1, group)).sum(3) == group - kept).all()
    for b in range(3):
        assert torch.equal(gone[b], slow.in_groups(score[b], kept, group))


# --- SparseGPT -------------------------------------------------------------------------------------------------------


def pruned_both_ways(
    weights: list[Tensor], x: Tensor, share: Tensor, pattern: tuple[int, int] | None
) -> list[list[tuple[Tensor, Tensor, Tensor]]]:
    """[expert][matrix] -> (the package's weights, the reference's weights, its mask)."""
    gram = torch.stack([(one.double().T @ one.double()).float() for one in x])
    found, raised = sparsegpt(weights, gram, share, pattern, [f"expert {e}" for e in range(len(x))])
    assert raised == []
    return [
        [
            (new[e], *slow.sparsegpt(old[e], one, pattern or float(share[e])))
            for old, new in zip(weights, found, strict=True)
        ]
        for e, one in enumerate(x)
    ]


def require_same(found: list[list[tuple[Tensor, Tensor, Tensor]]], mistaken: int = 0) -> None:
    """The same masks and weights; a near tie may fall the other way in `mistaken` of the output rows."""
    for new, expected, mask in itertools.chain.from_iterable(found):
        assert new.dtype == torch.float32
        right = ((new == 0) == (expected == 0)).all(1)
        assert int((~right).sum()) <= mistaken
        assert torch.equal((expected == 0), mask) or bool((expected == 0)[mask].all())
        torch.testing.assert_close(new[right].double(), expected[right], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pattern", [None, (2, 4), (4, 8), (1, 4)], ids=str)
@pytest.mark.parametrize("inputs", [24, 128, 200])
def test_sparsegpt_is_that_of_the_paper(inputs, pattern):
    x = random(2, 3 * inputs, inputs, seed=3) @ (torch.eye(inputs) + 0.3 * random(inputs, inputs, seed=4))
    weights = [random(2, 6, inputs, seed=5), random(2, 9, inputs, seed=6)]
    require_same(pruned_both_ways(weights, x, torch.tensor([0.5, 0.5]), pattern), mistaken=1)


@pytest.mark.parametrize("inputs", [40, 160])
def test_sparsegpt_with_a_share_for_each_expert(inputs):
    share = torch.tensor([0.0, 0.1, 0.37, 0.9], dtype=torch.float64)
    x, weights = random(4, 2 * inputs, inputs, seed=7), [random(4, 7, inputs, seed=8), random(4, 5, inputs, seed=9)]
    found = pruned_both_ways(weights, x, share, None)
    require_same(found, mistaken=1)
    for one, part in zip(found, share.tolist(), strict=True):
        assert [int((new == 0).sum()) for new, _, _ in one] == [round(part * len(new) * inputs) for new, _, _ in one]
    assert all(torch.equal(new, weight[0]) for (new, _, _), weight in zip(found[0], weights, strict=True))


@pytest.mark.parametrize("pattern", [None, (2, 4)], ids=str)
def test_sparsegpt_where_inputs_are_dead_or_rows_few(pattern):
    x, weights = random(3, 40, 32, seed=10), [random(3, 8, 32, seed=11)]
    x[0, :, [3, 4, 5, 17]] = 0
    x[1, 12:] = 0  # a Gram matrix of rank 12
    x[2] = 0
    found = pruned_both_ways(weights, x, torch.full((3,), 0.5), pattern)
    require_same(found[:2], mistaken=1)  # of the third, whose weights all cost nothing, any may go
    for (new, _, mask), dead in zip(itertools.chain.from_iterable(found), (x == 0).all(1), strict=True):
        assert int((new == 0).sum()) == int(mask.sum()) == mask.numel() // 2
        assert pattern or bool(mask[:, dead].all()) or bool(dead.all())


def test_what_is_never_used_goes_before_anything_else():
    """Even the largest weights, and without a trace: nothing has to make up for them."""
    x, weight = random(1, 60, 16, seed=12), random(1, 6, 16, seed=13)
    x[..., 5] = 0
    weight[..., 5] = 100
    found, _ = sparsegpt([weight], x.transpose(1, 2) @ x, torch.tensor([1 / 16]), None, ["it"])
    expected = weight.clone()
    expected[..., 5] = 0
    torch.testing.assert_close(found[0], expected)


def test_what_is_pruned_together_is_pruned_as_if_alone():
    x, weights = random(3, 90, 48, seed=14), [random(3, 6, 48, seed=15), random(3, 10, 48, seed=16)]
    gram, share = x.transpose(1, 2) @ x, torch.full((3,), 0.4)
    both, _ = sparsegpt(weights, gram, share, None, ["a", "b", "c"])
    for weight, together in zip(weights, both, strict=True):
        for e in range(3):
            (alone,), _ = sparsegpt([weight[e : e + 1]], gram[e : e + 1], share[:1], None, ["a"])
            torch.testing.assert_close(together[e], alone[0], rtol=1e-4, atol=1e-5)


def test_making_up_for_what_is_lost_pays():
    x = random(300, 16, seed=17) @ random(16, 64, seed=18) + 0.3 * random(300, 64, seed=19)
    weight = random(12, 64, seed=20)
    (new,), _ = sparsegpt([weight[None]], (x.T @ x)[None], torch.tensor([0.5]), None, ["it"])
    masked = weight.masked_fill(slow.wanda(weight, x, 0.5), 0)
    assert slow.loss(weight, new[0], x) < 0.5 * slow.loss(weight, masked, x)


def test_damping_is_raised_once_and_said():
    gram = torch.eye(8).repeat(3, 1, 1)
    gram[1, 0, 0] = -0.05  # not definite with a damping of 0.01, definite with 0.1
    factor, raised = inverse_factor(gram, ["a", "b", "c"])
    assert raised == [1]
    damping = 0.1 * gram[1].diagonal().mean()
    inverse = torch.linalg.inv(gram[1] + damping * torch.eye(8))
    torch.testing.assert_close(factor[1].T @ factor[1], inverse, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(factor[0].T @ factor[0], torch.eye(8) / 1.01)
    assert torch.equal(factor, factor.triu())


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -5.0])
def test_a_gram_matrix_that_nothing_saves(wrong):
    gram = torch.eye(8).repeat(3, 1, 1)
    gram[2, 4, 4] = wrong
    names = [f"expert {e} of layer 7" for e in range(3)]
    with pytest.raises(ValueError, match="the Gram matrix of expert 2 of layer 7 is singular or holds NaN"):
        sparsegpt([random(3, 4, 8)], gram, torch.full((3,), 0.5), None, names)


@pytest.mark.parametrize("share", [None, 0.5])
def test_counts_are_where_the_scores_are(share, monkeypatch):
    """Without a GPU: on tensors that have a device and no values."""
    places = []

    def lowest(score: Tensor, count: Tensor) -> Tensor:
        places.append((score.device.type, count.device.type))
        return torch.zeros_like(score, dtype=torch.bool)

    monkeypatch.setattr(sys.modules[sparsegpt.__module__], "lowest", lowest)
    monkeypatch.setattr(sys.modules[sparsegpt.__module__], "inverse_factor", lambda gram, _names: (gram, []))
    sparsity_B = None if share is None else torch.full((2,), share, dtype=torch.float64)
    weights, gram = [torch.empty(2, 6, 8, device="meta")], torch.empty(2, 8, 8, device="meta")
    pruning.prune(MatrixGroup(["a", "b"], weights, gram, sparsity_B), method="sparsegpt", sparsity=0.5)
    assert places == [("meta", "meta")]


# --- every family ----------------------------------------------------------------------------------------------------


METHODS = ("magnitude", "wanda", "sparsegpt")
KINDS = ("sparsity=0.5", "pattern=2:4")
# Every method and both ways to say how much on some families; one of these six runs on each of the others.
SIX = [f"prune method={method} {kind}" for kind in KINDS for method in METHODS]
RUNS = [
    (family, sentence)
    for number, family in enumerate(FAMILIES)
    for place, sentence in enumerate(SIX)
    if family in ("mixtral", "gpt_oss") or (place - number) % 6 == 0
]


@pytest.mark.parametrize(("family", "sentence"), RUNS)
def test_experts_are_pruned_and_nothing_else(family, sentence, lab, made):
    folder, model = made(family, sentence), lab(family)["model"]
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["form"] == "plain" and not list(folder.glob("scratch"))
    before, after = stored(model), stored(folder)
    assert {k: (t.dtype, t.shape) for k, t in before.items()} == {k: (t.dtype, t.shape) for k, t in after.items()}
    names = changed(model, folder)
    layers = moe_layers(model, family)
    assert names == {name for name in stock(model).state_dict() if NAMES.search(name)} and layers
    assert logits_of(stock(folder), WORDS).isfinite().all()
    for layer in layers:
        pairs = zip(
            slow.matrices(stock(model), family, layer), slow.matrices(stock(folder), family, layer), strict=True
        )
        for old, new in itertools.chain.from_iterable(zip(*pair, strict=True) for pair in pairs):
            zero = new == 0
            # What an expert of Nemotron's never uses goes on top: it counts for nothing.
            assert int(zero.sum()) == PER_MATRIX // 2 or (family == "nemotron_h" and zero.sum() > PER_MATRIX // 2)
            if "pattern" in sentence:
                groups = zero.unflatten(1, (-1, 4)).sum(2)
                assert bool((groups == 2).all()) or (family == "nemotron_h" and bool((groups >= 2).all()))
            if "sparsegpt" not in sentence:
                assert torch.equal(new, old.masked_fill(zero, 0))
            if "magnitude" in sentence:
                share = (2, 4) if "pattern" in sentence else 0.5
                assert torch.equal(zero, slow.magnitude(old, share))
    zeros = zero_counts(folder, family, layers).sum((1, 2)).double() / zero_counts(folder, family, layers)[0].numel()
    said = report(folder)
    assert said["sparsity_by_layer"] == pytest.approx(
        {str(layer): float(z) / PER_MATRIX for layer, z in zip(layers, zeros, strict=True)}
    )
    assert said["sparsity"] == pytest.approx({"experts": float(zeros.mean()) / PER_MATRIX})


@pytest.mark.parametrize("family", tiny.NO_EXPERT_EDITS)
@pytest.mark.parametrize("words", ["", " method=magnitude where=experts", " where=attention"])
def test_families_that_cannot_be_told_apart_are_refused(family, words, lab, tmp_path):
    options = {**lab(family), "out": str(tmp_path / "out")}
    with pytest.raises(ValueError, match=f"experts of {family} cannot be"):
        moe_compress.compress(f"prune{words}", **options)
    assert not any(tmp_path.iterdir())


NAIVE = ("mixtral", "deepseek_v3", "gpt_oss", "llama4_text", "qwen2_moe", "granitemoe", "nemotron_h")


def agreement(
    family: str, folder: Path, model: object, seen: Mapping[int, list[slow.Rows]], share: slow.Share = 0.5
) -> tuple[int, int]:
    """Of the entries of Wanda's masks: how many are those of the reference, of how many; experts that saw tokens."""
    same = whole = 0
    for layer, experts in seen.items():
        before, after = slow.matrices(stock(model), family, layer), slow.matrices(stock(folder), family, layer)
        for old, new, found in zip(before, after, experts, strict=True):
            if not found.gates:
                continue
            for n, (was, now) in enumerate(zip(old, new, strict=True)):
                expected = slow.wanda(was, found.source(down=n == len(old) - 1), share)
                same += int(((now == 0) == expected).sum())
                whole += expected.numel()
    return same, whole


@pytest.mark.parametrize(
    ("family", "share"), [*((family, 0.5) for family in NAIVE), ("deepseek_v3", (2, 4)), ("gpt_oss", (2, 4))]
)
def test_wanda_is_that_of_the_paper_on_each_expert_s_own_tokens(family, share, lab, made):
    kind = "sparsity=0.5" if share == 0.5 else "pattern=2:4"
    folder = made(family, f"prune {kind} propagate=original")
    same, whole = agreement(family, folder, lab(family)["model"], rows(family, lab(family)), share)
    assert whole >= len(moe_layers(folder, family)) * 4 * PER_MATRIX and same >= 0.999 * whole


@pytest.mark.parametrize("family", NAIVE)
def test_sparsegpt_is_that_of_the_paper_on_each_expert_s_own_tokens(family, lab, made):
    folder, model, seen = made(family, "prune method=sparsegpt propagate=original"), lab(family)["model"], {}
    seen = rows(family, lab(family))
    layer = min(seen)
    same = whole = close = 0
    before, after = slow.matrices(stock(model), family, layer), slow.matrices(stock(folder), family, layer)
    for old, new, found in zip(before, after, seen[layer], strict=True):
        if not found.gates:
            continue
        for n, (was, now) in enumerate(zip(old, new, strict=True)):
            inputs = found.source(down=n == len(old) - 1)
            left, mask = slow.sparsegpt(was, inputs / len(inputs) ** 0.5, 0.5)
            right = ((now == 0) == (left == 0)).all(1)
            same += int(((now == 0) == (left == 0)).sum())
            close += int(((now - left).abs() < 1e-3 * (1 + left.abs()))[right].sum())
            whole += mask.numel()
    assert whole >= 3 * PER_MATRIX and same >= 0.99 * whole and close >= 0.9 * whole


def test_padding_does_not_count(lab, tmp_path):
    options = {**lab("mixtral"), "pack": False, "length": 48, "out": str(tmp_path / "out")}
    found = windows(options)
    assert not bool(found.mask_NS.all())
    folder, seen = moe_compress.compress("prune propagate=original", **options).folder, rows("mixtral", options)
    same, whole = agreement("mixtral", folder, options["model"], seen)
    assert same >= 0.999 * whole
    padded = slow.rows(reference(options["model"]), "mixtral", found.ids_NS, torch.ones_like(found.mask_NS))
    assert agreement("mixtral", folder, options["model"], {0: padded[0]})[0] < 0.99 * whole / 3
    assert report(folder)["calibration"]["tokens"] == int(found.mask_NS.sum())


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_compressed_means_what_comes_out_of_the_layers_before(family, lab, made):
    options = lab(family)
    folder = made(family, "prune propagate=compressed sparsity=0.75")
    model, done, found = reference(options["model"]), stock(folder), windows(options)
    first, *later = moe_layers(folder, family)
    untouched = rows(family, options)
    for layer in later:
        for earlier in range(layer):
            model.model.layers[earlier].load_state_dict(done.model.layers[earlier].state_dict())
        seen = slow.rows(model, family, found.ids_NS, found.mask_NS)
        same, whole = agreement(family, folder, options["model"], {layer: seen[layer]}, 0.75)
        assert same >= 0.999 * whole
        assert agreement(family, folder, options["model"], {layer: untouched[layer]}, 0.75)[0] < 0.999 * whole
    same, whole = agreement(family, folder, options["model"], {first: untouched[first]}, 0.75)
    assert same >= 0.999 * whole


# --- other parts of a layer ------------------------------------------------------------------------------------------


ATTENTION, DENSE = r"self_attn\.(.*_proj\w*)\.weight", r"layers\.0\.mlp\.(gate|up|down)_proj\.weight"
PARTS: list[Any] = [
    ("deepseek_v3", "where=shared", r"shared_experts\..*weight"),
    ("deepseek_v3", "where=attention", ATTENTION),
    ("deepseek_v3", "where=dense", DENSE),
    ("deepseek_v3", "where=router", r"mlp\.gate\.weight"),
    ("deepseek_v3", "where=all spare=attention,experts", rf"shared_experts\..*weight|{DENSE}"),
    ("deepseek_v3", "where=experts,router spare=router", NAMES.pattern),
    ("qwen2_moe", "where=shared", r"shared_expert\..*weight"),
    ("qwen2_moe", "where=router", r"mlp\.gate\.weight|shared_expert_gate\.weight"),
    ("qwen2_moe", "where=all", rf"shared_expert\..*weight|{ATTENTION}|{NAMES.pattern}"),
    ("llama4_text", "where=shared,router", r"shared_expert\..*weight|router\.weight"),
    ("hunyuan_v1_moe", "where=shared,router", r"shared_mlp\..*weight|mlp\.gate\.wg\.weight"),
    ("granitemoeshared", "where=shared", r"shared_mlp\..*weight"),
    ("gpt_oss", "where=attention,router", rf"{ATTENTION}|mlp\.router\.weight"),
    ("jamba", "where=dense", r"feed_forward\.(gate|up|down)_proj\.weight"),
    ("nemotron_h", "where=shared", r"shared_experts\..*weight"),
]


@pytest.mark.parametrize(("family", "words", "pattern"), PARTS)
def test_where_says_what_is_pruned(family, words, pattern, lab, made):
    model, folder = lab(family)["model"], made(family, f"prune {words}")
    names = changed(model, folder)
    assert names == {name for name in stock(model).state_dict() if re.search(pattern, name)} and names
    state = stock(folder).state_dict()
    for name in names:
        assert NAMES.search(name) or int((state[name] == 0).sum()) == state[name].numel() // 2
    assert all(share == 0.5 for share in report(folder)["sparsity"].values())
    assert bool(report(folder)["routing_change"]) == ("router" in report(folder)["sparsity"])


@pytest.mark.parametrize("family", ["mixtral", "qwen3_next", "afmoe", "lfm2_moe", "minimax", "phimoe", "ernie4_5_moe"])
def test_all_is_every_matrix_but_the_routers(family, lab, made):
    model, folder = lab(family)["model"], made(family, "prune method=magnitude where=all sparsity=0.25")
    expected = set()
    for i, layer in enumerate(stock(model).model.layers):
        block = slow.naive.BLOCK.get(family, "mlp")
        router = f"{block}.{slow.naive.ROUTER.get(family, 'gate')}"
        has_experts = hasattr(getattr(layer, block, None), "experts")
        for name, module in layer.named_modules():
            gate = has_experts and (name.startswith(router) or getattr(module, "out_features", 0) == 1)
            if isinstance(module, nn.Linear) and not gate:
                expected.add(f"model.layers.{i}.{name}.weight")
        expected |= {f"model.layers.{i}.{n}" for n, _ in layer.named_parameters() if NAMES.search(n)}
    assert changed(model, folder) == expected
    state = stock(folder).state_dict()
    assert {int((state[name] == 0).sum()) * 4 - state[name].numel() for name in expected} == {0}


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "llama4_text"])
@torch.no_grad()
def test_what_a_pruned_router_changes(family, lab, made):
    model, folder, found = lab(family)["model"], made(family, "prune where=router sparsity=0.75"), windows(lab(family))
    before, after = reference(model), reference(folder)
    layer = moe_layers(folder, family)[0]
    tokens, _ = slow.entering(before, family, found.ids_NS)[layer]
    flips, overlap, kl = [], [], []
    for x in tokens:
        (old, old_logits), (new, new_logits) = (slow.routing(m, family, layer, x) for m in (before, after))
        flips.append(set(old.ids) != set(new.ids))
        overlap.append(len(set(old.ids) & set(new.ids)) / len(old.ids))
        p, q = old_logits.double().softmax(0), new_logits.double().softmax(0)
        kl.append(float((p * (p / q).log()).sum()))
    said = report(folder)["routing_change"]
    assert sorted(map(int, said)) == moe_layers(folder, family)
    assert 0 < said[str(layer)]["flips"] == pytest.approx(np.mean(flips), abs=0.5 / len(tokens))
    assert said[str(layer)]["overlap"] == pytest.approx(np.mean(overlap), abs=0.5 / len(tokens))
    assert 0 < said[str(layer)]["kl"] == pytest.approx(np.mean(kl), rel=1e-3)


# --- the same again --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("mixtral", "method=sparsegpt"),
        ("deepseek_v3", "where=experts,shared propagate=original shrink=8 min_tokens=20"),
        ("gpt_oss", "method=sparsegpt pattern=2:4 min_tokens=20"),
        ("granitemoe", "allocate=utilisation where=experts,router"),
    ],
)
def test_a_few_experts_at_a_time_or_all_at_once(family, words, made):
    folder, other = made(family, f"prune {words}"), made(family, f"prune {words} experts_at_once=3")
    one, parts = stored(folder), stored(other)
    for name in one:
        assert torch.equal(one[name] == 0, parts[name] == 0), name
        torch.testing.assert_close(one[name], parts[name], rtol=2e-3, atol=2e-4)
    first, second = report(folder), report(other)
    assert first.pop("routing_change").keys() == second.pop("routing_change").keys() and first == second


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_two_runs_write_the_same_bytes(family, lab, made, tmp_path):
    """The second is told in the YAML that the first one wrote, and measures everything anew."""
    sentence = "prune method=sparsegpt where=experts,router allocate=both"
    folder = made(family, sentence)
    again = {"out": tmp_path / "again", "results": tmp_path / "elsewhere"}
    found = moe_compress.compress(str(folder / "recipe.yaml"), **again).folder
    one, other = outcome(folder), outcome(found)
    assert [name for name in one if one[name] != other.get(name)] == [] and report(folder) == report(found)


STOPPED = {
    "compressed": "prune method=sparsegpt",
    "original": "prune propagate=original experts_at_once=3",
    "router": "prune where=experts,router",
    "allocated": "prune allocate=sensitivity",
    "nothing": "prune method=magnitude where=all",
}
# Runs of a layer per layer, before the first one counts, and what a layer of several runs begins with.
RUNS_PER_LAYER = {"compressed": 2, "original": 3, "router": 4, "allocated": 2, "nothing": 0}


@pytest.fixture(scope="module")
def whole(lab, tmp_path_factory) -> Callable[[str], tuple[dict[str, bytes], dict[str, Any]]]:
    """name -> the outcome of its recipe and what is reported, never interrupted."""
    place = tmp_path_factory.mktemp("whole")

    @functools.cache
    def of(name: str) -> tuple[dict[str, bytes], dict[str, Any]]:
        folder = moe_compress.compress(STOPPED[name], **{**lab("mixtral"), "out": place / name}).folder
        return outcome(folder), report(folder)

    return of


def stopped_run(
    name: str, point: tuple[object, str, int], options: Options, monkeypatch: pytest.MonkeyPatch
) -> tuple[int, int, Path]:
    """Stop a run somewhere and run it again; returns how many layers that ran and wrote, and the checkpoint."""
    place, function, number = point
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        counting(patch, place, function, stop_at=number)
        moe_compress.compress(STOPPED[name], **options)
    assert not Path(str(options["out"])).exists()
    with monkeypatch.context() as patch:
        layers, written = counting(patch, forward.hf, "run_layer"), counting(patch, writer, "write_shard")
        folder = moe_compress.compress(STOPPED[name], **options).folder
    return len(layers), len(written), folder


@pytest.mark.parametrize(
    ("name", "call"),
    [
        *(("compressed", call) for call in (0, 3, 4)),
        *(("original", call) for call in (4, 8)),
        *(("router", call) for call in (6, 11)),
        *(("allocated", call) for call in (1, 3, 6)),
    ],
)
def test_a_stopped_run_goes_on_at_its_layer(name, call, lab, whole, monkeypatch, tmp_path):
    options = {**lab("mixtral"), "results": str(tmp_path), "out": str(tmp_path / "out")}
    layers, _, folder = stopped_run(name, (forward.hf, "run_layer", call), options, monkeypatch)
    each, survey = RUNS_PER_LAYER[name], tiny.LAYERS if name == "allocated" else 0
    left = tiny.LAYERS - max(0, call - survey) // each
    assert layers == left * each + (survey if call < survey else 0)
    assert outcome(folder) == whole(name)[0] and report(folder) == whole(name)[1]
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(("name", "shard"), [("compressed", 0), ("compressed", 3), ("nothing", 1), ("nothing", 2)])
def test_a_stopped_run_goes_on_at_its_shard(name, shard, lab, whole, monkeypatch, tmp_path):
    options = {**lab("mixtral"), "results": str(tmp_path), "out": str(tmp_path / "out")}
    layers, written, folder = stopped_run(name, (writer, "write_shard", shard), options, monkeypatch)
    assert written == tiny.LAYERS + 1 - shard
    assert layers == RUNS_PER_LAYER[name] * (tiny.LAYERS - max(0, shard - 1))
    assert outcome(folder) == whole(name)[0] and report(folder) == whole(name)[1]
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "number"), [("compressed", 0), ("compressed", 2), ("allocated", 0), ("allocated", 2), ("nothing", 1)]
)
def test_a_run_stopped_between_a_layer_and_its_notes_goes_on(name, number, lab, whole, monkeypatch, tmp_path):
    options = {**lab("mixtral"), "results": str(tmp_path), "out": str(tmp_path / "out")}
    point = (stage, "write_json", number)
    _, written, folder = stopped_run(name, point, options, monkeypatch)
    done = number - (name == "allocated")
    assert written == tiny.LAYERS + (done < 0) - max(0, done)
    assert outcome(folder) == whole(name)[0] and report(folder) == whole(name)[1]


@pytest.mark.parametrize(
    ("place", "function", "number"),
    [
        (writer, "copy_companions", 0),
        (writer, "write_json", 1),
        (writer, "write_json", 2),
        (writer, "write_config", 0),
        (Path, "unlink", 0),
        (Path, "rename", 0),
    ],
)  # fmt: skip
def test_the_last_steps_do_not_begin_anew(place, function, number, lab, whole, monkeypatch, tmp_path):
    options = {**lab("mixtral"), "results": str(tmp_path), "out": str(tmp_path / "out")}
    layers, written, folder = stopped_run("compressed", (place, function, number), options, monkeypatch)
    assert outcome(folder) == whole("compressed")[0] and report(folder) == whole("compressed")[1]
    assert leftovers(tmp_path) == []
    assert (layers, written) == (0, 0)


def test_notes_that_were_left_behind_go_with_the_next_run(lab, whole, monkeypatch, tmp_path):
    options = {**lab("mixtral"), "results": str(tmp_path), "out": str(tmp_path / "out")}
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        counting(patch, writer.shutil, "rmtree", stop_at=0)
        moe_compress.compress(STOPPED["compressed"], **options)
    assert (tmp_path / "out" / SCRATCH).is_dir()
    folder = moe_compress.compress(STOPPED["compressed"], **options).folder
    assert outcome(folder) == whole("compressed")[0] and not (folder / SCRATCH).exists()


@pytest.mark.parametrize("writes", [40, 70])
def test_a_run_that_stops_between_two_tensors(writes, lab, whole, monkeypatch, tmp_path):
    options = {**lab("mixtral"), "results": str(tmp_path), "out": str(tmp_path / "out")}
    layers, _, folder = stopped_run("compressed", (safetensors_file, "_write_all", writes), options, monkeypatch)
    assert layers < 2 * tiny.LAYERS
    assert outcome(folder) == whole("compressed")[0] and leftovers(tmp_path) == []


def test_another_recipe_s_notes_are_not_taken(lab, whole, monkeypatch, tmp_path):
    options = {**lab("mixtral"), "results": str(tmp_path), "out": str(tmp_path / "out")}
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        counting(patch, forward.hf, "run_layer", stop_at=5)
        moe_compress.compress("prune method=sparsegpt sparsity=0.6", **options)
    folder = moe_compress.compress(STOPPED["compressed"], **options).folder
    assert outcome(folder) == whole("compressed")[0] and report(folder) == whole("compressed")[1]


# --- experts that see too little --------------------------------------------------------------------------------------


LONELY = 3


@pytest.fixture(scope="session")
def lonely(lab, tmp_path_factory) -> Options:
    """Options for a model whose expert LONELY of layer 0 is never chosen."""
    folder = readers.save_lonely(tmp_path_factory.mktemp("lonely") / "model", LONELY)
    return {**lab("gpt_oss"), "model": str(folder)}


def pooled(experts: list[slow.Rows]) -> slow.Rows:
    return slow.Rows([x for e in experts for x in e.inputs], [x for e in experts for x in e.inner])


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("policy", ["pooled", "magnitude", "dense"])
def test_an_expert_without_tokens(method, policy, lonely, tmp_path):
    options = {**lonely, "out": str(tmp_path / "out")}
    folder = moe_compress.compress(f"prune method={method} propagate=original unseen={policy}", **options).folder
    assert report(folder)["unseen"] == {"0": [LONELY]}
    before, after = (slow.matrices(stock(place), "gpt_oss", 0) for place in (options["model"], folder))
    everything = pooled(rows("gpt_oss", lonely)[0])
    assert not rows("gpt_oss", lonely)[0][LONELY].gates
    for n, (old, new) in enumerate(zip(before[LONELY], after[LONELY], strict=True)):
        inputs = everything.source(down=n == 2)
        if policy == "dense":
            assert torch.equal(old, new)
        elif method == "wanda":
            expected = slow.wanda(old, inputs if policy == "pooled" else torch.ones(1, old.shape[1]), 0.5)
            assert torch.equal(new, old.masked_fill(expected, 0))
        elif policy == "magnitude":
            torch.testing.assert_close(new, old.masked_fill(slow.magnitude(old, 0.5), 0))
        else:
            left, _ = slow.sparsegpt(old, inputs / len(inputs) ** 0.5, 0.5)
            assert float(((new - left).abs() < 1e-3 * (1 + left.abs())).double().mean()) > 0.97
    for e in set(range(tiny.EXPERTS)) - {LONELY}:
        assert [int((m == 0).sum()) for m in after[e]] == [PER_MATRIX // 2] * 3


def test_an_expert_without_tokens_can_be_an_error(lonely, tmp_path):
    options = {**lonely, "out": str(tmp_path / "out")}
    with pytest.raises(ValueError, match=rf"^expert {LONELY} of layer 0: fewer than 1 tokens of the calibration text"):
        moe_compress.compress("prune unseen=error", **options)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial" / "config.json").exists()


def test_fewer_tokens_than_asked_for_are_as_good_as_none(lab, made):
    seen, least = rows("deepseek_v3", lab("deepseek_v3")), 25
    folder = made("deepseek_v3", f"prune propagate=original min_tokens={least}")
    few = {str(i): [e for e, one in enumerate(experts) if len(one.gates) < least] for i, experts in seen.items()}
    assert any(few.values()) and report(folder)["unseen"] == {i: found for i, found in few.items() if found}
    for layer, experts in seen.items():
        together = pooled(experts)
        mixed = [together if len(one.gates) < least else one for one in experts]
        for one in mixed:
            one.gates = one.gates or [1.0]
        same, whole = agreement("deepseek_v3", folder, lab("deepseek_v3")["model"], {layer: mixed})
        assert same >= 0.999 * whole


@pytest.mark.parametrize("use_pooled", [True, False])
@pytest.mark.parametrize("shrink", [0.0, 5.0])
@pytest.mark.parametrize("statistic", ["input_squares", "input_grams"])
def test_mean_moments(statistic, shrink, use_pooled):
    parts = [random(rows, 4, seed=rows).double() for rows in (1, 7, 30)]

    def moment(x: Tensor) -> Tensor:
        return x.square().sum(0) if statistic == "input_squares" else x.T @ x

    total = torch.stack([moment(x) for x in parts])
    moments = Moments(torch.tensor([1, 7, 30]), total.float(), total.sum(0).float(), 38)
    found = moments.mean(shrink, torch.tensor([True, False, False]), use_pooled)
    every = total.sum(0) / 38
    flat = torch.ones(4) if statistic == "input_squares" else torch.eye(4)
    torch.testing.assert_close(found[0].double(), every if use_pooled else flat.double(), rtol=1e-5, atol=1e-6)
    for e in (1, 2):
        expected = (total[e] + shrink * every) / (len(parts[e]) + shrink)
        torch.testing.assert_close(found[e].double(), expected, rtol=1e-5, atol=1e-6)
    none = Moments(torch.zeros(3, dtype=torch.long), 0 * total, 0 * total[0], 0)
    assert torch.equal(none.mean(shrink, torch.ones(3, dtype=torch.bool), True), flat.expand(3, *flat.shape))


def test_shrinking_leads_to_what_all_experts_see(lab, made):
    options = lab("mixtral")
    folder = made("mixtral", "prune propagate=original shrink=1e6")
    seen = {layer: [pooled(experts)] * tiny.EXPERTS for layer, experts in rows("mixtral", options).items()}
    for one in itertools.chain.from_iterable(seen.values()):
        one.gates = [1.0]
    same, whole = agreement("mixtral", folder, options["model"], seen)
    own, _ = agreement("mixtral", folder, options["model"], rows("mixtral", options))
    assert same >= 0.999 * whole > own


# --- how many weights each expert loses -------------------------------------------------------------------------------


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


ALLOCATED = [("mixtral", allocate) for allocate in ("utilisation", "sensitivity", "both", "owl")]
ALLOCATED += [("deepseek_v3", "utilisation"), ("gpt_oss", "sensitivity"), ("nemotron_h", "both")]


@pytest.mark.parametrize(("family", "allocate"), ALLOCATED)
def test_as_many_zeros_as_if_all_were_alike(family, allocate, lab, made):
    method = "sparsegpt" if family in ("mixtral", "gpt_oss") else "wanda"
    words = f"prune method={method} sparsity=0.43 spread=0.3"
    folder, layers = made(family, f"{words} allocate={allocate}"), moe_layers(lab(family)["model"], family)
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


@pytest.mark.parametrize("allocate", ["sensitivity", "both", "owl"])
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


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "nemotron_h", "llama4_text"])
def test_sensitivity_is_what_the_experts_would_add_differently(family, lab, monkeypatch):
    """Squared change of an expert's contributions, a token, over the energy of the stream."""
    tables: dict[int, Tensor] = {}
    choose = sparsity_allocation.choose

    def seen(costs: Mapping[int, Tensor], levels: list[float]) -> dict[int, Tensor]:
        tables.update(costs)
        return choose(costs, levels)

    monkeypatch.setattr(sparsity_allocation, "choose", seen)
    options, level = lab(family), 4
    stage = moe_compress.recipe.parse("prune allocate=sensitivity", (), options).stages[0]
    sparsity_sensitivity.expert_sparsities(stage, open_checkpoint(Path(str(options["model"]))), run_of(options))
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


# --- with other stages ------------------------------------------------------------------------------------------------


BEFORE = [
    ("mixtral", "expert_drop keep=6"),
    ("deepseek_v3", "expert_drop score=weight_norm keep=4"),
    ("mixtral", "expert_drop keep=4 novice=mean"),
    ("gpt_oss", "expert_drop keep=4 novice=mean"),
    ("mixtral", "expert_drop score=weight_norm keep=4 budget=global"),
    ("mixtral", "expert_merge preset=hc_smoe keep=4"),
    ("gpt_oss", "expert_merge keep=4"),
    ("mixtral", "layer_drop layers=1"),
    ("qwen3_moe", "block_drop layers=1"),
    ("olmoe", "skip beta=0.6"),
    ("deepseek_v2", "top_k mean=1.5"),
]


@pytest.mark.parametrize(
    ("family", "before", "words"),
    [(*one, "method=wanda where=experts,router") for one in BEFORE]
    + [(*one, "method=magnitude") for one in BEFORE[4:5]]
    + [(*one, "method=sparsegpt") for one in BEFORE[5:6]],
)
def test_pruning_after_other_stages(family, before, words, lab, made, tmp_path):
    """Only matrices change: the pruned checkpoint is loaded as the other one is, by the same code."""
    first = made(family, before)
    options = {**lab(family), "model": str(first), "out": str(tmp_path / "out")}
    folder = moe_compress.compress(f"prune {words}", **options).folder
    old, one = stored(first), stored(folder)
    if words == "method=sparsegpt":
        sentence = f"{before} + prune {words}"
        both = stored(moe_compress.compress(sentence, **{**lab(family), "out": tmp_path / "both"}).folder)
        assert one.keys() == both.keys() and all(same_bits(one[name], both[name]) for name in one)
    assert {k: (t.dtype, t.shape) for k, t in old.items()} == {k: (t.dtype, t.shape) for k, t in one.items()}
    differ = {name for name in old if not same_bits(old[name], one[name])}
    zeros = sum(int((one[name] == 0).sum()) - int((old[name] == 0).sum()) for name in differ)
    weights = sum(old[name].numel() for name in differ)
    assert differ and zeros * 2 == weights and not any("norm" in n or "embed" in n or "bias" in n for n in differ)
    assert logits_of(load_model(folder, torch.float32), WORDS).isfinite().all()
    assert json.loads((folder / "config.json").read_text()) == json.loads((first / "config.json").read_text())


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_dropping_experts_keeps_the_zeros_of_the_others(family, made):
    folder = made(family, "prune pattern=2:4 method=sparsegpt + expert_drop score=weight_norm keep=5")
    pruned = made(family, "prune pattern=2:4 method=sparsegpt")
    edits = json.loads((folder / "plan.json").read_text())["stages"][-1]["edits"]
    assert len(edits) == tiny.LAYERS
    for edit in edits:
        before = slow.matrices(stock(pruned), family, edit["layer"])
        after = slow.matrices(stock(folder), family, edit["layer"])
        for e, new in zip(edit["experts"], after, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(before[e], new, strict=True))


@pytest.mark.parametrize("words", ["method=magnitude", "pattern=2:4 propagate=original"])
def test_pruning_twice_the_same_way_changes_nothing_and_more_takes_more(words, made):
    once, twice = made("mixtral", f"prune {words}"), made("mixtral", f"prune {words} + prune {words}")
    assert all(same_bits(t, stored(twice)[name]) for name, t in stored(once).items())
    more = made("mixtral", f"prune {words} + prune method=sparsegpt sparsity=0.75")
    for layer in range(tiny.LAYERS):
        pairs = zip(*(slow.matrices(stock(f), "mixtral", layer) for f in (once, more)), strict=True)
        for old, new in itertools.chain.from_iterable(zip(*pair, strict=True) for pair in pairs):
            assert int((new == 0).sum()) == PER_MATRIX * 3 // 4
            assert bool((new[old == 0] == 0).double().mean() > 0.99)


def test_reports_of_both_stages_are_kept(made):
    folder = made("mixtral", "prune method=magnitude + prune method=sparsegpt sparsity=0.75")
    manifest = json.loads((folder / MANIFEST).read_text())
    assert [part["sparsity"]["experts"] for part in manifest["report"]] == [0.5, 0.75]
    assert [stage["given"]["method"] for stage in manifest["stages"]] == ["magnitude", "sparsegpt"]


def stored_as(family: str, folder: Path, dtype: torch.dtype, keep: str = "") -> Path:
    """A checkpoint in another dtype; tensors whose names contain `keep` stay in fp32."""
    readers.save_model(family, folder)
    (path,) = folder.glob("model*.safetensors")
    tensors = {k: t if keep and keep in k else t.to(dtype) for k, t in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": str(dtype).removeprefix("torch.")}))
    return folder


# How a checkpoint is stored, in what it is computed, and which of its tensors are stored in fp32 all the same.
STORED = [
    ("bfloat16", "float32", ""),
    ("bfloat16", "bfloat16", ""),
    ("float32", "bfloat16", ""),
    ("float16", "bfloat16", ""),
    ("bfloat16", "float16", ""),
    ("bfloat16", "float32", "gate.weight"),
    ("bfloat16", "bfloat16", "gate.weight"),
]


@pytest.mark.parametrize(
    ("stored_in", "computed_in", "keep", "family", "method"),
    [(*one, "mixtral", method) for one in STORED for method in ("wanda", "sparsegpt")[: 1 + bool(one[2])]]
    + [(*one, "gpt_oss", "magnitude") for one in STORED[:5]],
)
def test_what_is_not_pruned_keeps_its_bits(stored_in, computed_in, keep, family, method, lab, tmp_path):
    model = stored_as(family, tmp_path / "model", getattr(torch, stored_in), keep)
    options = {**lab(family), "model": str(model), "out": str(tmp_path / "out"), "dtype": computed_in}
    before, after = stored(model), stored(moe_compress.compress(f"prune method={method}", **options).folder)
    assert before.keys() == after.keys()
    matrices = [name for name in before if ".experts." in name and not name.endswith("bias")]
    assert matrices
    for name in before:
        assert before[name].dtype == after[name].dtype
        if name not in matrices:
            assert same_bits(before[name], after[name]), name
        elif method != "sparsegpt":
            assert same_bits(after[name], torch.where(after[name] == 0, 0, before[name])), name
    zeros = sum(int((after[name] == 0).sum()) for name in matrices)
    assert zeros == sum(after[name].numel() for name in matrices) // 2


# --- what a user can get wrong ----------------------------------------------------------------------------------------


def refused(sentence: str, options: Options, tmp_path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        moe_compress.compress(sentence, **{**options, "out": str(tmp_path / "out")})
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("config.json")) and not list(tmp_path.rglob("*.safetensors"))
    said = str(caught.value)
    assert 20 < len(said) < 500 and "\n" not in said
    return said


@pytest.mark.parametrize(
    ("family", "sentence", "said"),
    [
        ("mixtral", "prune sparsity=1", "sparsity=1.0: the fraction of weights that become zero is in [0, 1)."),
        ("mixtral", "prune sparsity=-0.1", "sparsity=-0.1: the fraction of weights"),
        ("mixtral", "prune sparsity=nan", "sparsity=nan: the fraction of weights"),
        ("mixtral", "prune sparsity=inf", "sparsity=inf: the fraction of weights"),
        ("mixtral", "prune sparsity=none", "sparsity=None: the fraction of weights"),
        ("mixtral", "prune sparsity=half", "prune.sparsity=half: a number is needed."),
        ("mixtral", "prune sparsity=0.5 pattern=2:4", "prune takes sparsity= or pattern=, not both."),
        ("mixtral", "prune pattern=4:2", "pattern=4:2: write how many weights stay of how many in a row, such as 2:4"),
        ("mixtral", "prune pattern=0:4", "pattern=0:4: write how many"),
        ("mixtral", "prune pattern=4:4", "pattern=4:4: write how many"),
        ("mixtral", "prune pattern=2-4", "pattern=2-4: write how many"),
        ("mixtral", "prune pattern=-2:4", "pattern=-2:4: write how many"),
        ("mixtral", "prune pattern=2:4:8", "pattern=2:4:8: write how many"),
        ("mixtral", "prune pattern=2.5:4", "pattern=2.5:4: write how many"),
        ("mixtral", "prune pattern=²:4", "pattern=²:4: write how many"),
        ("mixtral", "prune pattern=2:5", "pattern=2:5: mlp.experts.gate of layer 0 has 32 inputs, which are no groups"),
        ("mixtral", "prune pattern=4:16", "mlp.experts.down of layer 0 has 24 inputs, which are no groups of 16"),
        ("mixtral", "prune where=exports", "where=exports: 'exports' is no part of a layer; parts: experts, shared"),
        ("mixtral", "prune spare=all", "spare=all: 'all' is no part of a layer; parts: experts, shared"),
        ("mixtral", "prune where=", "nothing is left to be changed."),
        ("mixtral", "prune where=experts spare=experts", "where=experts spare=experts: nothing is left to be changed."),
        ("mixtral", "prune where=shared", "where=shared: mixtral has no such part that can be told apart."),
        ("mixtral", "prune where=dense", "where=dense: mixtral has no such part that can be told apart."),
        ("jetmoe", "prune", "experts of jetmoe cannot be changed"),
        ("mixtral", "prune pattern=2:4 allocate=owl", "allocate=owl shares out sparsity=; a pattern is the same in"),
        ("mixtral", "prune allocate=owl where=attention", "allocate=owl needs experts (where=) of one size"),
        ("mixtral", "prune allocate=both spread=0", "spread=0.0: how far an expert's sparsity may be"),
        ("mixtral", "prune allocate=both spread=nan", "spread=nan: how far an expert's sparsity may be"),
        ("mixtral", "prune experts_at_once=-1", "experts_at_once=-1 min_tokens=1: counts from 0 (all) and from 1 up"),
        ("mixtral", "prune min_tokens=0", "experts_at_once=0 min_tokens=0: counts from 0 (all) and from 1 up"),
        ("mixtral", "prune shrink=-1", "shrink=-1.0: a number of tokens from 0 up is needed."),
        ("mixtral", "prune shrink=nan", "shrink=nan: a number of tokens from 0 up is needed."),
        ("mixtral", "prune shrink=inf", "shrink=inf: a number of tokens from 0 up is needed."),
        ("mixtral", "prune where=router propagate=original", "use propagate=compressed."),
        ("mixtral", "prune unseen=skip", "prune.unseen=skip: allowed: pooled, magnitude, dense, error."),
        ("mixtral", "prune method=wand", "prune.method=wand: did you mean 'wanda'?"),
        ("mixtral", "expert_drop keep=4 + prune pattern=2:7", "pattern=2:7: mlp.experts.gate of layer 0 has 32 inputs"),
    ],
)  # fmt: skip
def test_what_cannot_be_pruned(family, sentence, said, lab, monkeypatch, tmp_path):
    calls = counting(monkeypatch, forward.hf, "run_layer")
    assert said in refused(sentence, lab(family), tmp_path)
    assert not calls


def test_spared_routers_do_not_forbid_the_original_stream(lab, tmp_path):
    options = {**lab("mixtral"), "out": str(tmp_path / "out")}
    folder = moe_compress.compress("prune where=experts,router spare=router propagate=original", **options).folder
    assert report(folder)["sparsity"] == {"experts": 0.5}


# Two Gram matrices (of 32 and of 24 inputs), and four more of the larger one for the solver, in fp32.
EACH = 4 * (32**2 + 24**2 + 4 * 32**2)


@pytest.mark.parametrize("fit", [1, 3, 7])
def test_gram_matrices_that_do_not_fit(fit, lab, monkeypatch, tmp_path):
    monkeypatch.setattr(stage, "free_memory", lambda _device: (fit + 1) * EACH - 1)
    said = refused("prune method=sparsegpt", lab("mixtral"), tmp_path)
    assert said.startswith("layer 0: the Gram matrices of 8 experts need ")
    assert said.endswith(f"experts_at_once={fit} would fit.")
    assert f"experts_at_once={fit} would fit" in refused(
        f"prune method=sparsegpt experts_at_once={fit + 1}", lab("mixtral"), tmp_path
    )
    options = {**lab("mixtral"), "out": str(tmp_path / "out")}
    assert moe_compress.compress(f"prune method=sparsegpt experts_at_once={fit}", **options).folder
    moe_compress.compress("prune method=wanda", **{**options, "out": str(tmp_path / "wanda")})


def test_not_even_one_gram_matrix_fits(lab, monkeypatch, tmp_path):
    monkeypatch.setattr(stage, "free_memory", lambda _device: EACH - 1)
    assert "would fit" not in refused("prune method=sparsegpt experts_at_once=1", lab("mixtral"), tmp_path)


@pytest.mark.parametrize("sentence", ["prune", "expert_drop score=weight_norm keep=6 + prune method=magnitude"])
def test_no_plan_holds_pruned_weights(sentence, lab, made, tmp_path):
    plan = made("mixtral", sentence) / "plan.json"
    options = {**lab("mixtral"), "out": str(tmp_path / "out")}
    with pytest.raises(ValueError, match=r"its stage prune changes weights, which no plan holds: run the recipe\.yaml"):
        moe_compress.apply(plan, **options)
    assert not list(tmp_path.iterdir())


def test_the_same_folder_in_other_arithmetic_is_another_checkpoint(lab, tmp_path):
    """Magnitudes are compared in the arithmetic's dtype: a checkpoint that is there must not pass for the other one."""
    options = {**lab("mixtral"), "out": str(tmp_path / "out")}
    moe_compress.compress("prune method=magnitude", **{**options, "dtype": "bfloat16"})
    other = moe_compress.compress("prune method=magnitude", **{**options, "out": str(tmp_path / "other")}).folder
    try:
        found = moe_compress.compress("prune method=magnitude", **options).folder
    except ValueError as error:
        assert "already holds something" in str(error)
    else:
        one, two = stored(found), stored(other)
        assert all(same_bits(one[name], two[name]) for name in one)


@pytest.mark.parametrize("words", ["", " method=sparsegpt pattern=2:4 where=all", " allocate=both"])
def test_pruning_takes_no_parameter_away(words, lab):
    found = moe_compress.plan(f"prune{words}", **lab("deepseek_v3"))
    assert found.form == "plain" and found.after == found.before


def test_weights_too_small_for_the_arithmetic_go_all_the_same(reader_folder, lab, tmp_path):
    """In fp16 they are zero, and are chosen first: they have to be zero in the fp32 file, too."""
    model = stock(reader_folder("mixtral"))
    small = copy.deepcopy(model)
    with torch.no_grad():
        for name, tensor in small.named_parameters():
            if name.endswith("experts.down_proj"):
                tensor.mul_(1e-6)
    small.save_pretrained(tmp_path / "small")
    for path in reader_folder("mixtral").glob("token*"):
        (tmp_path / "small" / path.name).write_bytes(path.read_bytes())
    options = {**lab("mixtral"), "model": str(tmp_path / "small"), "results": str(tmp_path / "runs")}
    folder = moe_compress.compress("prune method=magnitude", **{**options, "dtype": "float16"}).folder
    for name, tensor in stock(folder).state_dict().items():
        if NAMES.search(name):
            assert float((tensor == 0).float().mean()) >= 0.5, name
