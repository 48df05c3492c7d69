"""The one file that touches transformers' internals; pinned to 5.23, held by identity tests over every family.

Four seams: a *skeleton* (parameters on the meta device), *names* (checkpoint tensors <-> parameters, both ways,
one layer at a time), *calls* (how each decoder layer is called), and the *experts function* (what really was
routed where). Shapes: B sequences, S positions, T = B*S tokens, D model width, K experts per token, E experts.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _grouped_linear
from transformers.modeling_utils import LoadStateDictConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

from moe_compress.model import edited

LAYER_KEY = re.compile(r"(?:^|\.)layers\.(\d+)\.")
EXPERTS_FUNCTION = "moe_compress"
MODELLING_FILE = "modeling_moe_compress"


def layer_of(key: str) -> int | None:
    """Which decoder layer a checkpoint tensor belongs to; None for embeddings, final norm and head."""
    found = LAYER_KEY.search(key)
    return int(found.group(1)) if found else None


# --- skeleton ---------------------------------------------------------------------------------------------


def read_values(path: Path) -> dict[str, Any]:
    """The values of a config.json (or of the folder that holds it), special floats decoded."""
    values, _ = PreTrainedConfig.get_config_dict(path)
    return values


def config_from(values: Mapping[str, Any]) -> PreTrainedConfig:
    """The config object of config.json values."""
    model_type = values.get("model_type")
    if model_type is None:
        raise ValueError("config.json names no model_type, so nothing can tell which architecture this is.")
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"model_type {model_type!r} is not an architecture of transformers {transformers.__version__}."
        )
    return CONFIG_MAPPING[model_type].from_dict(copy.deepcopy(dict(values)))


def encode_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """config.json values with infinities and NaN in transformers' own JSON notation."""
    return PreTrainedConfig._encode_special_floats(dict(values))


def skeleton(config: PreTrainedConfig, dtype: torch.dtype, attn: str | None = None) -> PreTrainedModel:
    """The model with every parameter on the meta device and every buffer real; nothing is read."""
    config = copy.deepcopy(config)
    keywords: dict[str, Any] = {"dtype": dtype}
    if attn is not None:
        keywords["attn_implementation"] = attn
    try:
        with quiet(), init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, **keywords)
    except ImportError as error:
        raise ValueError(f"attn={attn} is not available here: {error}") from error
    return model.eval().requires_grad_(False)


def _stack(model: PreTrainedModel) -> Any:
    """The module that holds the list of decoder layers."""
    holders: tuple[Any, ...] = (model.base_model, getattr(model, "model", None))
    for holder in holders:
        if isinstance(getattr(holder, "layers", None), nn.ModuleList):
            return holder
    raise ValueError(f"{type(model).__name__} keeps its decoder layers under a name that is not known here.")


def shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Names and shapes of everything that a checkpoint of this model holds."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def buffers_to(model: PreTrainedModel, device: torch.device) -> None:
    """Move the real tensors of a skeleton (rotary tables, embeddings, head) to the device."""
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._buffers, module._parameters)
        for table in tables:
            for name, tensor in table.items():
                if tensor is not None and not tensor.is_meta and tensor.device != device:
                    moved = tensor.detach().to(device)
                    table[name] = nn.Parameter(moved, requires_grad=False) if table is module._parameters else moved


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The list of decoder layers of a causal language model."""
    layers: nn.ModuleList = _stack(model).layers
    return layers


def layers_prefix(model: PreTrainedModel) -> str:
    """The dotted module name of the list of decoder layers, with a final dot."""
    layers = decoder_layers(model)
    return next(name for name, module in model.named_modules() if module is layers) + "."


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' notes and bars; what matters is checked and raised by our own code."""
    hf = transformers.utils.logging
    level, bars = hf.get_verbosity(), hf.is_progress_bar_enabled()
    hf.set_verbosity(logging.ERROR)
    hf.disable_progress_bar()
    try:
        yield
    finally:
        hf.set_verbosity(level)
        if bars:
            hf.enable_progress_bar()


