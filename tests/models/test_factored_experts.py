"""Experts in factors compute what their whole matrices would, with what they share multiplied once a token."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from moe_compress.edits.apply import apply_edits
from moe_compress.edits.edits import KeepExperts, RoundActivations, SkipExperts
from moe_compress.edits.factors import Form
from moe_compress.evaluation.flops.torch_check import check
from moe_compress.models import hf
from moe_compress.models.component_map import EXPERTS
from moe_compress.models.components import components
from moe_compress.models.modeling.factored_experts import SparseMatrix
from moe_compress.models.moe import moe_views
from moe_compress.models.sizes import sizes
from support import tiny
from support.editing import logits_of
from support.factored import FORMS, INNER, MIXED, OTHERS, factored

LENGTH = 16
ONE_FAMILY = "mixtral"


def pair(family: str, forms: object, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """A model in factors and its twin of whole matrices, which runs as its authors wrote it."""
    model, dense = (tiny.make(family).to(dtype) for _ in range(2))
    hf.use_experts_function(model)
    dense.set_experts_implementation("eager")
    factored(model, forms, dense)
    return model, dense


def blocks(family: str, forms: object) -> list[tuple]:
    """The views of the layers with experts, in factors and whole."""
    model, dense = pair(family, forms)
    return list(zip(moe_views(model).values(), moe_views(dense).values(), strict=True))


def run(view, tokens: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(1, tokens, tiny.HIDDEN, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        if hf.gate_on_input(view.experts):
            found = view.block(hidden)
            return found[0] if isinstance(found, tuple) else found
        index = torch.rand(tokens, view.num_experts, generator=generator).argsort(1)[:, : tiny.TOP_K]
        gates = torch.rand(tokens, tiny.TOP_K, generator=generator, dtype=torch.float64)
        return view.experts(hidden[0], index, gates)


@pytest.mark.parametrize("tokens", [1, 12])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", [ONE_FAMILY, "gpt_oss", "llama4_text"])
def test_every_form_is_its_whole_matrices(family, form, tokens):
    for view, whole in blocks(family, FORMS[form]):
        torch.testing.assert_close(run(view, tokens), run(whole, tokens), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("family", [ONE_FAMILY, "llama4_text"])
def test_a_basis_may_lie_on_the_other_side(family):
    for view, whole in blocks(family, INNER):
        for tokens in (1, 12):
            torch.testing.assert_close(run(view, tokens), run(whole, tokens), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("forms", [MIXED, OTHERS], ids=["mixed", "others"])
@pytest.mark.parametrize("family", tiny.EDITABLE)
def test_every_family_runs_in_factors(family, forms):
    model, dense = pair(family, forms, torch.float32)
    for ids in (tiny.token_ids(), tiny.token_ids(1, 1)):
        torch.testing.assert_close(logits_of(model, ids), logits_of(dense, ids), rtol=1e-3, atol=2e-4)


# --- once a token -------------------------------------------------------------------------------------------


class Rows:
    """How many rows a module has multiplied."""

    def __init__(self, module: nn.Module) -> None:
        self.count = 0
        module.register_forward_hook(self._add)

    def _add(self, _module: nn.Module, args: tuple[Tensor, ...], _output: Tensor) -> None:
        self.count += args[0].shape[0]


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("family", [ONE_FAMILY, "gpt_oss", "llama4_text"])
@pytest.mark.parametrize("form", ["base and delta", "shared basis", "few bases"])
def test_what_experts_share_multiplies_each_token_once(form, family, tokens):
    view, _ = blocks(family, FORMS[form])[0]
    shared = {name: parts for name, parts in view.experts.shared_parts.items()}
    rows = {name: Rows(next(iter(parts.values()))) for name, parts in shared.items()}
    run(view, tokens)
    expected = dict.fromkeys(shared, tokens)
    if form == "few bases":  # of which every expert's rows are multiplied with its own mixture
        expected["w_down"] = 0
        if view.top_k == 1 and tokens > 1:  # two bases are then more than one mixture
            expected = dict.fromkeys(shared, 0)
    assert {name: each.count for name, each in rows.items()} == expected


@pytest.mark.parametrize("form", ["base and delta", "shared basis", "many bases", "silu of bases"])
def test_a_norm_behind_the_experts_is_that_of_each(form):
    for view, whole in blocks(ONE_FAMILY, FORMS[form]):
        for each in (view, whole):
            each.experts.has_post_expert_norm = True
            each.experts.post_expert_norm = nn.RMSNorm(tiny.HIDDEN, dtype=torch.float64)
        for tokens in (1, 12):
            expected = by_rows(whole, tokens)
            torch.testing.assert_close(run(view, tokens), expected, rtol=1e-9, atol=1e-10)


def by_rows(view, tokens: int, seed: int = 0) -> Tensor:
    """One row after the other, through whole matrices and the norm."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(1, tokens, tiny.HIDDEN, generator=generator, dtype=torch.float64)[0]
    index = torch.rand(tokens, view.num_experts, generator=generator).argsort(1)[:, : tiny.TOP_K]
    gates = torch.rand(tokens, tiny.TOP_K, generator=generator, dtype=torch.float64)
    found = torch.zeros_like(hidden)
    for t in range(tokens):
        for k in range(tiny.TOP_K):
            expert = view.expert(int(index[t, k]))
            inner = view.experts.act_fn(expert.gate @ hidden[t]) * (expert.up @ hidden[t])
            found[t] += gates[t, k] * view.experts.post_expert_norm(expert.down @ inner)
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", [ONE_FAMILY, "gpt_oss", "llama4_text"])
def test_whoever_listens_is_told_of_every_row(family, form):
    for view, _ in blocks(family, FORMS[form]):
        heard, alone = {}, run(view, 12)
        hf.tap(view.block, view.experts, lambda rows, heard=heard: heard.setdefault("rows", rows))
        torch.testing.assert_close(run(view, 12), alone, rtol=1e-9, atol=1e-10)
        rows = heard["rows"]
        assert rows.output_RD.shape == (len(rows.token_R), tiny.HIDDEN) and rows.inner_RF.shape[1] == tiny.INNER
        # What scales the input of Llama-4's experts is taken out of what they return.
        added_RD = rows.output_RD * rows.gate_R[:, None] if hf.gate_on_input(view.experts) else rows.output_RD
        for number, output_D, inner_F in zip(rows.expert_R.tolist(), added_RD, rows.inner_RF, strict=True):
            bias = view.experts.separate[number]["w_down"].bias
            expected = view.expert(number).down @ inner_F
            torch.testing.assert_close(output_D, expected if bias is None else expected + bias)


