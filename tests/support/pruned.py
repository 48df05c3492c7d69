"""What pruning is compared with: stock models, naive rows, zeros."""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import moe_compress
from moe_compress.checkpoints.folder import MANIFEST
from moe_compress.checkpoints.reader import open_checkpoint
from moe_compress.data.windows import Windows
from moe_compress.models import hf
from moe_compress.run.context import Run
from moe_compress.run.log import RunLog
from moe_compress.run.options import make_options
from support import naive_pruning as slow
from support import readers, tiny

Options = dict[str, object]
Made = Callable[[str, str], Path]
WORDS = torch.randint(3, readers.VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))
PER_MATRIX = tiny.HIDDEN * tiny.INNER
FAMILIES = tiny.EDITABLE
NAMES = re.compile(r"(?<!shared_)experts\.(gate_up_proj|up_proj|down_proj)$")


@functools.cache
def _stock(folder: Path) -> PreTrainedModel:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    hf.complete_experts(model)
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
    here, there = (tensor.reshape(-1).view(torch.uint8) for tensor in (one, other))
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(here, there)


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
        for index, layer in enumerate(slow.naive.layers_of(model))
        if hasattr(getattr(layer, slow.naive.BLOCK.get(family, "mlp"), None), "experts")
    ]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


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


def stored_as(family: str, folder: Path, dtype: torch.dtype, keep: str = "") -> Path:
    """A checkpoint in another dtype; tensors whose names contain `keep` stay in fp32."""
    readers.save_model(family, folder)
    (path,) = folder.glob("model*.safetensors")
    tensors = {k: t if keep and keep in k else t.to(dtype) for k, t in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": str(dtype).removeprefix("torch.")}))
    return folder


def refused(sentence: str, options: Options, tmp_path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        moe_compress.compress(sentence, **{**options, "out": str(tmp_path / "out")})
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("config.json")) and not list(tmp_path.rglob("*.safetensors"))
    said = str(caught.value)
    assert 20 < len(said) < 500 and "\n" not in said
    return said