# --- edited architectures -----------------------------------------------------------------------------------


def _classes(base_type: str) -> tuple[Any, Any]:
    """The config and causal-language-model classes of an architecture."""
    config_class = CONFIG_MAPPING[base_type]
    return config_class, MODEL_FOR_CAUSAL_LM_MAPPING[config_class]


@functools.cache
def _edited_classes(base_type: str) -> tuple[Any, Any]:
    classes = edited.edited_classes(*_classes(base_type))
    AutoModelForCausalLM.register(*classes)
    return classes


def _stand_in_config(base_type: str) -> type:
    """What AutoConfig finds under an edited model_type: it makes the real classes when first used."""

    def from_dict(values: Mapping[str, Any], **kwargs: Any) -> Any:
        return _edited_classes(base_type)[0].from_dict(values, **kwargs)

    body = {"model_type": edited.PREFIX + base_type, "from_dict": staticmethod(from_dict), "__module__": __name__}
    return type("EditedConfig", (), body)


def register_edited_architectures() -> None:
    """Let `AutoModelForCausalLM` load edited checkpoints of every architecture; imports none of them."""
    for base_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        CONFIG_MAPPING.register(edited.PREFIX + base_type, _stand_in_config(base_type), exist_ok=True)


def edited_config_values(base: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, Any]:
    """config.json values of an edited checkpoint, which never loads as the original architecture."""
    config_class, model_class = _edited_classes(base["model_type"])
    return {
        **base,
        "model_type": config_class.model_type,
        "architectures": [model_class.__name__],
        "auto_map": {
            "AutoConfig": f"{MODELLING_FILE}.{config_class.__name__}",
            "AutoModelForCausalLM": f"{MODELLING_FILE}.{model_class.__name__}",
        },
        "moe_compress": {**manifest, "base_architectures": base.get("architectures")},
    }


def modelling_files(values: Mapping[str, Any]) -> dict[str, str]:
    """The Python files that an edited checkpoint carries, by name; none for a plain one."""
    if "moe_compress" not in values:
        return {}
    config_class, model_class = _classes(values["moe_compress"]["base_model_type"])
    loader = f'''"""{model_class.__name__} with layers that differ, as its config.json says under `moe_compress`."""

from {config_class.__module__} import {config_class.__name__}
from {model_class.__module__} import {model_class.__name__}

from .moe_compress_edited import edited_classes

Edited{config_class.__name__}, Edited{model_class.__name__} = edited_classes(
    {config_class.__name__}, {model_class.__name__}
)
'''
    return {f"{MODELLING_FILE}.py": loader, "moe_compress_edited.py": inspect.getsource(edited)}


# --- names ------------------------------------------------------------------------------------------------


def materialize(model: PreTrainedModel, tensors: Mapping[str, Any], device: torch.device) -> None:
    """Put checkpoint tensors (or safetensors slices) into the skeleton's parameters, converted and cast.

    One parameter at a time, so that at most one fused tensor exists twice. Raises ValueError when a tensor
    fits no parameter or has the wrong shape.
    """
    mapping: list[Any] = get_model_conversion_mapping(model)
    for group in _by_parameter(model, mapping, tensors):
        with quiet():
            info, _ = convert_and_load_state_dict_in_model(
                model,
                group,
                LoadStateDictConfig(weight_mapping=mapping, device_map={"": str(device)}, dtype=model.dtype),
            )
        wrong = [*info.unexpected_keys, *info.mismatched_keys, *info.conversion_errors, *info.error_msgs]
        if wrong:
            raise ValueError(
                f"the checkpoint's tensors do not fit {type(model).__name__}: {sorted(map(str, wrong))[:3]}."
            )
    used = [conversion for conversion in mapping if conversion.was_used()]
    model.__dict__["_weight_conversions"] = used