@torch.no_grad()
@pytest.mark.parametrize("where", ["sent", "experts"])
@pytest.mark.parametrize("form", FORMS)
def test_rounded_rows_are_those_of_whole_matrices(form, where):
    """Rows are rounded as whole matrices would be given them; what factors hand on is not."""
    model, dense = pair(ONE_FAMILY, FORMS[form], torch.float32)
    dense.set_experts_implementation(hf.EXPERTS_FUNCTION)
    for each in (model, dense):
        apply_edits(each, [RoundActivations(layer, where) for layer in range(tiny.LAYERS)])
    for view, whole in zip(moe_views(model).values(), moe_views(dense).values(), strict=True):
        for tokens in (1, 12):
            hidden = torch.randn(tokens, tiny.HIDDEN, generator=torch.Generator().manual_seed(tokens))
            index, gates = torch.arange(2 * tokens).view(-1, 2) % tiny.EXPERTS, torch.full((tokens, 2), 0.5)
            found, expected = (each.experts(hidden, index, gates) for each in (view, whole))
            # A number that lies between two codes may be rounded either way.
            assert float((found - expected).norm() / expected.norm()) < 1e-2


@pytest.mark.parametrize("form", ["base and delta", "shared basis", "everything"])
@pytest.mark.parametrize("family", [ONE_FAMILY, "gpt_oss"])
def test_skipped_and_replaced_experts_cost_and_add_what_they_should(family, form):
    model, dense = pair(family, FORMS[form], torch.float32)
    dense.set_experts_implementation(hf.EXPERTS_FUNCTION)
    constants = {"outputs": torch.randn(2, tiny.HIDDEN, generator=torch.Generator().manual_seed(0))}
    edits = []
    for layer in range(tiny.LAYERS):
        edits.append(KeepExperts(layer, (0, 2, 3, 5, 6, 7), novices=True, arrays=constants))
        edits.append(SkipExperts(layer, 0.7, True))
    for each in (model, dense):
        apply_edits(each, edits)
    for ids in (tiny.token_ids(), tiny.token_ids(1, 1)):
        torch.testing.assert_close(logits_of(model, ids), logits_of(dense, ids), rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("form", ["everything", "shared basis", "many bases", "silu of bases"])
def test_gradients_reach_every_factor(form):
    experts = blocks(ONE_FAMILY, FORMS[form])[0][0].experts.requires_grad_(True)
    index = torch.arange(2 * tiny.EXPERTS).view(-1, 2) % tiny.EXPERTS
    hidden = torch.randn(len(index), tiny.HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    experts(hidden, index, torch.full(index.shape, 0.5, dtype=torch.float64)).square().sum().backward()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in experts.parameters())


def test_a_copy_has_shared_parts_of_its_own():
    model, _ = pair(ONE_FAMILY, FORMS["base and delta"])
    copied = copy.deepcopy(model)
    before = logits_of(model)
    with torch.no_grad():
        for view in moe_views(copied).values():
            view.experts.shared_parts["w_up"]["core"].weight.zero_()
    assert torch.equal(logits_of(model), before) and not torch.equal(logits_of(copied), before)
    view = moe_views(copied)[0]
    assert view.experts.separate[0]["w_up"].shared is view.experts.shared_parts["w_up"]


# --- a residue ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", [8, 13, 32])
def test_a_sparse_matrix_keeps_its_numbers_and_places(inputs):
    generator = torch.Generator().manual_seed(inputs)
    kept = torch.rand(6, inputs, generator=generator).argsort(1) < 4
    dense = torch.randn(6, inputs, generator=generator) * kept
    dense[2, kept[2].nonzero()[0]] = 0  # fewer in one row
    matrix = SparseMatrix.empty(dense, 4)
    matrix.fill(dense)
    assert torch.equal(matrix.dense(), dense)
    assert (
        matrix.values.shape == (6, 4) and matrix.mask.shape == (6, -(-inputs // 8)) and matrix.mask.dtype == torch.uint8
    )
    x = torch.randn(3, inputs, generator=generator)
    torch.testing.assert_close(matrix(x), x @ dense.T)
    with pytest.raises(ValueError, match="a residue has 4 nonzeros in a row"):
        matrix.fill(torch.ones(6, inputs))


# --- counting -----------------------------------------------------------------------------------------------

EVEN = [name for name, form in FORMS.items() if isinstance(form.rank, int)]


@pytest.mark.parametrize("family", [ONE_FAMILY, "llama4_text", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("form", [*EVEN, "mixed", "inner"])
def test_torchs_counter_agrees(family, form):
    model = tiny.make(family)
    hf.use_experts_function(model)
    factored(model, {"mixed": MIXED, "inner": INNER, **FORMS}[form])
    found = check(model, LENGTH)
    # A part that its holder's children multiply with is taken out of the block by torch, whose own it is not.
    if family == "llama4_text" and "inner" in form:
        assert sum(each.analytic for each in found) == sum(each.counted for each in found)
        return
    assert all(each.agrees for each in found), found
    assert {each.phase for each in found if each.component == EXPERTS and each.compared} == {"prefill", "decode"}


@pytest.mark.parametrize("form", [*FORMS, "mixed"])
def test_sizes_are_those_of_the_formulas(form):
    forms = MIXED if form == "mixed" else dict.fromkeys(("gate", "up", "down"), FORMS[form])
    model = tiny.make(ONE_FAMILY)
    hf.use_experts_function(model)
    factored(model, forms)
    found = {each.name: each for each in components(model, LENGTH, LENGTH, 1, torch.bfloat16)}[EXPERTS]
    stored = touched = masks = 0
    share = tiny.TOP_K / tiny.EXPERTS
    for part, each in forms.items():
        outputs, inputs = (tiny.HIDDEN, tiny.INNER) if part == "down" else (tiny.INNER, tiny.HIDDEN)
        shared, own = shared_and_own(each, part, outputs, inputs)
        stored, touched = stored + shared + own, touched + shared + own * share
        masks += tiny.EXPERTS * outputs * -(-inputs // 8) if each.residue else 0
    assert found.parameters == tiny.LAYERS * stored
    assert found.bytes == tiny.LAYERS * (2 * stored + masks)
    assert found.touched == pytest.approx(tiny.LAYERS * touched, abs=tiny.LAYERS * 3 * tiny.EXPERTS)


def shared_and_own(form: Form, part: str, outputs: int, inputs: int) -> tuple[int, int]:
    """Numbers that experts share, and those of all experts together."""
    if form.bases:
        count, width = form.bases
        return count * width * inputs, tiny.EXPERTS * (outputs * width + count)
    if form.basis:
        out = part == "down" if form.side is None else form.side == "out"
        shared, other = (outputs, inputs) if out else (inputs, outputs)
        return form.basis * shared, tiny.EXPERTS * form.basis * other
    ranks = form.rank if isinstance(form.rank, tuple) else (form.rank,) * tiny.EXPERTS
    return form.core * outputs * inputs, sum(ranks) * (outputs + inputs) + tiny.EXPERTS * outputs * form.residue


def test_what_a_token_multiplies_is_what_it_touches():
    """As long as a core is met once: of the founding document's example, 0.540 of what whole experts take."""
    model, dense = tiny.make(ONE_FAMILY), tiny.make(ONE_FAMILY)
    hf.use_experts_function(model)
    factored(model, FORMS["base and delta"])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        moe_views(model)[0].experts(torch.randn(5, tiny.HIDDEN), torch.tensor([[0, 3]] * 5), torch.ones(5, 2))
    one = tiny.HIDDEN * tiny.INNER
    assert counter.get_total_flops() == 5 * 2 * 3 * (one + 2 * 4 * (tiny.HIDDEN + tiny.INNER))
    assert sizes(model, LENGTH, torch.float32).touched < sizes(dense, LENGTH, torch.float32).touched
