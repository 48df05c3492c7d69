"""How much the loss minds what a layer's experts put out: measured once, before any layer changes, and read by layer.

E experts, B experts (or one for all), F neurons, O outputs of a projection.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from moe_compress.calibration.expert_grams import ExpertGrams, ExpertMeans
from moe_compress.calibration.output_grams import OutputGrams, output_file
from moe_compress.checkpoints.reader import Checkpoint
from moe_compress.edits.factors import Part
from moe_compress.engine.backward import backward
from moe_compress.engine.forward import Progress
from moe_compress.methods.factorisation.structures import Grams
from moe_compress.methods.stage_options import WeightStageOptions
from moe_compress.models.families import family_of
from moe_compress.run.context import Run
from moe_compress.utils.files import write_json
from moe_compress.utils.logging import log


def measure_outputs(source: Checkpoint, run: Run, scratch: Path, pools: bool, progress: Progress | None = None) -> None:
    """Bring the loss's gradient back through the model as it came; a killed run that got to the end has it already.

    pools: one matrix for all experts of a layer.
    """
    done = scratch / "outputs.json"
    if done.is_file():
        return
    log.info("the loss's gradient comes back through %d layers.", source.num_layers)
    observer = OutputGrams(family_of(source.config), scratch, pools)
    backward(run.layers(source), run.windows("calibration", source), observer, run.results("calibrations"), progress)
    write_json(done, {"pooled": pools})


def outputs_of(
    scratch: Path, layer: int, experts: int, options: WeightStageOptions, order_EF: Tensor | None, device: torch.device
) -> dict[Part, Grams]:
    """Mean outer products [O, O] of the gradients at what each expert's projections put out, one read at a time.

    Few tokens count as they do for inputs. order_EF: the order in which neurons have been put since.
    """
    file = output_file(scratch, layer)
    with safe_open(file, "pt") as kept:
        names = set(kept.keys())
        count_B, down_DD = kept.get_tensor("count").tolist(), kept.get_tensor("down").to(device)
    found: dict[Part, Grams] = {"down": down_DD.expand(experts, -1, -1)}
    own = len(count_B) == experts
    counts = count_B if own else count_B * experts
    parts: list[Part] = ["gate", "up"]
    for part in (part for part in parts if part in names):
        sums = _Kept(file, part, order_EF, own, device)
        pooled_FF = sum((sums[e] for e in range(1, experts)), sums[0]) if own else sums[0]
        shrink, least = (options.shrink, options.min_tokens) if own else (0.0, 0)
        found[part] = ExpertMeans(
            ExpertGrams(sums, counts, pooled_FF, sum(count_B), shrink, least, options.unseen == "pooled")
        )
    return found


@dataclass(frozen=True, slots=True)
class _Kept:
    """Sums [F, F] of each expert (or of all) in a file, in the order in which its neurons are now."""

    file: Path
    part: Part
    order_EF: Tensor | None
    own: bool
    device: torch.device

    def __getitem__(self, e: int, /) -> Tensor:
        with safe_open(self.file, "pt") as kept:
            found_FF: Tensor = kept.get_slice(self.part)[e if self.own else 0].to(self.device)
        if self.order_EF is None:
            return found_FF
        order_F = self.order_EF[e].to(self.device)
        return found_FF[order_F][:, order_F]
