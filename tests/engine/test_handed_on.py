"""What layers give to the next one besides hidden states: the tokens of an indexer, the states of a router."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe_compress.checkpoints.reader import open_checkpoint
from moe_compress.edits.apply import check_edits
from moe_compress.edits.edits import DropLayer, SkipSublayer
from moe_compress.engine import forward
from moe_compress.engine.forward import forward_layers, walk_layers
from moe_compress.engine.layers import StreamedLayers
from moe_compress.models import hf
from support import tiny
from support.editing import cut, logits_of, write
from support.tiny import CPU, windows_of

SHARED = {"indexer_types": ["full", "shared", "full"]}
FAMILIES = [("glm_moe_dsa", SHARED), ("hy_v4", SHARED), ("zaya", {})]


@pytest.fixture
def handing(tmp_path):
    """(family, overrides) -> its tiny checkpoint."""
    return lambda family, overrides: open_checkpoint(tiny.save(tiny.make(family, **overrides), tmp_path / family))


def expected_of(source) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32).eval()
    return torch.cat([logits_of(model, part) for part in tiny.token_ids(4, 12).split(2)])


@pytest.fixture(autouse=True)
def _two_batches(monkeypatch):
    monkeypatch.setattr(forward, "TOKENS_PER_BATCH", 24)


@pytest.mark.parametrize(("family", "overrides"), FAMILIES)
def test_the_fold_is_the_model(family, overrides, handing):
    source = handing(family, overrides)
    layers = StreamedLayers(source, CPU, torch.float32)
    _, hidden = forward_layers(layers, windows_of(tiny.token_ids(4, 12)))
    logits = hf.head(layers.model, hidden.flatten(0, 1)).view(4, 12, -1)
    torch.testing.assert_close(logits, expected_of(source), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("family", "overrides"), FAMILIES)
def test_a_killed_fold_goes_on_with_it(family, overrides, handing, monkeypatch, tmp_path):
    source, windows, state = handing(family, overrides), windows_of(tiny.token_ids(4, 12)), tmp_path / "state"
    real = hf.run_layer
    calls: list[int] = []

    def stopped(*args: object) -> hf.LayerOutput:
        calls.append(1)
        if len(calls) > 2:  # both batches of the first layer
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(forward.hf, "run_layer", stopped)
    with pytest.raises(KeyboardInterrupt):
        forward_layers(StreamedLayers(source, CPU, torch.float32), windows, state=state)
    monkeypatch.setattr(forward.hf, "run_layer", real)
    layers = StreamedLayers(source, CPU, torch.float32)
    _, hidden = forward_layers(layers, windows, state=state)
    logits = hf.head(layers.model, hidden.flatten(0, 1)).view(4, 12, -1)
    torch.testing.assert_close(logits, expected_of(source), rtol=0, atol=1e-6)


def test_two_streams_each_have_their_own(handing):
    layers = StreamedLayers(handing("glm_moe_dsa", SHARED), CPU, torch.float32)
    seen = []

    def visit(index, layer, one, other) -> None:
        one([], True)
        if index == 0:  # from here on, the streams differ
            layer.self_attn.o_proj.weight.mul_(2)
            layer.self_attn.indexer.wk.weight.mul_(-1)
        other([], True)
        seen.append([each.args[0] for each in (one, other)])

    walk_layers(layers, windows_of(tiny.token_ids(4, 12)), visit, streams=2)
    one, other = seen[0]
    assert one.handed.keys() == other.handed.keys() == {0, 2}
    assert not torch.equal(one.hidden_NSD, other.hidden_NSD)


def test_numbers_of_tokens_take_two_bytes(handing):
    layers = StreamedLayers(handing("glm_moe_dsa", SHARED), CPU, torch.float32)
    found = []
    walk_layers(
        layers, windows_of(tiny.token_ids(4, 12)), lambda _i, _l, run: (run([], True), found.append(run.args[0]))
    )
    assert {each.dtype for each in found[0].handed.values()} == {torch.int16}


@pytest.mark.parametrize("edit", [DropLayer(0), SkipSublayer(0, "attention")])
def test_a_layer_whose_choice_others_use_stays(edit, handing):
    with pytest.raises(ValueError, match="layer 0 chooses the tokens that layer 1 attends to"):
        check_edits(hf.skeleton(handing("glm_moe_dsa", SHARED).config, torch.float32), [edit])


@pytest.mark.parametrize("edit", [DropLayer(1), DropLayer(2), SkipSublayer(1, "attention"), SkipSublayer(2, "moe")])
def test_others_can_go(edit, handing, tmp_path):
    source = handing("glm_moe_dsa", {"indexer_types": ["full", "full", "shared"]})
    out = write(source, [edit], tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(out.folder, dtype=torch.float32).eval()
    assert torch.equal(logits_of(loaded), logits_of(cut(source, [edit])))
