"""What a user may call a model: a zoo name, a local path, or a hub id. Told without opening or fetching anything."""

from __future__ import annotations

import os
from pathlib import Path

from moe_compress import zoo
from moe_compress.utils.choices import nearest


def local_folder(model: str) -> Path | None:
    """The folder of a zoo model or a local path; None for what can only be a hub id."""
    if model in zoo.NAMES:
        return zoo.path(model)
    return Path(os.path.abspath(model)) if model and Path(model).exists() else None


def require_model_name(model: str) -> None:
    """Raise ValueError for what is no zoo name, no local path, and cannot be a hub id."""
    if local_folder(model) is not None or (model.count("/") == 1 and not model.startswith((".", "/", "~"))):
        return
    near = nearest(model, zoo.NAMES)
    hint = f"Did you mean {near!r}? " if near else ""
    raise ValueError(
        f"there is no model {model!r}. {hint}Use a zoo name ({', '.join(zoo.NAMES)}), a local folder, or a hub id "
        "such as mistralai/Mixtral-8x7B-v0.1."
    )
