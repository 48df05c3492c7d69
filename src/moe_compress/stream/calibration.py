"""The calibration artefact: what one pass saw, kept in one small file and used by every recipe and ratio.

It is identified by the model, the text and the arithmetic; a second recipe on the same three runs no forward.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe_compress.checkpoint.reader import Checkpoint
from moe_compress.model.families import family_of
from moe_compress.runtime import (
    dtype_name,
    fingerprint,
    log,
    one_of,
    peak_memory_bytes,
    require_disk,
    reset_peak_memory,
)
from moe_compress.stream.data import FOLDS, Windows
from moe_compress.stream.fold import Layers, Progress, fold
from moe_compress.stream.observers import ExpertSums

VERSION = 1


@dataclass(frozen=True)
class Calibration:
    """Sums per MoE layer, [C, E] or [C] or [E]; component c is domain c // FOLDS, fold c % FOLDS."""

    layers: dict[int, dict[str, Tensor]]
    domains: tuple[str, ...]
    identity: str
    description: dict[str, Any]

    def save(self, path: Path) -> None:
        """Write the artefact whole or not at all."""
        tensors = {f"{layer}.{name}": t for layer, sums in self.layers.items() for name, t in sums.items()}
        meta = {"identity": self.identity, "domains": self.domains, "description": self.description}
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        save_file(tensors, temporary, metadata={"moe_compress": json.dumps(meta)})
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read an artefact back."""
        layers: dict[int, dict[str, Tensor]] = {}
        try:
            with safe_open(path, "pt") as file:
                meta = json.loads(file.metadata()["moe_compress"])
                for key in file.keys():  # noqa: SIM118 - not a mapping
                    layer, _, name = key.partition(".")
                    layers.setdefault(int(layer), {})[name] = file.get_tensor(key)
        except (SafetensorError, TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{path} is not a whole calibration: remove it, and it is measured anew.") from error
        ordered = dict(sorted(layers.items()))
        return cls(ordered, tuple(meta["domains"]), meta["identity"], meta["description"])


def mix_components(sums: Mapping[str, Tensor], weight_C: Tensor) -> dict[str, Tensor]:
    """Sums over components with the given weights; maxima over the components that have any weight."""
    mixed: dict[str, Tensor] = {}
    for name, table in sums.items():
        if name.startswith("weight_"):
            mixed[name] = table
        elif name == "max":
            mixed[name] = table[weight_C > 0].amax(0)
        else:
            mixed[name] = torch.tensordot(weight_C, table, dims=1)
    return mixed


def component_weights(calibration: Calibration, mix: Mapping[str, float], fold_left_out: int | None) -> Tensor:
    """One weight per component, [C].

    Without a mix every token counts once; with one, each domain's tokens together weigh its share. A fold that is
    left out weighs nothing. Raises ValueError for a domain that the calibration text does not have.
    """
    for name in mix:
        one_of(name, calibration.domains, "domain in mix=")
    weight_C = torch.ones(len(calibration.domains) * FOLDS, dtype=torch.float64)
    if mix:
        tokens_C = next(iter(calibration.layers.values()))["tokens"]
        tokens_D = tokens_C.reshape(-1, FOLDS).sum(1)
        share_D = torch.tensor([mix.get(domain, 0.0) for domain in calibration.domains], dtype=torch.float64)
        weight_C = (share_D / share_D.sum() * tokens_D.sum() / tokens_D).repeat_interleave(FOLDS)
    if fold_left_out is not None:
        weight_C[torch.arange(len(weight_C)) % FOLDS == fold_left_out] = 0
    return weight_C


def calibration_identity(
    checkpoint: Checkpoint, windows: Windows, dtype: torch.dtype, device: torch.device, attn: str | None
) -> str:
    """What a calibration depends on: model, text and arithmetic."""
    return fingerprint(VERSION, checkpoint.fingerprint, windows.fingerprint, str(dtype), device.type, attn)


def kept(path: Path) -> Calibration | None:
    """The calibration of an earlier run, if there is one; what made that run resumable goes."""
    if not path.is_file():
        return None
    shutil.rmtree(_state_folder(path), ignore_errors=True)
    return Calibration.load(path)


def _state_folder(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def calibrate(
    checkpoint: Checkpoint, layers: Layers, windows: Windows, path: Path, identity: str, progress: Progress | None
) -> Calibration:
    """One pass over the calibration text; resumed if an earlier one was interrupted; saved at `path`."""
    state = _state_folder(path)
    itemsize = torch.finfo(layers.model.dtype).bits // 8
    boundary = windows.ids_NS.numel() * checkpoint.config.hidden_size * itemsize
    require_disk(path.parent, 2 * boundary, "the calibration pass")
    components = len(windows.domains) * FOLDS
    observer = ExpertSums(family_of(checkpoint.config), checkpoint.config, components)
    started = time.perf_counter()
    reset_peak_memory(layers.device)
    seen, _ = fold(layers, windows, [observer], state=state, progress=progress)
    sums = {index: parts[0] for index, parts in enumerate(seen) if parts and parts[0]}
    how = {"hash": windows.fingerprint, "dtype": dtype_name(layers.model.dtype), "device": layers.device.type}
    how["attn"] = layers.model.config._attn_implementation
    cost = {"seconds": time.perf_counter() - started, "peak_bytes": peak_memory_bytes(layers.device)}
    calibration = Calibration(sums, windows.domains, identity, {**windows.description, **how, **cost})
    calibration.save(path)
    shutil.rmtree(state, ignore_errors=True)
    log.info("calibration saved as %s", path)
    return calibration
