"""Whole models in memory: loaded by stock transformers and checked, or with packed weights that stay packed."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from moe_compress.checkpoints.formats.edited_packed import packed_matrix
from moe_compress.checkpoints.formats.stored_weight import PackedWeight, StoredWeight
from moe_compress.checkpoints.normalizers import require_bounded
from moe_compress.checkpoints.reader import Checkpoint, open_checkpoint, packed_size
from moe_compress.models import hf
from moe_compress.models.families import family_named
from moe_compress.models.matrices import require_masks, stored_matrices
from moe_compress.models.modeling import edit_layer
from moe_compress.models.sublayers import block_names
from moe_compress.utils.devices import dtype_name, free_memory, return_memory
from moe_compress.utils.files import gigabytes

GENERATION = "generation_config.json"


def load_model(folder: Path, dtype: torch.dtype | None = None, **keywords: Any) -> PreTrainedModel:
    """Load a plain or edited checkpoint; transformers would fill missing tensors with noise, this raises."""
    config = hf.config_from(hf.read_values(folder))
    if (folder / GENERATION).is_file():
        _generation_config(folder)
    loader = open_checkpoint(folder).auto_class if hf.is_wrapper(config) else hf.auto_class(config)
    if family_named(config.model_type).moved_keys:  # else transformers passes over what it does not read
        keywords = {"config": config, **keywords}
    with hf.quiet():
        model, info = loader.from_pretrained(
            folder, dtype=dtype or "auto", output_loading_info=True, trust_remote_code=False, **keywords
        )
    for parameter in model.parameters() if dtype is not None else ():
        # Weights that transformers makes of codes have the dtype of their scales.
        parameter.data = parameter.data.to(dtype) if parameter.is_floating_point() else parameter.data
    # Of all prediction layers, classes name only the published models' own, which they then do not speak of.
    count = hf.num_layers(model.config)
    info["unexpected_keys"] = [key for key in info["unexpected_keys"] if not hf.is_prediction_key(key, count)]
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if wrong:
        kind, names = next(iter(wrong.items()))
        raise ValueError(f"{folder} does not load cleanly: {kind.replace('_', ' ')}, such as {names[0]}.")
    require_masks(model, str(folder))
    hf.complete_experts(model)
    hf.run_text_through_part(model)
    hf.ask_for_logits_alone(model.config)
    return model.eval()


def require_memory(checkpoints: Sequence[Checkpoint], dtype: torch.dtype, device: torch.device, why: str) -> None:
    """ValueError, with what is needed, if these do not fit as whole models in `dtype` where the device has room."""
    sizes = [memory_bytes(each, dtype, device) for each in checkpoints]
    free = free_memory(device)
    if sum(sizes) > free:
        names = " and ".join(each.name for each in checkpoints)
        raise ValueError(
            f"{names} {why}: {gigabytes(sum(sizes))} as {dtype_name(dtype)} in memory, but {device.type} has "
            f"{gigabytes(free)} free: use a smaller dtype= or another device=."
        )


def memory_bytes(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> int:
    """What a whole model takes in memory in `dtype`: what is stored in codes is dense there, unless it stays packed."""
    stored = any(isinstance(entry, StoredWeight) for entry in checkpoint.tensors.values())
    if stored and checkpoint.loads_as_stock and device.type != "cpu":
        return checkpoint.bytes  # stock transformers has kernels for it there
    found = sum(parameter.nbytes for parameter in checkpoint.skeleton(dtype).parameters())
    for key in checkpoint.packed:
        numbers, scales, codes = packed_size(checkpoint.tensors[key])
        found += codes + (scales - numbers) * dtype.itemsize
    return found


def load_as_run(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, attn: str | None = None
) -> PreTrainedModel:
    """The whole model in memory; what is packed stays packed."""
    if not checkpoint.loads_as_stock:
        return load_packed(checkpoint, dtype, device, attn)
    keywords = {"attn_implementation": attn} if attn else {}
    return load_model(checkpoint.folder, dtype, device_map=str(device), **keywords)


@torch.no_grad()
def load_packed(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    attn: str | None,
    placed: Callable[[nn.Module], None] | None = None,
) -> PreTrainedModel:
    """A model whose packed matrices stay packed: they are read a layer at a time, and never made dense as a whole.

    What cannot stay packed is made dense, with a warning. placed: is given every layer once its weights are there.
    """
    model = checkpoint.skeleton(dtype, attn)
    names = block_names(model)
    for index in (None, *range(checkpoint.num_layers)):
        with checkpoint.read(checkpoint.keys(index)) as tensors:
            places = stored_matrices(model, index) if index is not None and checkpoint.packed else {}
            packed = {key: entry for key, entry in tensors.items() if key in places and _stays_packed(entry)}
            if index is not None:
                _pack(
                    hf.decoder_layers(model)[index], names, {places[key]: packed[key] for key in packed}, dtype, device
                )
            rest = {key: tensor for key, tensor in tensors.items() if key not in packed}
            hf.materialize(model, rest, device, towers=True)
        if placed is not None and index is not None:
            placed(hf.decoder_layers(model)[index])
        return_memory()
    hf.tie(model)
    dense = [key for key, entry in checkpoint.tensors.items() if isinstance(entry, StoredWeight)]
    if len(dense) > len(checkpoint.packed):
        warnings.warn(
            f"weights of {checkpoint.name} are made dense in memory: no kernel multiplies them as they are stored.",
            stacklevel=2,
        )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise ValueError(f"{checkpoint.folder} does not load cleanly: it holds no tensor for {name}.")
    hf.buffers_to(model, device)
    if (checkpoint.folder / GENERATION).is_file():
        model.generation_config = _generation_config(checkpoint.folder)
    return model.eval()


def _generation_config(folder: Path) -> GenerationConfig:
    """The checkpoint's own. ValueError for values that are none."""
    try:
        return GenerationConfig.from_pretrained(folder)
    except (OSError, TypeError, ValueError, AttributeError, LookupError, RecursionError) as error:
        raise ValueError(f"{folder / GENERATION} is no generation config ({_first_line(error)}).") from error


