"""Experts made narrower: in memory, on skeletons and in checkpoints."""

from __future__ import annotations

import functools

import pytest
import torch

from moe_compress.checkpoints.load import load_model
from moe_compress.checkpoints.reader import Checkpoint
from moe_compress.edits.apply import check_edits
from moe_compress.edits.edits import Edit, KeepChannels, KeepExperts, from_json, to_json
from moe_compress.engine.forward import forward_layers
from moe_compress.engine.layers import StreamedLayers
from moe_compress.models import hf
from moe_compress.models.moe import inner_width, moe_views
from support import naive, readers, tiny
from support.editing import FOUR, IDS, cut, logits_of, moe_layers, original, write
from support.slow import slow_families
from support.tiny import windows_of

WIDTH = 16
WORDS = torch.randint(3, readers.VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))
# One width for all experts of a model is plain unless shared experts are measured in experts' widths: 24 * n / 16.
EDITED = (
    "deepseek_v3",
    "glm4_moe",
    "dots1",
    "afmoe",
    "hunyuan_v1_moe",
    "llama4_text",
    "jamba",
    "exaone_moe",
    "glm_moe_dsa",
)
EDITED += ("hy_v4", "inkling_text", "deepseek_v4")


def chosen(source: Checkpoint, width: int = WIDTH) -> list[Edit]:
    """Random neurons of every expert, in every layer with experts."""
    generator = torch.Generator().manual_seed(5)
    edits: list[Edit] = []
    for layer in moe_layers(source):
        rows = [torch.randperm(tiny.INNER, generator=generator)[:width].sort().values for _ in range(tiny.EXPERTS)]
        edits.append(KeepChannels(layer, width, arrays={"channels": torch.stack(rows).int()}))
    return edits


