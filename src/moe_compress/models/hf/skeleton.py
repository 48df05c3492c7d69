"""Models with every parameter on the meta device: built from config.json values, nothing read."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import build_glob_alternation
from transformers.initialization import no_init_weights

from moe_compress.models.hf.config_checks import unknown_word
from moe_compress.models.hf.configs import TEXT_KEYS, auto_class, is_wrapper
from moe_compress.models.hf.expert_taps import complete_experts
from moe_compress.models.modeling.edit_layer import layers_name

# What parameters are made of, and from how many elements on it is no table that a model computes with.
FACTORIES = (torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)
LARGE = 1 << 20


class _NothingAllocated(TorchFunctionMode):
    """Tensors that are made without values, and large ones with such as parameters begin with, never have memory."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        keywords = kwargs or {}
        if keywords.get("device") is None and (func is torch.empty or func in FACTORIES):
            made = func(*args, **{**keywords, "device": "meta"})
            if func is torch.empty or made.numel() >= LARGE:
                return made
        return func(*args, **keywords)


def skeleton(
    config: PreTrainedConfig, dtype: torch.dtype, attn: str | None = None, *, towers: bool = True
) -> PreTrainedModel:
    """The model with every parameter on the meta device and every buffer real; nothing is read.

    towers: of a wrapper, all of them, or the language model alone.
    """
    config = copy.deepcopy(config)
    ask_for_logits_alone(config)
    loader = auto_class(config, towers)
    keywords: dict[str, Any] = {"dtype": dtype}
    if attn is not None:
        keywords["attn_implementation"] = attn
    try:
        # Nothing is on the meta device to be initialised; going through it all the same takes most of the time.
        with quiet(), no_init_weights(), init_empty_weights(include_buffers=False), _NothingAllocated():
            model = loader.from_config(config, trust_remote_code=False, **keywords)
    except ImportError as error:
        raise ValueError(f"attn={attn} is not available here: {error}") from error
    except (RuntimeError, ArithmeticError, AssertionError, LookupError, TypeError, AttributeError, ValueError) as error:
        if "attn_implementation" in str(error):
            raise
        said = unknown_word(config.to_dict(), str(error)) or " ".join(str(error).split()[:30])
        raise ValueError(f"config.json describes a {config.model_type} model that cannot be built: {said}") from error
    _keep_in_fp32(model, dtype)
    complete_experts(model)
    run_text_through_part(model)
    return model.eval().requires_grad_(False)


def run_text_through_part(model: PreTrainedModel) -> None:
    """Let a model of several language models that only generates run text through the one that makes text."""
    name = text_part(type(model))
    if name in model._modules:
        part = model.get_submodule(name)
        shared = ("forward", "get_decoder", "get_input_embeddings", "get_output_embeddings")
        model.__dict__ |= {each: getattr(part, each) for each in shared}


def text_part(kind: type) -> str:
    """The name of that model inside a class that has no forward of its own (Qwen3-Omni); empty for all others."""
    inside = next(key.partition(".")[0].removesuffix("_config") for key in TEXT_KEYS if "." in key)
    return inside if getattr(kind, "forward", None) is nn.Module.forward else ""


def ask_for_logits_alone(config: PreTrainedConfig) -> None:
    """Undo what a config asks of every forward beside logits: it may need what only a whole model has."""
    for each in (config, config.get_text_config()):
        each.return_dict = True
        for key in ("output_router_logits", "output_hidden_states", "output_attentions"):
            if getattr(each, key, False):
                setattr(each, key, False)


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
    decoder: Any = model.get_decoder()
    inner = (getattr(each, "model", None) for each in (decoder, model))
    holders = [each for each in (decoder, model.base_model, *inner) if isinstance(each, nn.Module)]
    named = [each for each in holders if isinstance(getattr(each, "layers", None), nn.ModuleList)]
    for holder in (*named, *holders):
        if layers_name(holder):
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
    holder = stack(model)
    layers: nn.ModuleList = getattr(holder, layers_name(holder))
    return layers


@contextlib.contextmanager
def other_layers(model: PreTrainedModel, layers: nn.ModuleList) -> Iterator[None]:
    """Other decoder layers in the place of the model's own, inside the block."""
    holder, real = stack(model), decoder_layers(model)
    name = layers_name(holder)
    setattr(holder, name, layers)
    try:
        yield
    finally:
        setattr(holder, name, real)


def tied_names(config: PreTrainedConfig) -> dict[str, str]:
    """Parameters that the config says are another one's: name -> the other's; none where it ties nothing."""
    if not getattr(config, "tie_word_embeddings", False):
        return {}
    found = getattr(auto_class(config)._model_mapping[type(config)], "_tied_weights_keys", None)
    return dict(found) if isinstance(found, dict) else {}


def kept_plain(model: PreTrainedModel) -> list[str]:
    """Modules, as the last parts of their names, that no quantizer of transformers touches in this architecture."""
    return sorted(model._keep_in_fp32_modules or ())


def tie(model: PreTrainedModel) -> None:
    """Tie what stock transformers ties once a checkpoint is loaded: a name that was not stored to the one that was."""
    absent = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.is_meta}
    with quiet():
        model.tie_weights(missing_keys=absent, recompute_mapping=False)


def layers_prefix(model: PreTrainedModel) -> str:
    """The dotted module name of the list of decoder layers, with a final dot."""
    layers = decoder_layers(model)
    return next(name for name, module in model.named_modules() if module is layers) + "."


def text_prefixes(model: PreTrainedModel) -> tuple[str, ...]:
    """How the names of all begin that text passes through: of a wrapper, its language model and head and no tower."""
    if not is_wrapper(model.config):
        return ("",)
    read = (model.get_decoder(), model.get_output_embeddings())
    return tuple(f"{name}." for name, module in model.named_modules() if module in read)


def tower_names(model: PreTrainedModel) -> list[str]:
    """The modules of a wrapper that text does not pass through, by the names under which they stand side by side."""
    read = text_prefixes(model)
    found: list[str] = []
    for name, module in model.named_modules():
        holds_text = not name or any(each.startswith(f"{name}.") for each in read)
        known = f"{name}.".startswith((*read, *(f"{each}." for each in found)))
        if not holds_text and not known and next(module.parameters(), None) is not None:
            found.append(name)
    return found


def holds_experts_beside(model: PreTrainedModel) -> bool:
    """Whether a tower beside the language model holds fused experts, too."""
    towers = map(model.get_submodule, tower_names(model)) if is_wrapper(model.config) else ()
    downs = (module._parameters.get("down_proj") for tower in towers for module in tower.modules())
    return any(down is not None and down.dim() == 3 for down in downs)


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
