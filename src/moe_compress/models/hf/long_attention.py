"""Attention over long windows in bounded memory: scores and masks are made for some queries at a time.

Transformers' eager attention, and torch's own where its fast kernels do not apply (a mask; values of another width than
keys), hold a score for every pair of positions. Every row of a softmax stands alone, so that blocks of queries give
the same. B sequences, H heads, S positions, Q queries of a block.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

LONG = 4096  # positions; shorter windows run as transformers runs them, to the last bit
SCORES = 1 << 24  # scores that are held at a time
NAMES = ("sdpa", "eager")
# What may be asked of a mask that is not there yet: how it looks, not what stands in it.
ASKED = {getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "is_meta", "requires_grad")}
ASKED |= {Tensor.dim, Tensor.size}


class WholeMaskNeeded(Exception):
    """A model wants to compute with a mask of which only rows are made."""


class LazyMask(Tensor):
    """Stands in for a mask [B, 1, S, S]: its rows are made when a block of queries needs them."""

    make_rows: Callable[[int, int], Tensor]
    key: Any

    @classmethod
    def of(cls, make_rows: Callable[[int, int], Tensor], shape: tuple[int, ...], key: Any) -> LazyMask:
        """A mask by its rows; those of equal keys are the same."""
        mask = torch.empty(1).expand(shape).as_subclass(cls)
        mask.make_rows, mask.key = make_rows, key
        return mask

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.equal:
            return args[0].key is not None and args[0].key == args[1].key
        if func in ASKED:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise WholeMaskNeeded

    def __deepcopy__(self, _: Any) -> LazyMask:
        return self


@contextlib.contextmanager
def lazy_masks(length: int) -> Iterator[None]:
    """Masks that are made for long windows are LazyMasks here."""
    mapping = AttentionMaskInterface._global_mapping
    with _replaced(mapping, {name: _lazily(mapping[name], name == "sdpa") for name in NAMES} if length > LONG else {}):
        yield


@contextlib.contextmanager
def blockwise_attention(length: int) -> Iterator[None]:
    """Attention over long windows goes block by block here."""
    mapping = AttentionInterface._global_mapping
    with _replaced(mapping, {name: _in_blocks(mapping.get(name)) for name in NAMES} if length > LONG else {}):
        yield


@contextlib.contextmanager
def _replaced(mapping: dict[str, Any], new: dict[str, Any]) -> Iterator[None]:
    old = dict(mapping)
    mapping.update(new)
    try:
        yield
    finally:
        mapping.clear()
        mapping.update(old)


def _lazily(make: Any, skips: bool) -> Callable[..., Tensor | None]:
    """A mask function of transformers, which then makes rows on demand; skips: none where attention is causal."""

    def mask(batch_size: int, q_length: int, kv_length: int, q_offset: int = 0, **how: Any) -> Tensor | None:
        if q_length != kv_length or not isinstance(q_offset, int):
            return make(batch_size, q_length, kv_length, q_offset, **how)
        plain = how.get("attention_mask") is None and how.get("allow_is_causal_skip", True)
        if plain and skips and how.get("local_size") is None:
            return None

        def rows(start: int, end: int) -> Tensor:
            found = make(batch_size, end - start, kv_length, q_offset + start, **{**how, "allow_is_causal_skip": False})
            assert found is not None
            return found

        return LazyMask.of(rows, (batch_size, 1, q_length, kv_length), (how.get("local_size"),) if plain else None)

    return mask


def _in_blocks(attend: Callable[..., Any] | None) -> Callable[..., Any]:
    """An attention function of transformers on some queries at a time; None: the eager one of the module's own file."""

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **how: Any
    ) -> tuple[Tensor, None]:
        whole = attend or _eager_of(module)
        length, mask = query.shape[2], attention_mask
        said = how.get("is_causal")
        causal = mask is None and (getattr(module, "is_causal", True) if said is None else said)
        # Without a mask, eager attention is not causal, and torch's own has a fast kernel for values as wide as keys.
        bounded = mask is None and (attend is None or not causal or query.shape[-1] == value.shape[-1])
        if bounded or length <= LONG or key.shape[2] != length or how.get("position_bias") is not None:
            return whole(module, query, key, value, mask, **how)
        size = max(1, SCORES // (query.shape[0] * query.shape[1] * length))
        parts = []
        for start in range(0, length, size):
            end = min(start + size, length)
            seen = end if causal else length
            rows, block = _rows(mask, start, end, query.device), query[:, :, start:end]
            parts.append(whole(module, block, key[:, :, :seen], value[:, :, :seen], rows, **how)[0])
        return torch.cat(parts, dim=1), None

    return attention


def _eager_of(module: nn.Module) -> Callable[..., Any]:
    """The eager attention that stands beside a module's class, or beside one that it was made from."""
    places = (sys.modules[kind.__module__] for kind in type(module).__mro__)
    return next(place.eager_attention_forward for place in places if hasattr(place, "eager_attention_forward"))


def _rows(mask: Tensor | None, start: int, end: int, device: torch.device) -> Tensor:
    """What queries from `start` to `end` see of all keys, [B, 1, Q, S]; without a mask, of those up to `end`."""
    if isinstance(mask, LazyMask):
        return mask.make_rows(start, end)
    if mask is not None:
        return mask[..., start:end, :]
    position_Q = torch.arange(start, end, device=device)
    return (torch.arange(end, device=device) <= position_Q[:, None])[None, None]


def with_whole_masks(value: Any) -> Any:
    """Arguments of a layer, with masks that are there in place of lazy ones."""
    if isinstance(value, LazyMask):
        with torch._C.DisableTorchFunctionSubclass():
            return value.make_rows(0, value.shape[2])
    if isinstance(value, dict):
        return {name: with_whole_masks(each) for name, each in value.items()}
    return type(value)(map(with_whole_masks, value)) if type(value) in (list, tuple) else value
