"""Which programs can load a checkpoint, and why not: from its config and the names of its tensors alone.

transformers is tried by `verify`; of vLLM and llama.cpp this is what their loaders ask for, as read, and tried once on
tiny models (Mixtral and Qwen3-MoE in both, packed ones in llama.cpp's converter).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moe_compress.checkpoints.formats.quantization_config import QUANTIZATION
from moe_compress.checkpoints.reader import Checkpoint
from moe_compress.models.families import family_named

FUSED_BITS = (4, 8)


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


def _method(values: Mapping[str, Any]) -> str:
    return str((values.get(QUANTIZATION) or {}).get("quant_method", ""))


def _transformers(values: Mapping[str, Any]) -> tuple[bool, str]:
    if _method(values) == "gptq":
        return False, "fused experts are not loaded from GPTQ's layout: use moe_compress.load, gptqmodel or vLLM"
    if "moe_compress" in values and _method(values):
        return False, "packed in a plain format under an edited architecture: use moe_compress.load"
    if "moe_compress" in values:
        return True, "with trust_remote_code=True, or behind `import moe_compress`"
    if _method(values) == "compressed-tensors":
        return True, "with compressed-tensors installed; weights are made dense"
    return True, "as any other model of its family"


def _vllm(values: Mapping[str, Any]) -> tuple[bool, str]:
    if "moe_compress" in values:
        return False, "its layers differ, and vLLM's models are alike in all layers"
    if not family_named(values["model_type"]).vllm:
        return False, f"{values['model_type']} is not known to it as far as this package knows"
    bits = _bits(values)
    if bits and not set(bits) <= set(FUSED_BITS):
        return False, f"its fused experts take 4 and 8 bits, not {', '.join(map(str, bits))}: use format=dense"
    return True, "not tried: by its loaders" + (" and quantized kernels (a GPU)" if bits else "")


def _llama_cpp(values: Mapping[str, Any]) -> tuple[bool, str]:
    if "moe_compress" in values:
        return False, "GGUF files say one number of experts for all layers"
    if not family_named(values["model_type"]).llama_cpp:
        return False, f"{values['model_type']} is not known to its converter as far as this package knows"
    if _method(values) in ("compressed-tensors", "gptq"):
        return True, "not tried: convert_hf_to_gguf.py makes the weights dense"
    return True, "not tried: by convert_hf_to_gguf.py"


def _bits(values: Mapping[str, Any]) -> list[int]:
    """Widths of weights that are packed as whole numbers."""
    config = values.get(QUANTIZATION) or {}
    groups = config.get("config_groups", {}).values()
    found = {group["weights"]["num_bits"] for group in groups}
    return sorted(found | ({config["bits"]} if "bits" in config else set()))
