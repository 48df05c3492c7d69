"""Attention over long windows goes block by block: the same numbers, and nothing as large as the window squared."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe_compress.engine.forward import forward_layers
from moe_compress.engine.layers import ResidentLayers
from moe_compress.models.hf import long_attention
from support import tiny
from support.slow import slow_families

LENGTH = 40


@pytest.fixture
def blocks(monkeypatch):
    """Lets windows of more than 8 positions be long ones, in blocks of about 7 queries."""

    def switch(on: bool, scores: int = 2 * 4 * LENGTH * 7) -> None:
        monkeypatch.setattr(long_attention, "LONG", 8 if on else 10**6)
        monkeypatch.setattr(long_attention, "SCORES", scores)

    return switch


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", slow_families(tiny.CONFIGS, 5))
def test_blocks_of_queries_give_what_whole_attention_gives(family, padded, blocks):
    model = tiny.make(family)
    ids = tiny.token_ids(2, LENGTH)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, LENGTH - 9 :] = not padded
    for attention in dict.fromkeys((model.config._attn_implementation, "eager")):
        model.config._attn_implementation = attention
        blocks(False)
        expected = forward_layers(ResidentLayers(model), tiny.windows_of(ids, mask))[1][mask]
        blocks(True)
        found = forward_layers(ResidentLayers(model), tiny.windows_of(ids, mask))[1][mask]
        assert not torch.equal(found, torch.zeros_like(found))
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else (out,):
            # What is expanded is not there as often as it seems to be.
            if isinstance(each, torch.Tensor):
                self.elements = max(self.elements, each.untyped_storage().nbytes() // each.itemsize)
        return out


@pytest.mark.parametrize(
    ("family", "padded"), [("mixtral", False), ("mixtral", True), ("gpt_oss", False), ("deepseek_v3", False)]
)
def test_nothing_is_as_large_as_the_square_of_the_window(family, padded, blocks):
    length = 400
    model = tiny.make(family)
    ids = tiny.token_ids(1, length)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, length - 9 :] = not padded
    sizes = []
    for on in (False, True):
        blocks(on, scores=4 * length * 16)
        with Largest() as largest:
            forward_layers(ResidentLayers(model), tiny.windows_of(ids, mask))
        sizes.append(largest.elements)
    assert sizes[1] < length**2 / 2
    assert (family, padded) == ("mixtral", False) or sizes[0] >= length**2


def test_a_model_that_computes_with_masks_is_given_whole_ones():
    rows = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    mask = long_attention.LazyMask.of(lambda start, end: rows[..., start:end, :], (1, 1, 6, 6), key=None)
    assert mask.shape == (1, 1, 6, 6)
    with pytest.raises(long_attention.WholeMaskNeeded):
        mask[:, 0]
    assert torch.equal(long_attention.with_whole_masks({"attention_mask": mask, "flag": 3})["attention_mask"], rows)
