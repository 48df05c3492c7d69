"""One table of storage formats, filled by the modules of this folder. A format is one file that says all of it.

    @storage_format("gptq")
    def gptq() -> Format:
        return Format(layouts=(GptqWeight,), unreadable=..., grids=..., writer=Writer(parts=..., config=...))

What reads, writes, counts and describes checkpoints asks the table and names no format. docs/extending/format.md shows
a complete one. O outputs, I inputs, G groups of inputs, B experts (or one).
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from moe_compress.checkpoints.formats.grid import Grid
from moe_compress.checkpoints.formats.stored_weight import StoredWeight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moe_compress.models.matrices import Kind, Matrix

PACKAGE = __name__.rpartition(".")[0]
QUANTIZATION = "quantization_config"
# Where a config says that experts are stored in other numbers than quantization_config says (DeepSeek-V4).
EXPERTS = "expert_dtype"
DENSE, EDITED_PACKED = "dense", "packed"
# Widths of whole codes that vLLM's fused experts take.
VLLM_FUSED_BITS = (4, 8)
Config = Mapping[str, Any]
Verdict = tuple[bool, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a stage asks a plain format to hold: kinds of matrices, bits, inputs that share a scale (0: a whole row)."""

    kinds: frozenset[Kind]
    bits: int
    group_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """What a stage packs into a plain format.

    matrices: by layer; group_sizes: inputs that share a scale, by layer and name of the matrix; whole_rows: one scale a
    row was asked for; others: names of the matrices that stay plain numbers, routers among them; plain: the
    modules of all layers that hold these, by their full names; beside: patterns of the names of modules that are stored
    beside the model's, as plain numbers; towers: names of the modules beside the language model, which stay so, too.
    """

    bits: int
    whole_rows: bool
    matrices: Mapping[int, Sequence[Matrix]]
    group_sizes: Mapping[tuple[int, str], int]
    others: frozenset[str] = frozenset()
    plain: Sequence[str] = ()
    beside: Sequence[str] = ()
    towers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CodedMatrix:
    """One matrix on a grid: codes [O, I], int8 or FP8 (which FP4 fits in), scales [O, G] as they are stored, and bits.

    zero: codes of the weight 0 [O, G] where these are not 0; divisor: a number that divides all scales (NVFP4);
    input_divisor: the same of scales that engines find for the inputs.
    """

    codes_OI: Tensor
    scale_OG: Tensor
    bits: int
    zero_OG: Tensor | None = None
    divisor: Tensor | None = None
    input_divisor: Tensor | None = None


class PackedStack(Protocol):
    """Matrices of equal shape on a grid: codes int8 [B, O, I], scales [B, O, G], bits of each of the B."""

    @property
    def codes(self) -> Tensor: ...  # noqa: D102

    @property
    def scale(self) -> Tensor: ...  # noqa: D102

    @property
    def bits(self) -> Sequence[int]: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class LayerToStore:
    """A layer of a model as it will be stored, in plain numbers, and the codes of its packed matrices by name."""

    model: PreTrainedModel
    index: int
    layer: nn.Module
    packed: Mapping[str, PackedStack]


@dataclass(frozen=True, slots=True, kw_only=True)
class Writer:
    """How matrices on a grid are stored; with no field set, as the plain numbers that their codes stand for.

    A plain format has `parts`: what is stored of one matrix, under the names that stock checkpoints give to it. Its
    matrices have one width. numbers: what it rounds to, in the words of `quantize`'s table; inputs: that share a scale,
    whatever else is asked for (0: a whole row), None for what the recipe says.
    config: the quantization_config of config.json; shared: which matrices have to have one group size, by what messages
    call them: whether a kind of matrix is one of them; refuses: why it does not hold what is asked for, as the rest of
    a sentence that begins with `format=...`, empty if it does; scale_dtype: of scales, None for that of the
    checkpoint's weights; excepts: whether `config` excepts modules beside the model's, which are left out otherwise;
    spares: whether its reader leaves plain what transformers keeps so in an architecture, whatever a config says.

    A format of an edited architecture has `layer` alone: the tensors of a layer by name, codes in modules of their own.
    Edits say what is packed, and each matrix may have a width of its own.
    """

    parts: Callable[[CodedMatrix], StoredWeight] | None = None
    numbers: str = "int"
    inputs: int | None = None
    config: Callable[[Packing], dict[str, Any]] | None = None
    shared: Mapping[str, Callable[[Kind], bool]] = field(default_factory=dict)
    refuses: Callable[[Request], str] = lambda _: ""
    scale_dtype: torch.dtype | None = None
    excepts: bool = False
    spares: bool = False
    layer: Callable[[LayerToStore], dict[str, Tensor]] | None = None


def common_bits(grids: Sequence[Grid]) -> dict[str, Any]:
    """The width of all packed matrices, for PackedWeight, where there is one: narrow ones do not tell 3 bits from 4."""
    found = {grid.bits for grid in grids}
    return {"bits": found.pop()} if len(found) == 1 else {}


def _not_tried(_config: Config) -> Verdict:
    return True, "not tried: by its loaders"


def _as_its_family(_config: Config) -> Verdict:
    return True, "as any other model of its family"


def _by_converter(_config: Config) -> Verdict:
    return True, "not tried: by convert_hf_to_gguf.py"


