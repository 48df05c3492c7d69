"""Models with every parameter on the meta device: built from config.json values, nothing read."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import build_glob_alternation
from transformers.initialization import no_init_weights
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from moe_compress.models.families import entry_of
from moe_compress.models.hf.edited_architectures import edited_classes_of
from moe_compress.models.modeling import edited_model
from moe_compress.utils.devices import DTYPES

# Without one of these, layers are built that compute nothing.
COUNTED = ("vocab_size", "hidden_size", "num_attention_heads")


def read_values(path: Path) -> dict[str, Any]:
    """The values of a config.json (or of the folder that holds it), special floats decoded."""
    values, _ = PreTrainedConfig.get_config_dict(path)
    return values


def config_from(values: Mapping[str, Any]) -> PreTrainedConfig:
    """The config object of config.json values."""
    model_type = values.get("model_type")
    if model_type is None:
        raise ValueError("config.json names no model_type, so nothing can tell which architecture this is.")
    base_type = str(model_type).removeprefix(edited_model.PREFIX)
    if model_type not in CONFIG_MAPPING and base_type in CONFIG_MAPPING:  # registered after this package was imported
        CONFIG_MAPPING.register(model_type, edited_classes_of(base_type)[0])
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"model_type {model_type!r} is not an architecture of transformers {transformers.__version__}."
        )
    return CONFIG_MAPPING[model_type].from_dict(copy.deepcopy(dict(values)))


def is_architecture(model_type: Any) -> bool:
    """Whether transformers has an architecture of this name (or an edited one of ours)."""
    return isinstance(model_type, str) and model_type.removeprefix(edited_model.PREFIX) in CONFIG_MAPPING


def stored_dtype(values: Mapping[str, Any]) -> torch.dtype:
    """The dtype in which config.json values say that weights are stored; bf16 where they do not say."""
    return DTYPES.get(str(values.get("dtype") or values.get("torch_dtype") or "bfloat16"), torch.bfloat16)


def encode_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """config.json values with infinities and NaN in transformers' own JSON notation."""
    return PreTrainedConfig._encode_special_floats(dict(values))


def skeleton(config: PreTrainedConfig, dtype: torch.dtype, attn: str | None = None) -> PreTrainedModel:
    """The model with every parameter on the meta device and every buffer real; nothing is read."""
    config = copy.deepcopy(config)
    for name in COUNTED:
        if isinstance(count := getattr(config, name, None), int) and count < 1:
            raise ValueError(f"config.json says {name}={count}: no {config.model_type} model is like that.")
    keywords: dict[str, Any] = {"dtype": dtype}
    if attn is not None:
        keywords["attn_implementation"] = attn
    try:
        # Nothing is on the meta device to be initialised; going through it all the same takes most of the time.
        with quiet(), no_init_weights(), init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **keywords)
    except ImportError as error:
        raise ValueError(f"attn={attn} is not available here: {error}") from error
    except (RuntimeError, ArithmeticError, AssertionError) as error:
        said = " ".join(str(error).split()[:30])
        raise ValueError(f"config.json describes a {config.model_type} model that cannot be built: {said}") from error
    _keep_in_fp32(model, dtype)
    return model.eval().requires_grad_(False)


def _keep_in_fp32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give fp32 to what `from_pretrained` keeps in fp32 in a half-precision model: above all, selection biases."""
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return
    kept, _, _ = build_glob_alternation(list(plan))
    for name, tensor in model.state_dict().items():
        if kept.search(name) and tensor.is_floating_point():
            module_name, _, leaf = name.rpartition(".")
            module = model.get_submodule(module_name)
            if leaf in module._parameters:
                module._parameters[leaf] = nn.Parameter(tensor.float(), requires_grad=False)
            else:
                module._buffers[leaf] = tensor.float()


def stack(model: PreTrainedModel) -> Any:
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
    layers: nn.ModuleList = stack(model).layers
    return layers


def num_layers(config: PreTrainedConfig) -> int:
    """How many decoder layers a config stands for (extra prediction layers behind them are not counted)."""
    return int(getattr(config, entry_of(config).layers_key))


def tied_names(config: PreTrainedConfig) -> dict[str, str]:
    """Parameters that the config says are another one's: name -> the other's; none where it ties nothing."""
    if not getattr(config, "tie_word_embeddings", False):
        return {}
    found = getattr(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], "_tied_weights_keys", None)
    return dict(found) if isinstance(found, dict) else {}


def tie(model: PreTrainedModel) -> None:
    """Tie what stock transformers ties once a checkpoint is loaded: a name that was not stored to the one that was."""
    absent = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.is_meta}
    with quiet():
        model.tie_weights(missing_keys=absent, recompute_mapping=False)


def layers_prefix(model: PreTrainedModel) -> str:
    """The dotted module name of the list of decoder layers, with a final dot."""
    layers = decoder_layers(model)
    return next(name for name, module in model.named_modules() if module is layers) + "."


def layer_kind(layer: nn.Module) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Names and shapes of a layer's parameters: what they say of one layer they say of all of its kind."""
    return tuple((name, tuple(each.shape)) for name, each in layer.named_parameters())


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
