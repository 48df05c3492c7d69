"""In which format a weight stage is stored, what then goes into config.json, and how many inputs share a scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

from moe_compress.checkpoints.formats.grid import Grid, grid_of
from moe_compress.checkpoints.formats.registry import (
    DENSE,
    EDITED_PACKED,
    QUANTIZATION,
    Packing,
    Request,
    Writer,
    format_in,
    formats,
)
from moe_compress.checkpoints.partly_packed import packed_kinds, unpacked
from moe_compress.checkpoints.quantization_config import packing_of, with_new_config
from moe_compress.compression.weights.stage_matrices import StageMatrices
from moe_compress.edits.apply import apply_for_counting
from moe_compress.edits.edits import Edit, PackMatrices
from moe_compress.methods.weight_method import NARROWEST, Bits, GridOptions, GroupSizes, group_size_for
from moe_compress.models import hf
from moe_compress.models.families import family_of, made_dense_from
from moe_compress.models.matrices import Kind, Matrix, layer_matrices, stored_matrices
from moe_compress.models.moe import moe_views
from moe_compress.utils.logging import log

# What format=auto stands for: the first that can hold the matrices.
AUTO = ("compressed-tensors", EDITED_PACKED, DENSE)
ByLayer = Mapping[int, Sequence[Matrix]]


@dataclass(frozen=True, slots=True)
class Storage:
    """How a stage's matrices are stored.

    matrices: which; format: its name; group_sizes: by layer and name, inputs that share a scale, 0 for a matrix that is
    left as it is; beside: patterns of the names of modules beside the model's (multi-token prediction).
    """

    matrices: StageMatrices
    format: str = DENSE
    group_sizes: GroupSizes = field(default_factory=dict)
    beside: Sequence[str] = ()

    @property
    def writer(self) -> Writer:
        """How the format is written."""
        return _writer(self.format)

    def keeps_beside(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
        """Whether what is stored beside the model's layers can stay: nothing claims it, or it is excepted.

        Of a packed model it may be packed, too, and stays where the config that says so does. before, after: values.
        """
        if before.get(QUANTIZATION):
            return self.format == DENSE and bool(after.get(QUANTIZATION))
        return self.format == DENSE or self.writer.excepts

    def edits(self, bits: Bits | None = None) -> list[PackMatrices]:
        """The edits of the checkpoint. bits: where they differ."""
        return self.packing_edits(bits) if self.writer.layer is not None else []

    def values(self, before: Mapping[str, Any]) -> dict[str, Any]:
        """Its config.json values, from those of its source.

        Raises ValueError where something else stays packed, and no config says both.
        """
        changed = {i: [m.name for m in found] for i, found in self.matrices.by_layer.items()}
        values = unpacked(before, self.matrices.model, changed)
        old = values.get(QUANTIZATION)
        if self.writer.config is None and (self.writer.layer is None or old is None):
            return values
        new = self.writer.config(self._packing()) if self.writer.config is not None else None
        if new is not None and old is None:
            return with_new_config(values, new)
        joined = self._joined(before, values, new) if new is not None else None
        if joined is None:
            stays = sorted(packed_kinds(self.matrices.model, values))
            raise ValueError(
                f"{', '.join(stays)}: what stays packed there and what format={self.format} packs cannot be said in "
                "one config: choose where=all, or format=dense."
            )
        return joined

    def _joined(
        self, before: Mapping[str, Any], left: Mapping[str, Any], new: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        """Values that say what stays packed and what is packed anew, from those of the source; None if none can.

        left: the values without anything that changes.
        """
        if left[QUANTIZATION]["quant_method"] != new["quant_method"]:
            return None
        packed, changed = self._packed_names(), self.matrices.by_layer
        plain = {i: [m.name for m in found if m.name not in packed[i]] for i, found in changed.items()}
        values = unpacked(before, self.matrices.model, plain)
        config = format_in(values).joined(values[QUANTIZATION], new)
        if config is None:
            return None
        said = ({**values, QUANTIZATION: each} for each in (config, new, left[QUANTIZATION]))
        everything, wanted, kept = (format_in(each).grids(packing_of(each)) for each in said)
        for index in range(len(hf.decoder_layers(self.matrices.model))):
            for stored, (name, _) in stored_matrices(self.matrices.model, index).items():
                stem = stored.removesuffix(".weight")
                anew = name in packed.get(index, ())
                grid, meant = grid_of(stem, name, everything), grid_of(stem, name, wanted if anew else kept)
                # Of patterns in several groups readers do not take the same.
                if grid != grid_of(stem, name, everything[::-1]) or not _means(grid, meant):
                    return None
        return {**values, QUANTIZATION: config}

    def _packed_names(self) -> dict[int, set[str]]:
        """Names of the matrices that are packed, by layer."""
        return {
            i: {m.name for m in found if self.group_sizes[i, m.name]} for i, found in self.matrices.packable.items()
        }

    def packing_edits(self, bits: Bits | None = None) -> list[PackMatrices]:
        """The edits that make room for codes, layer by layer."""
        edits = (self._packing_edit(i, found, bits) for i, found in self.matrices.packable.items())
        return [edit for edit in edits if edit is not None]

    def _packing_edit(self, index: int, matrices: Sequence[Matrix], bits: Bits | None) -> PackMatrices | None:
        packed = {m.name: size for m in matrices if (size := self.group_sizes[index, m.name])}
        if not packed:
            return None
        counts = {m.name: len(m.weight_BOI) for m in matrices}
        if bits is None:
            widths = {name: self._grid.expected(counts[name]) for name in packed}
        else:
            widths = {name: tuple(bits[index][name]) for name in packed}
        return PackMatrices(index, widths, packed)

    @property
    def _grid(self) -> GridOptions:
        assert self.matrices.grid is not None
        return self.matrices.grid

    def _plain(self) -> list[str]:
        """The modules that hold matrices that stay plain numbers."""
        model, found = self.matrices.model, dict[str, None]()
        family, prefix = family_of(model.config), hf.layers_prefix(model)
        for index, layer in enumerate(hf.decoder_layers(model)):
            packed = {m.name for m in self.matrices.packable.get(index, ()) if self.group_sizes[index, m.name]}
            names = (m.name for m in layer_matrices(layer, family) if m.name not in packed)
            found |= dict.fromkeys(f"{prefix}{index}.{_module(name)}" for name in names)
        return list(found)

    def _packing(self) -> Packing:
        """What is to be packed into a plain format."""
        chosen, model = self.matrices.packable, self.matrices.model
        family, packed = family_of(model.config), {matrix.name for found in chosen.values() for matrix in found}
        every = {matrix.name for layer in hf.decoder_layers(model) for matrix in layer_matrices(layer, family)}
        assert self._grid.bits is not None  # plain formats hold one width
        return Packing(
            bits=self._grid.bits, whole_rows=not self._grid.group_size, matrices=chosen, group_sizes=self.group_sizes,
            others=frozenset(every - packed),
            plain=(*self._plain(), *hf.tower_names(model)),
            beside=self.beside,
            towers=tuple(name.rpartition(".")[2] for name in hf.tower_names(model)),
        )  # fmt: skip


def _means(grid: Grid | None, meant: Grid | None) -> bool:
    """Whether a grid is the one that was meant, of a group that may have lost targets to others."""
    if grid is None or meant is None:
        return grid is meant
    return {*grid.targets} <= {*meant.targets} and replace(grid, ignore=meant.ignore, targets=meant.targets) == meant


def _module(name: str) -> str:
    """The module that holds a matrix; of experts, all of them."""
    return name.rpartition(".")[0] if ".experts." in name else name


def storage_for(matrices: StageMatrices, values: Mapping[str, Any], beside: Sequence[str] = ()) -> Storage:
    """How the matrices are to be stored, with others `beside` them. ValueError for a format that cannot hold them.

    values: config.json's, which say what else is packed and stays so.
    """
    grid = matrices.grid
    if grid is None:
        return Storage(matrices)
    format = _format_of(matrices, grid, packed_kinds(matrices.model, values) - {*matrices.kinds})
    sizes = _group_sizes(matrices, grid, _writer(format))
    _require_rounded(matrices, grid, format, sizes)
    return Storage(matrices, format, sizes, beside)


def _require_rounded(matrices: StageMatrices, grid: GridOptions, format: str, sizes: GroupSizes) -> None:
    """Raise ValueError where every matrix that is to be packed would be left as it is."""
    chosen = matrices.packable if any(matrices.packable.values()) else matrices.routers
    if any(sizes[layer, matrix.name] for layer, found in chosen.items() for matrix in found):
        return
    inputs = _writer(format).inputs
    if inputs is not None:
        raise ValueError(
            f"format={format} packs matrices whose number of inputs is a multiple of {inputs}, and none of these is "
            "one: use another format=, or choose other parts (where=)."
        )
    raise ValueError(
        f"group_size={grid.group_size}: no group of {NARROWEST} inputs or more, and at most so many, divides the "
        "inputs of these matrices, so none would be rounded: use group_size=0, a scale for a whole row."
    )


def _writer(format: str) -> Writer:
    writer = formats()[format].writer
    assert writer is not None, format
    return writer


def _format_of(matrices: StageMatrices, grid: GridOptions, stays: Set[Kind]) -> str:
    """The name of a format that is written. stays: parts of layers that are packed, and are left as they are."""
    if grid.format == DENSE or not any(matrices.packable.values()):
        return DENSE
    kind, wrapped = matrices.model.config.model_type, hf.is_wrapper(matrices.model.config)
    if made_dense_from(matrices.model.config):
        raise ValueError(
            f"codes of a {kind} model without experts are not stored here: use format=dense, which rounds its weights "
            "alone, or quantize its checkpoint by a tool for dense models."
        )
    if grid.format == "auto":
        writers = {name: _writer(name) for name in AUTO}
        found = next(
            n for n, each in writers.items() if not _one_width(grid, each) and not _refused(matrices, grid, each, stays)
        )
        if found == DENSE:
            log.warning("no format holds the codes of %s: its weights are rounded, and stored as plain numbers.", kind)
        return found
    writer = _writer(grid.format)
    if _one_width(grid, writer):
        raise ValueError(
            f"format={grid.format} holds one width for all experts: bits=auto needs format=packed or dense."
        )
    reason = _refused(matrices, grid, writer, stays)
    if reason:
        others = "format=dense" if wrapped else "format=packed or format=dense"
        raise ValueError(f"format={grid.format} {reason}: use {others}.")
    return grid.format


def _one_width(grid: GridOptions, writer: Writer) -> bool:
    """Whether bits differ between matrices, of which a plain format holds one width."""
    return grid.bits is None and writer.parts is not None


def _refused(matrices: StageMatrices, grid: GridOptions, writer: Writer, stays: Set[Kind]) -> str:
    """Why a format cannot hold the matrices; empty if it can."""
    if writer.layer is not None and hf.is_wrapper(matrices.model.config):
        return "needs an edited architecture, which no language model inside a wrapper can have"
    if writer.parts is None:
        return ""
    if any(view.unfused for view in moe_views(matrices.model).values()):
        return "is for plain checkpoints, and the experts of this one are held one by one"
    lacking = _without_names(matrices)
    if lacking:
        model_type = matrices.model.config.model_type
        return f"packs matrices one by one, but {model_type} stores {lacking} together with others"
    if hf.holds_experts_beside(matrices.model):
        return "leaves the experts beside the language model plain, which stock transformers does not expect"
    if family_of(matrices.model.config).joins_shared:
        return "is not read by stock transformers, which joins matrices of shared experts while it reads them"
    kinds = stays | {matrix.kind for found in matrices.packable.values() for matrix in found}
    assert grid.bits is not None
    reason = writer.refuses(Request(kinds=frozenset(kinds), bits=grid.bits, group_size=grid.group_size))
    if reason:
        return reason
    for which, alike in _alike(matrices.packable, writer).items():
        if alike and not group_size_for([m.weight_BOI.shape[2] for _, m in alike], grid.group_size):
            return f"needs one group size for all of {which}, and no group of 8 and more divides all widths"
    return ""


def _alike(chosen: ByLayer, writer: Writer) -> dict[str, list[tuple[int, Matrix]]]:
    """Matrices that have to share one group size, by what messages call them."""
    packed = [(i, m) for i, matrices in chosen.items() for m in matrices]
    return {which: [(i, m) for i, m in packed if holds(m.kind)] for which, holds in writer.shared.items()}


def _without_names(matrices: StageMatrices) -> str:
    """A matrix that no tensor of a stock checkpoint holds alone; empty if there is none."""
    model, known = matrices.model, set[object]()
    for index, chosen in matrices.packable.items():
        kind = hf.layer_kind(hf.decoder_layers(model)[index])
        if kind in known:
            continue
        known.add(kind)
        named = {name for name, _ in stored_matrices(model, index).values()}
        lacking = next((matrix.name for matrix in chosen if matrix.name not in named), None)
        if lacking is not None:
            return f"{lacking} of layer {index}"
    return ""


def _group_sizes(matrices: StageMatrices, grid: GridOptions, writer: Writer) -> GroupSizes:
    """What shares a scale, nothing of a matrix that the format's reader takes plain alone."""
    spared = tuple(f".{name}" for name in hf.kept_plain(matrices.model)) if writer.spares else ()
    sizes = _sizes_that_fit(matrices, grid, writer)
    return {key: 0 if f".{key[1]}".endswith(spared) else size for key, size in sizes.items()}


def _sizes_that_fit(matrices: StageMatrices, grid: GridOptions, writer: Writer) -> GroupSizes:
    """In a plain format, one number has to do for every matrix of a scheme."""
    found = [(i, m) for chosen in (matrices.packable, matrices.routers) for i, each in chosen.items() for m in each]
    if writer.inputs is not None:
        widths = {(i, m.name): m.weight_BOI.shape[2] for i, m in found}
        return {key: 0 if width % (writer.inputs or width) else writer.inputs or width for key, width in widths.items()}
    sizes = {(i, m.name): group_size_for([m.weight_BOI.shape[2]], grid.group_size) for i, m in found}
    for alike in _alike(matrices.packable, writer).values() if grid.group_size else ():
        common = group_size_for([m.weight_BOI.shape[2] for _, m in alike], grid.group_size) if alike else 0
        sizes |= {(i, m.name): common for i, m in alike}
    return sizes


def pack_skeleton(storage: Storage) -> Sequence[Edit]:
    """Make room for codes in a skeleton that is only counted; returns the edits that a checkpoint will carry.

    In a plain format there are none: its config says what is packed.
    """
    edits = storage.edits()
    apply_for_counting(storage.matrices.model, edits)
    return edits
