"""What config.json says of packed weights: written for compressed-tensors, and read back as edits.

Experts have one scheme, all other linear maps another: that is as far as stock loaders tell schemes apart.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from moe_compress.model import hf
from moe_compress.model.edits import PackMatrices
from moe_compress.model.families import family_of
from moe_compress.model.matrices import Kind, layer_matrices, stored_matrices

QUANTIZATION = "quantization_config"
MXFP4_BITS, MXFP4_SPAN = 4, 32
EXPERTS = r"re:.*\.experts\.\d+\..*"


def scheme(bits: int, span: int, whole_rows: bool) -> dict[str, Any]:
    """A symmetric integer grid as compressed-tensors says it."""
    strategy = {"strategy": "channel"} if whole_rows else {"strategy": "group", "group_size": span}
    return {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False, **strategy}


def packed_values(
    model: PreTrainedModel, kinds: Sequence[Kind], experts: Mapping[str, Any] | None, others: Mapping[str, Any] | None
) -> dict[str, Any]:
    """config.json values of a checkpoint whose experts and other chosen linear maps are packed by these schemes."""
    groups: dict[str, Any] = {}
    if experts is not None:
        groups["experts"] = {"targets": [EXPERTS], "weights": dict(experts)}
    if others is not None:
        groups["others"] = {"targets": _patterns(model, kinds), "weights": dict(others)}
    for group in groups.values():
        group |= {"input_activations": None, "output_activations": None, "format": "pack-quantized"}
    return {
        QUANTIZATION: {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": ["lm_head"],
        }
    }


def gptq_values(
    model: PreTrainedModel, options: Mapping[str, Any], packed: Collection[str], spans: Mapping[tuple[int, str], int]
) -> dict[str, Any]:
    """config.json values of a checkpoint in GPTQ's layout; linear maps that are not packed are left out by name."""
    family = family_of(model.config)
    kept = {m.name for layer in hf.decoder_layers(model) for m in layer_matrices(layer, family)} - set(packed)
    span = next(span for (_, name), span in spans.items() if name in packed)
    found = {
        "quant_method": "gptq",
        "bits": int(options["bits"]),
        "group_size": span if options["group_size"] else -1,
        "sym": True,
        "desc_act": False,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "dynamic": {rf"-:.*layers\.\d+\.{re.escape(name)}$": {} for name in sorted(kept)},
    }
    return {QUANTIZATION: found}


def _patterns(model: PreTrainedModel, kinds: Sequence[Kind]) -> list[str]:
    """Targets for the linear maps of these kinds. A target with `experts` in it would be taken for that of experts."""
    family, names = family_of(model.config), set()
    for layer in hf.decoder_layers(model):
        names |= {matrix.name for matrix in layer_matrices(layer, family, [k for k in kinds if k != "experts"])}
    names = {name for name in names if name}
    return [r"re:.*layers\.\d+\." + re.escape(name).replace("experts", "expert[s]") + "$" for name in sorted(names)]


def packed_edits(model: PreTrainedModel, values: Mapping[str, Any]) -> list[PackMatrices]:
    """The edits that give a skeleton the room for what the config says is packed; none for a config without.

    Floating-point codes take the room of whole ones of as many bits.
    """
    config = values.get(QUANTIZATION) or {}
    if config.get("quant_method") == "mxfp4":
        return _mxfp4_edits(model)
    groups = _groups(config)
    edits, family = [], family_of(model.config)
    for index, layer in enumerate(hf.decoder_layers(model) if groups else ()):
        bits: dict[str, list[int]] = {}
        spans: dict[str, int] = {}
        widths = {matrix.name: matrix.weight_BOI.shape[2] for matrix in layer_matrices(layer, family)}
        for stored, (name, _number) in stored_matrices(model, index).items():
            weights = _scheme_of(stored.removesuffix(".weight"), name, groups)
            if weights is not None and name in widths:
                bits.setdefault(name, []).append(weights["num_bits"])
                spans[name] = weights.get("group_size") or widths[name]
        if bits:
            edits.append(PackMatrices(index, {name: tuple(each) for name, each in bits.items()}, spans))
    return edits


def says_packed(values: Mapping[str, Any]) -> bool:
    """Whether a config says of any weights that they are packed, under stock names or in an edited architecture."""
    edits = values.get("moe_compress", {}).get("edits", ())
    return bool(values.get(QUANTIZATION)) or any(edit["edit"] == "pack_matrices" for edit in edits)


def _mxfp4_edits(model: PreTrainedModel) -> list[PackMatrices]:
    """All matrices of experts, which families that publish in MXFP4 keep in one stack a layer."""
    edits, family = [], family_of(model.config)
    for index, layer in enumerate(hf.decoder_layers(model)):
        stacks = {matrix.name: matrix.weight_BOI.shape for matrix in layer_matrices(layer, family, ["experts"])}
        bits = {name: (MXFP4_BITS,) * count for name, (count, _, _) in stacks.items()}
        spans = {name: math.gcd(MXFP4_SPAN, inputs) for name, (_, _, inputs) in stacks.items()}
        if bits:
            edits.append(PackMatrices(index, bits, spans))
    return edits


def scale_bytes(values: Mapping[str, Any]) -> float | None:
    """What a scale takes of a file, where it is not one number of the model's dtype for a group of inputs."""
    config = values.get(QUANTIZATION) or {}
    if config.get("quant_method") == "fp8":  # one in fp32 for a block of outputs as well
        return 4 / float(config["weight_block_size"][0])
    return 1.0 if config.get("quant_method") == "mxfp4" else None


def _groups(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Targets and their grids; GPTQ and FP8 pack every linear map but those that they leave out."""
    if config.get("quant_method") == "fp8":
        kept = "|".join(re.escape(name) for name in config.get("modules_to_not_convert") or ())
        target = rf"re:(?!.*(?:{kept})).*" if kept else "re:.*"
        return {"all": {"targets": [target], "weights": {"num_bits": 8, "group_size": config["weight_block_size"][1]}}}
    if config.get("quant_method") != "gptq":
        return config.get("config_groups", {})
    kept = "|".join(pattern.removeprefix("-:") for pattern in config.get("dynamic") or () if pattern.startswith("-:"))
    targets = [rf"re:(?!(?:{kept})$).*" if kept else "re:.*"]
    weights = {"num_bits": config["bits"], "group_size": max(config["group_size"], 0)}
    return {"all": {"targets": targets, "weights": weights}}


def _scheme_of(stored: str, name: str, groups: Mapping[str, Any]) -> Mapping[str, Any] | None:
    for group in groups.values():
        for target in group["targets"]:
            pattern = target.removeprefix("re:")
            if target.startswith("re:") and any(re.match(pattern, each) for each in (stored, f".layers.0.{name}")):
                return group["weights"]
    return None
