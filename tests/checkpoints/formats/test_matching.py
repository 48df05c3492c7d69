"""Which weights a compressed-tensors config means is what the library says; ModelOpt has wildcards as a shell has."""

from __future__ import annotations

import itertools
import time

import pytest
from compressed_tensors.utils.match import is_match, match_targets
from torch import nn

from moe_compress.checkpoints.formats.grid import Grid, ModuleNames, grid_of
from moe_compress.checkpoints.formats.modelopt import _grids

NAMES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.10.self_attn.kv_b_proj",
    "model.layers.1.mlp.gate",
    "model.layers.0.mlp.gate_proj",
    "model.layers.1.mlp.shared_experts.up_proj",
    "model.layers.1.mlp.experts.0.down_proj",
    "model.layers.11.mlp.experts.17.gate_proj",
]
TARGETS = [
    ("Linear",),
    (r"re:.*\.experts\.\d+\..*",),
    (r"re:.*self_attn.*", "model.layers.1.mlp.gate"),
    ("re:model.layers.1.*",),
    ("Linear", r"re:.*down_proj$"),
    ("Embedding",),
]
IGNORES = [
    (),
    ("lm_head", r"re:.*self_attn.*", r"re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"),
    ("model.layers.1.mlp.gate",),
    ("re:.*gate$", "re:model.layers.1[.].*"),
    ("Linear",),
]


@pytest.mark.parametrize(("targets", "ignore"), itertools.product(TARGETS, IGNORES))
def test_targets_and_ignore_mean_what_the_library_means(targets, ignore):
    linear, grid = nn.Linear(1, 1), Grid(bits=4, group_size=0, targets=targets, ignore=ignore)
    found = [name for name in NAMES if grid_of(name, name.partition(".layers.")[2], [grid]) is not None]
    assert found == [name for name in NAMES if is_match(name, linear, targets, ignore)]


@pytest.mark.parametrize(("one", "other"), itertools.permutations(TARGETS, 2))
def test_of_several_groups_the_library_s_first_one_counts(one, other):
    linear, grids = nn.Linear(1, 1), [Grid(bits=4, group_size=0, targets=t) for t in (one, other)]
    if {*one} & {*other}:
        return
    for name in NAMES:
        matched = match_targets(name, linear, [*one, *other])
        expected = next((grid for grid in grids if matched and matched[0] in grid.targets), None)
        same_kind = [target for target in matched if target.startswith("re:")]
        if (
            len(same_kind) > 1
        ):  # of two patterns the library takes the first in the alphabet; we, that of the first group
            continue
        assert grid_of(name, name.partition(".layers.")[2], grids) == expected, name


def test_modelopt_leaves_out_what_is_inside_a_module_too():
    config = {
        "quant_algo": "NVFP4",
        "exclude_modules": ["model.layers.1.mlp.gate", "*self_attn*", "model.layers.0.mlp"],
    }
    found = [name for name in NAMES if grid_of(name, "", _grids(config)) is not None]
    assert found == [NAMES[4], NAMES[5], NAMES[6]]
    named = {
        "model.layers.1.mlp.experts.0.down_proj": {"quant_algo": "FP8"},
        "model.layers.11": {"quant_algo": "NVFP4"},
    }
    mixed = _grids({"quant_algo": "MIXED_PRECISION", "quantized_layers": named})
    widths = [grid.bits for name in NAMES if (grid := grid_of(name, "", mixed)) is not None]
    assert widths == [8, 4]


def test_a_config_that_lists_every_expert_is_matched_at_once():
    """NVIDIA's MiniMax-M3 lists 22,000: one pattern of them all took minutes."""
    names = [f"model.layers.{i}.mlp.experts.{e}.up_proj" for i in range(60) for e in range(300)]
    begun = time.process_time()
    (grid,) = _grids({"quant_algo": "MIXED_PRECISION", "quantized_layers": {n: {"quant_algo": "NVFP4"} for n in names}})
    assert all(grid_of(name, "", [grid]) is grid for name in names)
    assert grid_of("model.layers.0.mlp.experts.300.up_proj", "", [grid]) is None
    assert time.process_time() - begun < 3


def test_a_pattern_that_may_take_for_ever_is_refused():
    with pytest.raises(ValueError, match="repeats a group"):
        ModuleNames((r"re:(a|a|aa)*(.+)+$$x",))
