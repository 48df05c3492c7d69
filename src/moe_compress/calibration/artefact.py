"""The calibration artefact: what one pass saw, kept in small files and used by every recipe and ratio.

It is identified by the model, the text and the arithmetic; a second recipe on the same three runs no forward.
Beside the sums there may be output samples: all experts of a layer on some of the tokens, for methods that ask.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_compress.calibration.block_influence import BlockInfluence, between_layers
from moe_compress.calibration.expert_statistics import ExpertStatistics
from moe_compress.calibration.output_sample import OutputSample, OutputSampler
from moe_compress.checkpoints.reader import Checkpoint
from moe_compress.checkpoints.safetensors_file import write_shard
from moe_compress.data.windows import FOLDS, Windows
from moe_compress.engine.forward import Progress, forward_layers
from moe_compress.engine.layers import Layers
from moe_compress.engine.observer import Observer
from moe_compress.models.families import family_of
from moe_compress.models.sublayers import block_names
from moe_compress.utils.choices import one_of
from moe_compress.utils.devices import dtype_name, measured_cost
from moe_compress.utils.files import require_disk
from moe_compress.utils.hashing import fingerprint
from moe_compress.utils.logging import log

VERSION = 3
RUNS = "runs"


@dataclass(frozen=True)
class Calibration:
    """Sums per decoder layer, [C, E] or [C] or [E]; component c is domain c // FOLDS, fold c % FOLDS.

    span_influence_LL: mean 1 - cos of the stream between any two layers' beginnings, [L+1, L+1]; output_samples: the
    file that holds them.
    """

    layers: dict[int, dict[str, Tensor]]
    span_influence_LL: Tensor
    domains: tuple[str, ...]
    identity: str
    description: dict[str, Any]
    output_samples: Path | None = None

    @property
    def moe(self) -> dict[int, dict[str, Tensor]]:
        """The layers that have experts."""
        return {index: sums for index, sums in self.layers.items() if "count" in sums}

    def save(self, path: Path) -> None:
        """Write the artefact whole or not at all."""
        tensors = {f"{layer}.{name}": t for layer, sums in self.layers.items() for name, t in sums.items()}
        meta = {"identity": self.identity, "domains": self.domains, "description": self.description}
        write_shard(path, {**tensors, RUNS: self.span_influence_LL}, {"moe_compress": json.dumps(meta)})

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read an artefact back."""
        layers: dict[int, dict[str, Tensor]] = {}
        try:
            with safe_open(path, "pt") as file:
                meta = json.loads(file.metadata()["moe_compress"])
                span_influence_LL = file.get_tensor(RUNS)
                for key in set(file.keys()) - {RUNS}:
                    layer, _, name = key.partition(".")
                    layers.setdefault(int(layer), {})[name] = file.get_tensor(key)
        except (SafetensorError, TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{path} is not a whole calibration: remove it, and it is measured anew.") from error
        ordered = {layer: dict(sorted(sums.items())) for layer, sums in sorted(layers.items())}
        return cls(ordered, span_influence_LL, tuple(meta["domains"]), meta["identity"], meta["description"])

    def output_sample(self, layer: int) -> OutputSample:
        """All experts of one layer on a sample of tokens."""
        assert self.output_samples is not None
        with safe_open(self.output_samples, "pt") as file:
            found = {k.partition(".")[2]: file.get_tensor(k) for k in file.keys() if k.startswith(f"{layer}.")}  # noqa: SIM118
        return OutputSample.from_tensors(found)


def mix_components(sums: Mapping[str, Tensor], weight_C: Tensor) -> dict[str, Tensor]:
    """Sums over components with the given weights; maxima over the components that have any weight."""
    mixed: dict[str, Tensor] = {}
    for name, table in sums.items():
        if name.startswith(("weight_", "mean_")):
            mixed[name] = table
        elif name == "max":
            mixed[name] = table[weight_C > 0].amax(0)
        else:
            mixed[name] = torch.tensordot(weight_C, table.double(), dims=1)
    return mixed


def component_weights(calibration: Calibration, mix: Mapping[str, float], fold_left_out: int | None) -> Tensor:
    """`mix_weights` of what was measured, [C]."""
    tokens_C = next(iter(calibration.layers.values()))["stream_tokens"]
    return mix_weights(calibration.domains, tokens_C.reshape(-1, FOLDS).sum(1), mix, fold_left_out)


def mix_weights(
    domains: Sequence[str], tokens_D: Tensor, mix: Mapping[str, float], fold_left_out: int | None
) -> Tensor:
    """One weight per component, [C].

    Without a mix every token counts once; with one, each domain's tokens together weigh its share. A fold that is
    left out weighs nothing. Raises ValueError for a domain that the calibration text does not have.
    """
    for name in mix:
        one_of(name, domains, "domain in mix=")
    weight_C = torch.ones(len(domains) * FOLDS, dtype=torch.float64)
    if mix:
        share_D = torch.tensor([mix.get(domain, 0.0) for domain in domains], dtype=torch.float64)
        weight_C = (share_D / share_D.sum() * tokens_D.sum() / tokens_D).repeat_interleave(FOLDS)
    if fold_left_out is not None:
        weight_C[torch.arange(len(weight_C)) % FOLDS == fold_left_out] = 0
    return weight_C


def by_domain(sums: Mapping[str, Tensor], domains: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """Tokens of a layer, and tokens of each of its experts, from every domain alone."""
    own = {name: sums[name] for name in ("count", "tokens")}
    domain_C = torch.arange(len(domains) * FOLDS) // FOLDS
    return {name: mix_components(own, (domain_C == d).double()) for d, name in enumerate(domains)}


def calibration_identity(
    checkpoint: Checkpoint, windows: Windows, dtype: torch.dtype, device: torch.device, attn: str | None
) -> str:
    """What a calibration depends on: model, text and arithmetic."""
    return fingerprint(VERSION, checkpoint.fingerprint, windows.fingerprint, str(dtype), device.type, attn)


def output_sample_path(path: Path) -> Path:
    """Where the output samples lie that belong to a calibration."""
    return path.with_name(f"{path.stem}-probes.safetensors")


def load_if_complete(path: Path, output_samples: bool) -> Calibration | None:
    """The calibration of an earlier run, if it has all that is needed; what made that run resumable goes."""
    if not path.is_file() or (output_samples and not output_sample_path(path).is_file()):
        return None
    shutil.rmtree(_state_folder(path), ignore_errors=True)
    return with_output_samples(Calibration.load(path), path)


def with_output_samples(calibration: Calibration, path: Path) -> Calibration:
    """The calibration, pointing to its output samples if there are any."""
    found = output_sample_path(path)
    return replace(calibration, output_samples=found if found.is_file() else None)


def _state_folder(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def calibrate(
    checkpoint: Checkpoint,
    layers: Layers,
    windows: Windows,
    path: Path,
    identity: str,
    progress: Progress | None,
    *,
    output_samples: bool = False,
) -> Calibration:
    """One pass over the calibration text; resumed if an earlier one was interrupted; saved at `path`."""
    state = _state_folder(path) / ("probes" if output_samples else "sums")
    itemsize = torch.finfo(layers.model.dtype).bits // 8
    boundary = windows.ids_NS.numel() * checkpoint.text_config.hidden_size * itemsize
    require_disk(path.parent, 2 * boundary, "the calibration pass")
    with measured_cost(layers.device) as cost:
        observers = observers_for(checkpoint, layers, windows, output_samples)
        seen, _ = forward_layers(layers, windows, observers, state=state, progress=progress)
    checkpoint.require_unchanged()
    how = {"hash": windows.fingerprint, "dtype": dtype_name(layers.model.dtype), "device": layers.device.type}
    how["attn"] = layers.model.config._attn_implementation
    if output_samples:
        write_shard(
            output_sample_path(path), {f"{i}.{n}": t for i, parts in enumerate(seen) for n, t in parts[2].items()}
        )
    sums, span_influence_LL = _without_samples([parts[0] | parts[1] for parts in seen])
    calibration = Calibration(
        sums, span_influence_LL, windows.domains, identity, {**windows.description, **how, **cost}
    )
    calibration.save(path)
    shutil.rmtree(_state_folder(path), ignore_errors=True)
    log.info("calibration saved as %s", path)
    return with_output_samples(calibration, path)


def observers_for(checkpoint: Checkpoint, layers: Layers, windows: Windows, output_samples: bool) -> list[Observer]:
    """Everything that one pass records."""
    config, components = checkpoint.text_config, len(windows.domains) * FOLDS
    family = family_of(config)
    names = block_names(layers.model)
    turns = BlockInfluence(names, components, checkpoint.num_layers, windows.tokens, config.hidden_size)
    found: list[Observer] = [ExpertStatistics(family, config, components), turns]
    return [*found, OutputSampler(family, config, windows.tokens)] if output_samples else found


def _without_samples(seen: list[dict[str, Tensor]]) -> tuple[dict[int, dict[str, Tensor]], Tensor]:
    """The sums, and what the samples of the stream say together."""
    samples = [sums.pop("stream_sample") for sums in seen]
    samples.append(seen[-1].pop("stream_sample_end"))
    return dict(enumerate(seen)), between_layers(samples)
