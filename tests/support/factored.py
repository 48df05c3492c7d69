"""Experts in random factors: every form, in memory and in checkpoints, beside the matrices that they stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_compress.checkpoints.folder import MANIFEST
from moe_compress.checkpoints.partly_packed import unpacked
from moe_compress.checkpoints.reader import Checkpoint, open_checkpoint
from moe_compress.checkpoints.writer import CheckpointWriter
from moe_compress.compression.weights.factored_layer import factor_layer, fill, write_factored
from moe_compress.edits.edits import FactorExperts
from moe_compress.edits.factors import Form
from moe_compress.edits.resulting_config import resulting_config
from moe_compress.engine.layers import StreamedLayers
from moe_compress.models import hf
from moe_compress.models.families import family_of
from moe_compress.models.matrices import layer_matrices
from moe_compress.models.moe import moe_views
from moe_compress.models.sublayers import block_names
from support import tiny

RAGGED = tuple(range(1, tiny.EXPERTS + 1))
# By what a test calls them: the structures, and what each may have besides.
FORMS = {
    "svd": Form(rank=4),
    "ragged svd": Form(rank=RAGGED),
    "base and delta": Form(rank=4, core=True),
    "ragged deltas": Form(rank=RAGGED, core=True),
    "shared basis": Form(basis=6),
    "inner basis": Form(basis=6, side="out"),
    "few bases": Form(bases=(2, 5)),
    "many bases": Form(bases=(5, 5)),
    "silu of bases": Form(bases=(2, 5), activation="silu"),
    "tanh of bases": Form(bases=(4, 5), activation="tanh"),
    "sparse and low rank": Form(rank=3, residue=5),
    "everything": Form(rank=RAGGED, core=True, residue=2),
}
# Another form for every projection, as `auto` may find them best.
MIXED = {"gate": FORMS["base and delta"], "up": FORMS["few bases"], "down": FORMS["shared basis"]}
OTHERS = {"gate": FORMS["shared basis"], "up": FORMS["sparse and low rank"], "down": FORMS["ragged deltas"]}
INNER = {"gate": FORMS["inner basis"], "up": FORMS["inner basis"], "down": Form(basis=6, side="in")}
ACTIVATIONS = {"linear": lambda x: x, "silu": functional.silu, "tanh": torch.tanh}


@dataclass
class Factors:
    """As methods leave them, with the matrices that they stand for made the slow way."""

    left: list[Tensor] = field(default_factory=list)
    right: list[Tensor] = field(default_factory=list)
    core: Tensor | None = None
    basis: Tensor | None = None
    bases: Tensor | None = None
    mix: Tensor | None = None
    activation: str = "linear"
    residue: list[Tensor] = field(default_factory=list)

    def dense(self, experts: int) -> Tensor:
        found = []
        for e in range(experts):
            if self.bases is not None:
                mixed = sum(float(self.mix[e, n]) * base for n, base in enumerate(self.bases))
                matrix = self.left[e] @ ACTIVATIONS[self.activation](mixed)
            else:
                matrix = (self.left[e] if self.left else self.basis) @ (self.right[e] if self.right else self.basis)
            matrix = matrix if self.core is None else matrix + self.core
            found.append(matrix + self.residue[e] if self.residue else matrix)
        return torch.stack(found)


def factors_of(form: Form, shape: tuple[int, int, int], part: str, seed: int = 0) -> Factors:
    """Random factors for matrices [E, O, I] whose products are of about the size of weights."""
    generator = torch.Generator().manual_seed(seed + sum(map(ord, part)))
    experts, outputs, inputs = shape

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64) * size[-1] ** -0.5

    ranks = form.rank if isinstance(form.rank, tuple) else (form.rank,) * experts
    if form.bases:
        count, width = form.bases
        left, mix = [random(outputs, width) for _ in range(experts)], random(experts, count).softmax(-1)
        return Factors(left, bases=random(count, width, inputs), mix=mix, activation=form.activation or "linear")
    if form.basis and (part == "down" if form.side is None else form.side == "out"):
        return Factors(right=[random(form.basis, inputs) for _ in range(experts)], basis=random(outputs, form.basis))
    if form.basis:
        return Factors([random(outputs, form.basis) for _ in range(experts)], basis=random(form.basis, inputs))
    found = Factors([random(outputs, r) for r in ranks], [random(r, inputs) for r in ranks])
    found.core = random(outputs, inputs) if form.core else None
    if form.residue:
        kept = [torch.rand(outputs, inputs, generator=generator).argsort(1) < form.residue for _ in ranks]
        found.residue = [random(outputs, inputs) * each for each in kept]
    return found


def forms_for(model: nn.Module, layer: int, forms: Form | Mapping[str, Form]) -> dict[str, Form]:
    """By the projections that the layer's experts have; one form is that of all."""
    parts = moe_views(model)[layer].stacks()
    by_part = dict.fromkeys(parts, forms) if isinstance(forms, Form) else forms
    found = {part: by_part[part] for part in parts if part in by_part}
    # What is said where nothing has to be.
    return {p: replace(form, side=None) if p == "down" and form.side == "out" else form for p, form in found.items()}


@torch.no_grad()
def factored(model: Any, forms: Form | Mapping[str, Form], dense: Any = None) -> None:
    """Put random factors into all layers of a model; and the matrices that they stand for into a `dense` one."""
    for layer, view in moe_views(model).items():
        chosen, stacks = forms_for(model, layer, forms), view.stacks()
        found = {part: factors_of(form, tuple(stacks[part].shape), part, layer) for part, form in chosen.items()}
        factor_layer(hf.decoder_layers(model)[layer], block_names(model), chosen)
        fused = hf.decoder_layers(model)[layer].get_submodule(view.names["experts"])
        for part, values in found.items():
            fill(fused, part, values)
            if dense is not None:
                moe_views(dense)[layer].stacks()[part].copy_(values.dense(view.num_experts))


@torch.no_grad()
def write(
    source: Checkpoint, forms: Form | Mapping[str, Form], out: Path, layers: Sequence[int] | None = None
) -> tuple[Checkpoint, list[FactorExperts]]:
    """A checkpoint with random factors in these layers (None: in all with experts), and its edits."""
    streamed = StreamedLayers(source, tiny.CPU, source.stored_dtype)
    writer, edits = CheckpointWriter(out, source, "test", keep_prediction_layers=False), []
    which = list(moe_views(streamed.model)) if layers is None else layers
    everything = {i: FactorExperts(i, forms_for(streamed.model, i, forms)) for i in which}
    family, inside = family_of(streamed.model.config), hf.decoder_layers(streamed.model)
    changed = {i: [matrix.name for matrix in layer_matrices(inside[i], family, ("experts",))] for i in which}
    writer.values = values = unpacked(source.values, streamed.model, changed)
    writer.copy(None)
    for index in range(source.num_layers):
        if index in everything:
            chosen = everything[index].forms
            with streamed.layer(index) as layer:
                stacks = moe_views(streamed.model)[index].stacks()
                found = {p: factors_of(form, tuple(stacks[p].shape), p, index) for p, form in chosen.items()}
                edits.append(write_factored(writer, streamed.model, index, layer, found))
        else:
            writer.copy(index)
    assert edits == list(everything.values())
    writer.finish(resulting_config(values, edits).values, {})
    (out / MANIFEST).unlink()  # of a run, which this is none of
    return open_checkpoint(out), edits