def _by_parameter(model: PreTrainedModel, mapping: list[Any], tensors: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Group checkpoint tensors by the parameter that they end up in."""
    renamings = [m for m in mapping if not hasattr(m, "operations")]
    converters = [m for m in mapping if hasattr(m, "operations")]
    expected = model.state_dict()
    groups: dict[str, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        name, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, expected)
        groups.setdefault(name, {})[key] = tensor
    return list(groups.values())


def checkpoint_tensors(model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters by module name -> tensors by checkpoint name, as `save_pretrained` would write them."""
    return revert_weight_conversion(model, dict(state))


def layer_state(model: PreTrainedModel, index: int) -> dict[str, Tensor]:
    """The parameters and saved buffers of one layer under their full module names."""
    prefix = f"{layers_prefix(model)}{index}."
    return {prefix + name: tensor for name, tensor in decoder_layers(model)[index].state_dict().items()}


# --- calls ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LayerCall:
    """How the model calls one of its layers: everything but the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Recorder(nn.Module):
    """Stands in for a decoder layer: keeps the call and returns `output`, or what it was given."""

    def __init__(self, layer: nn.Module, output: Tensor | None = None) -> None:
        super().__init__()
        self.__dict__["_layer"] = layer
        self.call: LayerCall | None = None
        self.entered: Tensor | None = None
        self.output = output

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_layer"], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.call, self.entered = LayerCall(args, kwargs), hidden_states
        return hidden_states if self.output is None else self.output


@contextlib.contextmanager
def _stand_ins(model: PreTrainedModel, output: Tensor | None = None) -> Iterator[list[_Recorder]]:
    stack = _stack(model)
    real = stack.layers
    recorders = [_Recorder(layer, output) for layer in real]
    stack.layers = nn.ModuleList(recorders)
    try:
        yield recorders
    finally:
        stack.layers = real


@torch.no_grad()
def enter(model: PreTrainedModel, ids_BS: Tensor, mask_BS: Tensor | None) -> tuple[Tensor, list[LayerCall]]:
    """Embed a batch: the hidden states [B, S, D] that enter layer 0, and how each layer will be called.

    `mask_BS` is None without padding, so that the fast attention paths stay open. Only embeddings and
    buffers need to be real: masks that alternate by layer come out right because the model itself makes them.
    """
    with _stand_ins(model) as recorders, quiet():
        model(ids_BS, attention_mask=mask_BS, use_cache=False, logits_to_keep=1)
    calls = [recorder.call for recorder in recorders]
    assert recorders[0].entered is not None and None not in calls
    return recorders[0].entered, [call for call in calls if call is not None]


@torch.no_grad()
def head(model: PreTrainedModel, hidden_TD: Tensor) -> Tensor:
    """Final norm and language-model head: logits [T, V] of final hidden states [T, D]."""
    ids = torch.zeros(1, len(hidden_TD), dtype=torch.long, device=hidden_TD.device)
    with _stand_ins(model, output=hidden_TD[None]), quiet():
        return model(ids, use_cache=False).logits[0]


@torch.no_grad()
def run_layer(layer: nn.Module, hidden_BSD: Tensor, call: LayerCall) -> Tensor:
    """One decoder layer, called as the model would call it."""
    out = layer(hidden_BSD, *call.args, **call.kwargs)
    return out[0] if isinstance(out, tuple) else out


# --- experts function ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RoutedRows:
    """What really went through the experts of one MoE block. R = routed (token, expert) pairs, by expert.

    token_R, expert_R: which token went to which expert; input_RD: what the expert saw; inner_RF: the input of
    its down projection; output_RD: its output before the gate weight; gate_R: the gate weight applied;
    routed_TD: the weighted sum that the block adds.
    """

    token_R: Tensor
    expert_R: Tensor
    input_RD: Tensor
    inner_RF: Tensor
    output_RD: Tensor
    gate_R: Tensor
    routed_TD: Tensor


Listener = Callable[[RoutedRows], None]


def tap(block: nn.Module, experts: nn.Module, listener: Listener | None) -> None:
    """Report every pass through the fused experts of a block to `listener` (None: stop).

    Experts that transformers dispatches (all families but Llama-4) report from the experts function; Llama-4's
    block, which runs every expert on every token, is replaced by a routed forward while it is listened to.
    """
    experts.__dict__["_moe_compress_listener"] = listener
    if hasattr(experts, "_apply_gate"):
        return
    if listener is None:
        block.__dict__.pop("forward", None)
    else:
        block.__dict__["forward"] = functools.partial(_gate_on_input_forward, block)


def _gate_on_input_forward(block: Any, hidden_BSD: Tensor) -> tuple[Tensor, Tensor]:
    """Llama-4's MoE block on routed tokens only; the router's weight scales the expert's input.

    `output_RD` is what the expert adds divided by its gate weight, so that gate * output is its contribution.
    """
    hidden_TD = hidden_BSD.reshape(-1, block.hidden_dim)
    _, logits_TE = block.router(hidden_TD)
    value_TK, index_TK = torch.topk(logits_TE, block.top_k, dim=1)
    expert_R, order = torch.sort(index_TK.reshape(-1))
    token_R = order // block.top_k
    gate_R = torch.sigmoid(value_TK.float()).to(hidden_TD.dtype).reshape(-1)[order]
    experts = block.experts
    ends_E = torch.bincount(expert_R, minlength=experts.num_experts).cumsum(0).to(torch.int32)
    input_RD = hidden_TD[token_R] * gate_R.unsqueeze(-1)
    gate_RF, up_RF = _grouped_linear(input_RD, experts.gate_up_proj, ends_E, is_transposed=True).chunk(2, dim=-1)
    inner_RF = up_RF * experts.act_fn(gate_RF)
    added_RD = _grouped_linear(inner_RF, experts.down_proj, ends_E, is_transposed=True)
    routed_TD = torch.zeros_like(hidden_TD).index_add_(0, token_R, added_RD)
    output_RD = added_RD / gate_R.unsqueeze(-1)
    listener = experts.__dict__["_moe_compress_listener"]
    listener(RoutedRows(token_R, expert_R, input_RD, inner_RF, output_RD, gate_R, routed_TD))
    return block.shared_expert(hidden_TD) + routed_TD, logits_TE


def use_experts_function(model: PreTrainedModel) -> None:
    """Let every fused experts module of the model run through the function that can be tapped."""
    model.set_experts_implementation(EXPERTS_FUNCTION)


def _experts_forward(experts: Any, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """The grouped-matmul experts of transformers, with the same operations in the same order, reporting rows."""
    top_k = index_TK.shape[-1]
    expert_R, order = torch.sort(index_TK.reshape(-1))
    token_R, gate_R = order // top_k, weight_TK.reshape(-1)[order]
    ends_E = torch.bincount(expert_R, minlength=experts.num_experts).cumsum(0).to(torch.int32)

    def linear(x_RI: Tensor, name: str) -> Tensor:
        bias_EO = getattr(experts, f"{name}_bias") if experts.has_bias else None
        bias_RO = None if bias_EO is None else bias_EO[expert_R]
        weight = getattr(experts, name)
        return _grouped_linear(x_RI, weight, ends_E, bias=bias_RO, is_transposed=experts.is_transposed)

    input_RD = hidden_TD[token_R]
    inner_RF = linear(input_RD, "gate_up_proj" if experts.has_gate else "up_proj")
    inner_RF = experts._apply_gate(inner_RF) if experts.has_gate else experts.act_fn(inner_RF)
    output_RD = linear(inner_RF, "down_proj")
    if experts.has_post_expert_norm:
        output_RD = experts.post_expert_norm(output_RD)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    weighted_RD = (output_RD * gate_R.unsqueeze(-1))[back]
    routed_TD = weighted_RD.view(len(hidden_TD), top_k, -1).sum(dim=1).to(hidden_TD.dtype)
    listener = experts.__dict__.get("_moe_compress_listener")
    if listener is not None:
        listener(RoutedRows(token_R, expert_R, input_RD, inner_RF, output_RD, gate_R, routed_TD))
    return routed_TD


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_FUNCTION, _experts_forward)
register_edited_architectures()
