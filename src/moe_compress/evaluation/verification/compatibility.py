"""Which programs can load a checkpoint, and why not: from its config and the names of its tensors alone.

transformers is tried by `verify`; of vLLM and llama.cpp this is what their loaders ask for, as read, and tried once on
tiny models (Mixtral and Qwen3-MoE in both, packed ones in llama.cpp's converter).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moe_compress.checkpoints.formats.registry import QUANTIZATION, format_in
from moe_compress.checkpoints.gguf.architectures import NAMES as LLAMA_CPP_NAMES
from moe_compress.checkpoints.gguf.architectures import has_plain_queries
from moe_compress.checkpoints.reader import Checkpoint
from moe_compress.models.families import family_named


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a program loads the checkpoint, and why or how."""

    client: str
    loads: bool
    why: str


def compatibility(checkpoint: Checkpoint) -> list[Verdict]:
    """transformers, vLLM and llama.cpp, in that order."""
    values = checkpoint.values
    clients: dict[str, Callable[[Mapping[str, Any]], tuple[bool, str]]] = {
        "transformers": _transformers,
        "vLLM": _vllm,
        "llama.cpp": _llama_cpp,
    }
    return [Verdict(client, *ask(values)) for client, ask in clients.items()]


def _transformers(values: Mapping[str, Any]) -> tuple[bool, str]:
    loads, how = format_in(values).loaders.transformers(values.get(QUANTIZATION) or {})
    if not loads or "moe_compress" not in values:
        return loads, how
    if values.get(QUANTIZATION):
        return False, "packed in a plain format under an edited architecture: use moe_compress.load"
    return True, "with trust_remote_code=True, or behind `import moe_compress`"


def _vllm(values: Mapping[str, Any]) -> tuple[bool, str]:
    if "moe_compress" in values:
        return False, "its layers differ, and vLLM's models are alike in all layers"
    if not family_named(values["model_type"]).vllm:
        return False, f"{values['model_type']} is not known to it as far as this package knows"
    return format_in(values).loaders.vllm(values.get(QUANTIZATION) or {})


def _llama_cpp(values: Mapping[str, Any]) -> tuple[bool, str]:
    if "moe_compress" in values:
        return False, "GGUF files say one number of experts for all layers"
    family = family_named(values["model_type"])
    if not family.llama_cpp:
        return False, f"{values['model_type']} is not known to its converter as far as this package knows"
    layers, words = values.get(family.layers_key), values.get("vocab_size")
    deepseek2 = LLAMA_CPP_NAMES.get(values["model_type"]) == "deepseek2"
    if deepseek2 and bool(values.get("q_lora_rank")) == has_plain_queries(layers, words):
        rank = "no q_lora_rank" if has_plain_queries(layers, words) else "a q_lora_rank"
        return False, f"its loader expects {rank} of a model of {layers} layers"
    return format_in(values).loaders.llama_cpp(values.get(QUANTIZATION) or {})
