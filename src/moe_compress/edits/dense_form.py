"""config.json values of a model whose layers were all made dense: of a stock architecture with the same attention.

Nobody guesses: each candidate of the family is built without weights and compared with the edited model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from moe_compress.edits.dense_layers import require_dense_family
from moe_compress.models import hf
from moe_compress.models.dense_mlp import dense_widths
from moe_compress.models.families import COUNT_KEYS, DENSE_KEY, TOP_K_KEYS, Family, entry_of
from moe_compress.models.moe import all_moe_views

# The MLP of a layer in dense architectures, and what their config calls its width.
MLP, WIDTH = "mlp", "intermediate_size"
# Edits of which a stock dense architecture would keep nothing.
OF_MODULES = ("pack_matrices", "round_activations")


def dense_values(
    base: Mapping[str, Any],
    model: PreTrainedModel,
    block: str,
    lists: Mapping[str, Any],
    edits: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The values that describe `model`, a skeleton whose edits are carried out.

    base: config.json's before them; block: what its layers call the MoE block; lists: the layer count and lists by
    layer that have changed. Raises ValueError if a layer has experts left, MLPs differ in width, or no architecture
    fits.
    """
    family, origin = entry_of(model.config), str(base["model_type"])
    require_dense_family(family)
    if hf.is_wrapper(model.config):
        raise ValueError(
            f"the language model inside {origin} cannot be made dense: its other towers expect it as it is."
        )
    if base.get("quantization_config"):
        raise ValueError(f"the weights of this {origin} are packed: make a bf16 copy dense, and quantize that.")
    kept = next((edit["edit"] for edit in edits if edit["edit"] in OF_MODULES), None)
    if kept is not None:
        raise ValueError(f"no stock dense architecture has what {kept} does to a layer: make layers dense before it.")
    if left := list(all_moe_views(model)):
        raise ValueError(f"layers {left[:5]} still have experts: all have to be made dense, or none.")
    widths = set(dense_widths(hf.decoder_layers(model), family).values())
    if len(widths) != 1:
        raise ValueError(
            f"the dense layers would be {sorted(widths)} neurons wide, and {origin} has one width for all of them: say "
            "the same width= in every make_dense."
        )
    tried = (_values(base, model, family, name, widths.copy().pop(), lists) for name in family.dense_as)
    found = next((values for values in tried if _builds(values, model, block)), None)
    if found is None:
        raise ValueError(
            f"this {origin} cannot be made dense: {' and '.join(family.dense_as)}, the nearest of transformers'"
            " architectures, would have other tensors than its attention and norms."
        )
    return found


def _values(
    base: Mapping[str, Any],
    model: PreTrainedModel,
    family: Family,
    name: str,
    width: int,
    lists: Mapping[str, Any],
) -> dict[str, Any]:
    """Those of one candidate: what only the MoE architecture knows is left out."""
    count = len(hf.decoder_layers(model))
    if name == family.model_type:
        found = {**base, **lists, **dict.fromkeys((k for k in family.leading_dense_keys if k in base), count)}
        found |= {family.dense_list_key: list(range(count))} if family.dense_list_key in base else {}
    else:
        ours, theirs = hf.known_keys(family.model_type), hf.known_keys(name)
        gone = (ours | {*COUNT_KEYS, *TOP_K_KEYS}) - theirs
        found = {key: value for key, value in {**base, **lists}.items() if key not in gone}
        heads = {each.head_dim for each in model.modules() if isinstance(getattr(each, "head_dim", None), int)}
        if "head_dim" in theirs and found.get("head_dim") is None and len(heads) == 1:
            found["head_dim"] = heads.pop()
    return {**found, "model_type": name, WIDTH: width, DENSE_KEY: family.model_type}


def _builds(values: dict[str, Any], model: PreTrainedModel, block: str) -> bool:
    """Whether the values build the edited model, but for what its MLPs are called; they then name its class."""
    try:
        built = hf.skeleton(hf.config_from(values), torch.bfloat16)
    except (ValueError, IndexError, TypeError):
        return False
    values["architectures"] = [type(built).__name__]
    ours = {dense_name(name, block, model): shape for name, shape in hf.shapes(model).items()}
    return ours == hf.shapes(built) and _same_settings(model, built) and _same_buffers(model, built)


def dense_name(name: str, block: str, model: PreTrainedModel) -> str:
    """What a dense architecture calls a parameter, or module, of the edited model."""
    prefix = hf.layers_prefix(model)
    if not name.startswith(prefix):
        return name
    number, _, inside = name.removeprefix(prefix).partition(".")
    renamed = f"{MLP}.{inside.removeprefix(f'{block}.')}" if inside.startswith(f"{block}.") else inside
    return f"{prefix}{number}.{renamed}"


def _same_settings(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    """Whether modules of one name agree in all plain values that both keep (scales, epsilons, windows, numbers)."""
    theirs = dict(other.named_modules())
    for name, module in one.named_modules():
        if name not in theirs:
            continue
        ours, others = _plain(module), _plain(theirs[name])
        if any(ours[key] != others[key] for key in ours.keys() & others.keys()):
            return False
    return True


def _plain(module: torch.nn.Module) -> dict[str, Any]:
    kept = {key: value for key, value in module.__dict__.items() if not key.startswith("_") and key != "training"}
    return {key: value for key, value in kept.items() if isinstance(value, int | float | str)}


def _same_buffers(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    """Whether what both compute for themselves, and no checkpoint holds, is the same."""
    ours, theirs = dict(one.named_buffers()), dict(other.named_buffers())
    pairs = [(ours[name], theirs[name]) for name in ours.keys() & theirs.keys()]
    return all(a.is_meta or b.is_meta or (a.shape == b.shape and torch.equal(a, b)) for a, b in pairs)