def _stays_packed(entry: Any) -> bool:
    return isinstance(entry, PackedWeight) and entry.stays_packed


def _pack(
    layer: nn.Module,
    names: Mapping[str, Any],
    weights: Mapping[tuple[str, int], PackedWeight],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Put packed matrices into a layer of a skeleton."""
    bits: dict[str, list[int]] = defaultdict(list)
    spans: dict[str, int] = {}
    for (name, _), weight in sorted(weights.items(), key=lambda item: item[0]):
        _, scale_OG, width, inputs = weight.packed()
        bits[name].append(width)
        spans[name] = inputs // scale_OG.shape[1]
    edit_layer.pack_matrices(layer, names, bits=bits, spans=spans)
    for (name, number), weight in weights.items():
        module = packed_matrix(layer, names, name, number)
        words_OW, scale_OG, _, _ = weight.packed()
        if not bool(scale_OG.isfinite().all()):
            raise ValueError(f"the scales of {name} (number {number}) hold NaN or infinity.")
        # Copies: what lies in a mapped file would keep all of it in memory.
        module.words = nn.Parameter(words_OW.to(device, copy=True), requires_grad=False)
        module.scales = nn.Parameter(scale_OG.to(device, dtype, copy=True), requires_grad=False)
        # Matrix by matrix, so that the words of one alone are there beside the kernel's layout.
        module.prepare(dtype, device)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def load_tokenizer(folder: Path, vocab_size: int, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer; ValueError if there is none or it has ids that the embedding lacks.

    trust_remote_code: also one that is code in the folder, which is then run.
    """
    require_bounded(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raises bare Exceptions
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise ValueError(
                f"the tokenizer of {folder} is code of its own, which runs only with trust_remote_code=true: read it "
                "first."
            ) from error
        raise ValueError(f"{folder} holds no tokenizer that transformers can read ({_first_line(error)}).") from error
    # Where there are no files, some classes make a tokenizer of their special tokens alone.
    if tokenizer.get_vocab().keys() <= tokenizer.get_added_vocab().keys():
        files = ", ".join(tokenizer.vocab_files_names.values())
        raise ValueError(f"{folder} holds no tokenizer that transformers can read (it needs {files}).")
    if not isinstance(tokenizer.model_max_length, int | float):
        raise ValueError(f"{folder}: the tokenizer's model_max_length={tokenizer.model_max_length!r} is no number.")
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if not 0 <= largest < vocab_size:
        raise ValueError(
            f"the tokenizer of {folder} has ids up to {largest}, but the model's vocabulary has {vocab_size}: "
            "it belongs to another model."
        )
    return tokenizer
