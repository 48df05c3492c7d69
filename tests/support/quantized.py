"""What quantization is compared with: models with odd widths, loaded both ways."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import moe_compress
from moe_compress.checkpoints.folder import MANIFEST
from moe_compress.checkpoints.load import load_model
from moe_compress.models.families import family_named, setting
from moe_compress.models.modeling.packed_linear import PackedMatrix
from support import naive_quantization as slow
from support import readers, tiny
from support.editing import logits_of

Options = dict[str, object]
Made = Callable[[str, str], Path]
BITS = (2, 3, 4, 8)
# Experts are 40 wide: words of 3-bit codes then end in the middle of a row, and 8 is the only group for all matrices.
WIDE = 40
# The largest weight sets the scale: searching for a better one takes most of the time.
FEW = "quantize group_size=8 min_tokens=4 clip=max"
BLIND = "quantize method=rtn group_size=8 clip=max"
FUSED = (
    "dbrx",
    "gpt_oss",
    "llama4_text",
    "granitemoe",
    "granitemoeshared",
    "hy_v4",
    "inkling_text",
)  # no matrix of an expert is stored alone
EXPERTS = re.compile(r"(?<!shared_)experts\.(gate_up|up|down)_proj(_bias)?$")


def wide(family: str, folder: Path, width: int = WIDE) -> Path:
    key = next(key for key in family_named(family).width_keys if setting(tiny.CONFIGS[family], key))
    return readers.save_model(family, folder, **{key: width})


@functools.cache
def ours(folder: Path) -> Any:
    """The checkpoint as this package loads it: what is packed stays so."""
    return moe_compress.load(folder, torch.float32)


def theirs(folder: Path) -> Any:
    """The checkpoint as transformers loads it, with nothing missing and nothing left over."""
    return load_model(folder, torch.float32)


def packed_in(model: Any) -> dict[str, PackedMatrix]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedMatrix)}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(experts: int, inputs: int, seed: int) -> Tensor:
    """Rows [experts, tokens, inputs] of many sizes that lie near a space of a third as many dimensions."""
    rows = random(experts, 3 * inputs, inputs // 3, seed=seed) @ random(inputs // 3, inputs, seed=seed + 1)
    return (rows + 0.3 * random(experts, 3 * inputs, inputs, seed=seed + 2)) * random(inputs, seed=seed + 3).exp()


def form(folder: Path) -> str:
    return json.loads((folder / MANIFEST).read_text())["form"]


def require_alike(one: Any, *others: Any) -> None:
    """Models that give the same logits."""
    for other in others:
        torch.testing.assert_close(logits_of(other), logits_of(one), rtol=0, atol=1e-5)


def require_rounded(found: Tensor, weight: Tensor, bits: int, clip: slow.Clip = "mse", least: float = 0.97) -> None:
    """Weights that rounding to the nearest in groups of eight makes; a few scales may be as good as another."""
    expected = slow.dequantized(*slow.rtn(weight, bits, 8, torch.float32, clip)).float()
    assert float(torch.isclose(found, expected, rtol=1e-5).float().mean()) >= least
