"""Which architectures can say which edits, and sequences of edits that do not fit."""

from __future__ import annotations

import pytest
import torch

from moe_compress.edits.apply import check_edits
from moe_compress.edits.edits import (
    DropLayer,
    KeepExperts,
    SetTopK,
    SkipExperts,
    SkipSublayer,
    removals,
)
from moe_compress.edits.resulting_config import resulting_config
from moe_compress.models import hf
from moe_compress.models.sublayers import attention_layers
from support import tiny
from support.edit_kinds import MORE_KINDS, REFUSED, edits_of, is_edited, merge, shape_of
from support.editing import SIX


@pytest.mark.parametrize("family", ["qwen3_next", "lfm2_moe", "nemotron_h"])
def test_the_last_layer_with_attention_stays(family, sources):
    shape, source = shape_of(sources(family)), sources(family)
    assert shape.mixing
    model = hf.skeleton(source.config, torch.float32)
    with pytest.raises(ValueError, match="is the only one left with attention, which has to stay"):
        check_edits(model, removals(shape.mixing))


@pytest.mark.parametrize("family", tiny.EDITABLE)
def test_which_architectures_can_say_what(family, sources):
    source = sources(family)
    for kind in MORE_KINDS:
        edits = edits_of(kind, source)
        if (family, kind) in REFUSED:
            with pytest.raises(ValueError, match=REFUSED[family, kind]):
                check_edits(hf.skeleton(source.config, torch.float32), edits)
        else:
            assert resulting_config(source.values, edits).plain is not is_edited(family, kind), kind


@pytest.mark.parametrize(("family", "attention"), [("qwen3_next", [0]), ("lfm2_moe", [0]), ("jamba", [0, 2])])
def test_attention_is_found_behind_a_layer_that_is_gone(family, attention, sources):
    model = hf.skeleton(sources(family).config, torch.float32)
    check_edits(model, [DropLayer(0)])
    assert attention_layers(model) == attention


def test_linear_attention_is_not_taken_for_attention_behind_a_layer_that_is_gone(sources):
    """MiniMax: linear, full and linear attention under one name."""
    model = hf.skeleton(sources("minimax").config, torch.float32)
    kinds = model.config.layer_types
    assert attention_layers(model) == [i for i, kind in enumerate(kinds) if kind == "full_attention"]
    check_edits(model, [DropLayer(0)])
    assert attention_layers(model) == [i for i, kind in enumerate(kinds[1:]) if kind == "full_attention"]


@pytest.mark.parametrize(
    ("family", "edits", "says"),
    [
        ("minimax", [SkipSublayer(1, "attention")], r"layer 1 has no attention .*; those that have: \[0, 2\]"),
        ("qwen3_next", [SkipSublayer(0, "attention")], r"layer 0 has no attention .*; those that have: \[1\]"),
        ("lfm2_moe", [SkipSublayer(2, "attention")], r"layer 2 has no attention .*; those that have: \[1\]"),
        ("jamba", [SkipSublayer(2, "attention")], r"layer 2 has no attention .*; those that have: \[1, 3\]"),
        ("deepseek_v3", [merge(1, "sum"), KeepExperts(1, (0, 1, 3, 4))], "router=sum and routes within groups: no"),
        ("deepseek_v3", [merge(1, "sum"), merge(1, "centroid")], "groups must share out its 6 experts"),
        ("deepseek_v3", [merge(1, "sum"), SkipSublayer(0, "moe")], "layer 0, which has no experts"),
        ("deepseek_v3", [DropLayer(0), DropLayer(0), DropLayer(0)], "the only layer left with experts"),
        ("mixtral", [SkipSublayer(0, "moe"), SkipSublayer(0, "moe")], "layer 0"),
        ("mixtral", [SkipSublayer(0, "moe"), KeepExperts(0, SIX)], "layer 0, which has no experts"),
        ("mixtral", [SkipSublayer(0, "attention")] * 2, "layer 0"),
        ("mixtral", [SkipSublayer(0, "moe"), SkipSublayer(0, "attention")], "drop the whole layer"),
        ("mixtral", [SkipSublayer(0, "attention"), SkipSublayer(0, "moe")], "drop the whole layer"),
        ("mixtral", [DropLayer(1), KeepExperts(2, SIX)], "layer 2, which has no experts; MoE layers: \\[0, 1\\]"),
        ("mixtral", [DropLayer(1), DropLayer(2)], "there are layers 0 to 1"),
        ("mixtral", [SkipSublayer(0, "moe"), SkipSublayer(1, "moe"), DropLayer(2)], "the only layer left with experts"),
        ("mixtral", [KeepExperts(0, (0, 1)), SetTopK(0, 3)], "layer 0 cannot use 3 experts per token: 1 to 2"),
        ("mixtral", [SetTopK(0, 3), KeepExperts(0, (0, 1))], "keep=2 is fewer than the 3 experts each token uses"),
        ("mixtral", [SetTopK(0, 1), KeepExperts(0, (2,)), SkipExperts(0, -0.1, True)], "a fraction from 0 to 1"),
        ("deepseek_v3", [SetTopK(1, 5)], "layer 1 cannot use 5 experts per token: 1 to 4 are possible"),
    ],
)
def test_sequences_that_do_not_fit_are_refused(family, edits, says, sources):
    with pytest.raises(ValueError, match=says):
        check_edits(hf.skeleton(sources(family).config, torch.float32), edits)