def vllm_integers(bits: Sequence[int]) -> Verdict:
    """What vLLM makes of whole codes of these widths."""
    if not set(bits) <= set(VLLM_FUSED_BITS):
        return False, f"its fused experts take 4 and 8 bits, not {', '.join(map(str, bits))}: use format=dense"
    return True, "not tried: by its loaders and quantized kernels (a GPU)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaders:
    """Which programs load a plain checkpoint in a format, and how or why not, each as (whether, how or why not).

    All are asked with the config, vllm and llama_cpp for families that they know;
    card: what stock transformers makes of packed weights, in the words of a model card.
    """

    transformers: Callable[[Config], Verdict] = _as_its_family
    vllm: Callable[[Config], Verdict] = _not_tried
    llama_cpp: Callable[[Config], Verdict] = _by_converter
    card: str = "stock transformers needs `pip install compressed-tensors` and makes them dense"


def _not_left_out(_config: Config, names: Sequence[str]) -> dict[str, Any]:
    raise ValueError(f"what says that weights are packed cannot leave out {names[0]}: use a bf16 copy.")


def leave_out_modules(config: Config, names: Sequence[str]) -> dict[str, Any]:
    """The config of a format that lists plain modules as transformers does."""
    return {**config, "modules_to_not_convert": [*(config.get("modules_to_not_convert") or ()), *names]}


OURS_ALONE = Loaders(
    transformers=lambda _: (False, "it knows no such format: use moe_compress.load"),
    vllm=lambda _: (False, "it knows no such format: use format=dense"),
    llama_cpp=lambda _: (False, "its converter knows no such format: use format=dense"),
    card="no other program reads them",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A storage format of weights.

    name: what `format=` and a quantization_config call it, as the decorator has it.

    layouts: how the tensors of a stored weight lie and are read, none for a format that no quantization_config names;
    described: what of it is read, in messages; unreadable: why a quantization_config is not read, as the rest of a
    sentence, empty if it is; grids: what it says is packed; settings: what it alone knows of a stored weight, as
    keywords of the layouts that have them; scale_bytes: what a scale takes of a file by the bits of its codes, from the
    config and the size of the model's dtype, without those where it is one number of that for a group of inputs;
    leave_out: the config once modules of these names, and what is inside them, are plain numbers; joined: one config
    for what is packed before and anew, None where none can say that; foreign: endings of tensors beside the codes of
    its relatives that are not read; experts: what `expert_dtype` may say beside its config. All but `leave_out` and
    `joined` are given a config with what stands apart of it of
    experts.

    whole_codes: whether codes and a scale each are all that there is of what a config says is packed, so that it stays
    packed in memory, of some matrices at least.

    kept_by_stock: whether stock transformers has kernels of its own for it, and loads whole models; else this package
    does, and makes dense in memory what has no kernel.

    loaders: which programs load it, none but moe_compress.load unless it is said; writer: how it is written, None for a
    format that is only read.
    """

    name: str = ""
    layouts: tuple[type[StoredWeight], ...] = ()
    described: str = ""
    unreadable: Callable[[Config], str] = lambda _: ""
    grids: Callable[[Config], list[Grid]] = lambda _: []
    settings: Callable[[Config], dict[str, Any]] = lambda _: {}
    scale_bytes: Callable[[Config, int], Mapping[int, float]] = lambda _config, _itemsize: {}
    leave_out: Callable[[Config, Sequence[str]], dict[str, Any]] = _not_left_out
    joined: Callable[[Config, Config], dict[str, Any] | None] = lambda _before, _new: None
    foreign: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()
    whole_codes: Callable[[Config], bool] = lambda _: False
    kept_by_stock: bool = False
    loaders: Loaders = OURS_ALONE
    writer: Writer | None = None


_FORMATS: dict[str, Format] = {}


def storage_format(
    name: str, *, written: bool = True, fallback: int = 0, implies: Mapping[str, Any] | None = None
) -> Callable[[Callable[[], Format]], Callable[[], Format]]:
    """Register the format that a function describes; see `Format`.

    implies: what other parameters of a recipe then are by default, such as bits; written: whether `format=` may ask for
    it; fallback: above 0 for one that holds whatever others do not: it is listed behind them. All are read from the
    source, before torch is imported.
    """

    def register(describe: Callable[[], Format]) -> Callable[[], Format]:
        if name in _FORMATS:
            raise ValueError(f"the storage format {name!r} is registered twice.")
        found = replace(describe(), name=name)
        if written != (found.writer is not None):
            raise ValueError(f"the storage format {name!r} needs a writer, or written=False.")
        _FORMATS[name] = found
        return describe

    return register


def formats() -> Mapping[str, Format]:
    """All formats by name; the first call imports the modules of this folder."""
    _import_all()
    return _FORMATS


@functools.cache
def _import_all() -> None:
    for module in pkgutil.iter_modules(importlib.import_module(PACKAGE).__path__, f"{PACKAGE}."):
        importlib.import_module(module.name)


def format_in(values: Mapping[str, Any]) -> Format:
    """The format that config.json says weights are in, under an ordinary or an edited architecture."""
    config = values.get(QUANTIZATION)
    if config:
        return formats()[config["quant_method"]]
    edits = values.get("moe_compress", {}).get("edits", ())
    return formats()[EDITED_PACKED if any(edit["edit"] == "pack_matrices" for edit in edits) else DENSE]
