"""Experts in factors compute what their whole matrices would, with what they share multiplied once a token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from moe_compress.models import hf
from moe_compress.models.moe import moe_views
from support import tiny
from support.editing import logits_of
from support.factored import FORMS, MIXED, OTHERS, factored

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


@pytest.mark.parametrize("forms", [MIXED, OTHERS], ids=["mixed", "others"])
@pytest.mark.parametrize("family", tiny.EDITABLE)
def test_every_family_runs_in_factors(family, forms):
    model, dense = pair(family, forms, torch.float32)
    for ids in (tiny.token_ids(), tiny.token_ids(1, 1)):
        torch.testing.assert_close(logits_of(model, ids), logits_of(dense, ids), rtol=1e-3, atol=2e-4)
