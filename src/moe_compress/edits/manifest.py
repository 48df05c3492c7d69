"""What config.json of an edited checkpoint says of its edits, checked as strictly as a plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from moe_compress.edits.apply import check_edits
from moe_compress.edits.checks import require_few
from moe_compress.edits.edits import PackMatrices, from_json
from moe_compress.edits.resulting_config import split_values
from moe_compress.models import hf
from moe_compress.models.modeling.edited_model import PREFIX
from moe_compress.models.sublayers import block_names

KEYS = ("edits", "moe", "base_model_type", "base_architectures")


def require_manifest(values: Mapping[str, Any]) -> None:
    """Raise ValueError for an entry `moe_compress` that this package cannot have written.

    Its edits are carried out on a skeleton of the original architecture; packed matrices only have to be there.
    """
    manifest = values.get("moe_compress")
    if manifest is None:
        raise ValueError(f"model_type={values.get('model_type')} needs moe_compress, which holds its edits")
    if not isinstance(manifest, dict):
        raise ValueError("moe_compress is no object")
    if absent := [key for key in KEYS if key not in manifest]:
        raise ValueError(f"moe_compress lacks {absent[0]}")
    expected = f"{PREFIX}{manifest['base_model_type']}"
    if values.get("model_type") != expected:
        raise ValueError(f"model_type is not {expected}, as moe_compress.base_model_type says")
    edits = manifest["edits"]
    if not isinstance(edits, list) or not all(isinstance(edit, dict) for edit in edits):
        raise ValueError("moe_compress.edits is no list of objects")
    config = hf.config_from(split_values(values)[0])
    require_few(len(edits), hf.num_layers(config), "moe_compress.edits")
    model = hf.skeleton(config, torch.bfloat16)
    if manifest["moe"] != block_names(model):
        raise ValueError(f"moe_compress.moe names other modules than {block_names(model)}")
    # To hold every expert in a module of its own takes long, and is done where the model is built.
    check_edits(model, (edit for values in edits if not isinstance(edit := from_json(values), PackMatrices)))
