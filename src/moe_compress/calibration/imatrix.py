"""An imatrix of a model: one pass over the calibration text that sums up the squares of every matrix's inputs.

Experts see their own tokens alone, so each has sums and a count of its own. B experts (or 1), I inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from moe_compress.calibration.input_moments import InputMomentCollector
from moe_compress.checkpoints.gguf.base_model import llama_cpp_architecture, model_type_of
from moe_compress.checkpoints.gguf.imatrix import tensor_names, write_imatrix_file
from moe_compress.checkpoints.reader import Checkpoint, architecture_values
from moe_compress.checkpoints.resolve import config_folder, resolve_model
from moe_compress.engine.forward import forward_layers
from moe_compress.models import hf
from moe_compress.models.families import Family, family_of
from moe_compress.models.matrices import KINDS, layer_matrices, stored_matrices
from moe_compress.run.context import Run
from moe_compress.run.progress import progress_bar
from moe_compress.utils.files import require_disk, require_writable
from moe_compress.utils.logging import log

SUM, COUNT = "sum", "count"
MEASURED = [kind for kind in KINDS if kind != "router"]  # which nobody quantizes


class InputSquares(InputMomentCollector):
    """Hands over a layer's sums of squares [B, I] and counts [B] by source."""

    def __init__(self, family: Family) -> None:
        super().__init__(family, MEASURED, "input_squares", experts=None)

    def leave(self) -> dict[str, Tensor]:
        """The sums on the CPU."""
        super().leave()
        sums = {f"{SUM}.{source}": self.found[source].total.cpu() for source in self.sums}
        return sums | {f"{COUNT}.{source}": self.found[source].count_B.cpu() for source in self.sums}


def write_imatrix(run: Run, out: Path | None) -> Path:
    """Measure the run's model and write the file. ValueError for a model that llama.cpp does not load."""
    config = hf.config_from(architecture_values(config_folder(run.options.model, run.options.revision)))
    if hasattr(config, "moe_compress"):
        raise ValueError(f"{run.options.model} is an edited checkpoint, which llama.cpp cannot load.")
    architecture = llama_cpp_architecture(model_type_of(config))
    target = out or run.results("imatrix") / f"{Path(run.options.model).name}.gguf"
    require_writable(target.parent, f"out={target}")
    if target.exists():
        raise ValueError(f"{target} is there already: choose another name with out=, or remove it first.")
    checkpoint = resolve_model(run.options.model, run.options.revision)
    windows = run.windows("calibration", checkpoint)
    layers = run.layers(checkpoint)
    with progress_bar("measuring") as progress:
        seen, _ = forward_layers(layers, windows, [InputSquares(family_of(checkpoint.config))], progress=progress)
    sums = _named(checkpoint, layers.model, architecture, [parts[0] for parts in seen])
    require_disk(target.parent, sum(square_BI.nbytes for square_BI, _ in sums.values()), "the imatrix")
    text = Path(run.options.data)
    dataset = text.name if text.exists() else run.options.data  # no path of this machine
    write_imatrix_file(target, sums, dataset, len(windows.ids_NS), windows.ids_NS.shape[1])
    run.log.event("imatrix", path=str(target), tensors=len(sums), **windows.description)
    return target


def _named(
    checkpoint: Checkpoint, model: PreTrainedModel, architecture: str, seen: Sequence[Mapping[str, Tensor]]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Sums and counts by GGUF's names of the matrices that they are for."""
    places: dict[str, tuple[int, str]] = {}
    stored: dict[str, tuple[int, str]] = {}
    for index in range(len(seen)):
        matrices = layer_matrices(hf.decoder_layers(model)[index], family_of(model.config), MEASURED)
        by_name = {matrix.name: matrix for matrix in matrices}
        for matrix in [matrix for matrix in matrices if matrix.kind == "experts"]:
            part = matrix.name.rpartition(".")[2]
            places[f"blk.{index}.ffn_{part}_exps.weight"] = index, matrix.source
        for key, (name, _) in stored_matrices(model, index).items():
            if name in by_name and by_name[name].kind != "experts":
                stored[key] = index, by_name[name].source
    names = tensor_names(architecture, checkpoint.num_layers, stored)
    places |= {names[key]: place for key, place in stored.items() if key in names}
    absent = {source for key, (_, source) in stored.items() if key not in names}
    if absent:
        log.info("no entry for %s, which GGUF stores otherwise.", ", ".join(sorted(absent)))
    return {
        name: (seen[index][f"{SUM}.{source}"], seen[index][f"{COUNT}.{source}"])
        for name, (index, source) in places.items()
    }