@torch.no_grad()
@pytest.mark.parametrize("family", tiny.EDITABLE)
def test_experts_compute_with_the_neurons_that_stay(family, sources):
    source = sources(family)
    edits, whole = chosen(source), original(source)
    layer = edits[0].layer
    config, fused = whole.config, moe_views(whole)[layer].experts
    x_TD = torch.randn(4, tiny.HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kept_EW = edits[0].arrays["channels"].long()
    small = moe_views(cut(source, edits))[layer]
    assert inner_width(small) == WIDTH
    for e in (0, tiny.EXPERTS - 1):
        before = naive.expert(family, config, fused.double(), e)
        after = naive.expert(family, config, small.experts.double(), e)
        gone = torch.ones(tiny.INNER, dtype=torch.bool)
        gone[kept_EW[e]] = False
        down = before.matrices[-1].clone()
        before.matrices[-1][:, gone] = 0  # a view onto the weights
        for x in x_TD:
            torch.testing.assert_close(after.run(x), before.run(x))
        before.matrices[-1].copy_(down)


@pytest.mark.parametrize("family", slow_families(tiny.EDITABLE, 5))
def test_checkpoints_reload_as_they_are_in_memory(family, sources, tmp_path):
    source = sources(family)
    edits = chosen(source)
    written = write(source, edits, tmp_path / "out")
    assert (written.config.model_type == source.config.model_type) == (family not in EDITED), family
    torch.testing.assert_close(logits_of(load_model(tmp_path / "out", torch.float32)), logits_of(cut(source, edits)))


def test_different_widths_are_edited_and_full_width_changes_nothing(sources, tmp_path):
    source = sources("mixtral")
    uneven = [*chosen(source)[:1], *chosen(source, 8)[1:2]]
    assert write(source, uneven, tmp_path / "uneven").config.model_type == "moe_compress_mixtral"
    torch.testing.assert_close(
        logits_of(load_model(tmp_path / "uneven", torch.float32)), logits_of(cut(source, uneven))
    )
    whole = chosen(source, tiny.INNER)
    torch.testing.assert_close(logits_of(cut(source, whole)), logits_of(original(source)))


def test_plans_are_checked(sources):
    source = sources("mixtral")
    edit = chosen(source)[0]
    assert to_json(edit) == {"edit": "keep_channels", "layer": 0, "width": WIDTH, "widths": None}
    assert from_json(to_json(edit), edit.arrays) == edit and edit.needed_array == "channels"
    skeleton = functools.partial(hf.skeleton, source.config, torch.float32)
    ids = edit.arrays["channels"]
    for width, kept in ((25, None), (0, None), (8, ids), (16, ids * 2), (16, ids + 0.5)):
        with pytest.raises(ValueError, match="layer 0"):
            check_edits(skeleton(), [KeepChannels(0, width, arrays={} if kept is None else {"channels": kept})])


WIDTHS = (8, 16, 24, 8, 16, 8, 16, 8)


def uneven(source: Checkpoint) -> list[Edit]:
    """Random neurons, of each expert another number."""
    generator = torch.Generator().manual_seed(6)
    edits: list[Edit] = []
    for layer in moe_layers(source):
        rows = [torch.randperm(tiny.INNER, generator=generator)[:w].sort().values for w in WIDTHS]
        kept = torch.stack([torch.nn.functional.pad(row, (0, tiny.INNER - len(row))) for row in rows]).int()
        edits.append(KeepChannels(layer, max(WIDTHS), WIDTHS, arrays={"channels": kept}))
    return edits


@torch.no_grad()
@pytest.mark.parametrize("family", slow_families(tiny.EDITABLE, 5))
def test_experts_of_different_widths_are_those_with_other_neurons_zeroed(family, sources, tmp_path):
    source = sources(family)
    edits, whole = uneven(source), original(source)
    for edit in edits:
        stacks = moe_views(whole)[edit.layer].stacks()
        for e, width in enumerate(WIDTHS):
            gone = torch.ones(tiny.INNER, dtype=torch.bool)
            gone[edit.arrays["channels"][e, :width].long()] = False
            stacks["down"][e][:, gone] = 0  # a view onto the weights
    edited = cut(source, edits)
    assert [view.widths for view in moe_views(edited).values()] == [list(WIDTHS)] * len(edits)
    torch.testing.assert_close(logits_of(edited), logits_of(whole))
    written = write(source, edits, tmp_path / "out")
    assert written.config.model_type == f"moe_compress_{source.config.model_type}"
    assert written.bytes < source.bytes
    loaded = load_model(tmp_path / "out", torch.float32)
    assert torch.equal(logits_of(loaded), logits_of(edited))
    streamed = forward_layers(StreamedLayers(written, torch.device("cpu"), torch.float32), windows_of(IDS))[1]
    torch.testing.assert_close(hf.head(loaded, streamed.flatten(0, 1)).view_as(logits_of(edited)), logits_of(edited))


@pytest.mark.parametrize("family", slow_families(tiny.EDITABLE, 5))
def test_experts_of_different_widths_can_still_be_dropped(family, sources, tmp_path):
    source = sources(family)
    edits = uneven(source)
    first = write(source, edits, tmp_path / "first")
    drops: list[Edit] = [KeepExperts(edit.layer, FOUR) for edit in edits]
    again = write(first, drops, tmp_path / "again")
    assert [view.widths for view in moe_views(load_model(tmp_path / "again")).values()] == [[16, 24, 16, 8]] * len(
        edits
    )
    logits = logits_of(load_model(tmp_path / "again", torch.float32))
    assert torch.equal(logits, logits_of(cut(source, [*edits, *drops])))
    torch.testing.assert_close(logits, logits_of(cut(source, [*drops, *_of_four(edits)])))
    assert again.bytes < first.bytes


def _of_four(edits: list[Edit]) -> list[Edit]:
    """The same widths once only four experts are left."""
    rows = torch.tensor(FOUR)
    kept = tuple(WIDTHS[e] for e in FOUR)
    return [KeepChannels(e.layer, 24, kept, arrays={"channels": e.arrays["channels"][rows]}) for e in edits]
