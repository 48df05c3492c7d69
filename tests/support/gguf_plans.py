"""Plans for the small GGUF files of `gguf_files`."""

from __future__ import annotations

import json
from pathlib import Path

from support.gguf_files import DIM


def plan_file(
    folder: Path,
    edits: list[dict],
    model_type: str = "qwen2_moe",
    layers: int = 3,
    method: str = "expert_drop",
    **shape: int,
) -> Path:
    """A plan as a compression leaves it, of a model of the shape that `write_model` makes."""
    base = {"model": "someone/tiny-model", "commit": None, "fingerprint": "0"}
    base["shape"] = {"model_type": model_type, "layers": layers, "hidden_size": DIM, "experts": 8, **shape}
    path = folder / "plan.json"
    stages = [{"method": method, "given": {}, "edits": edits, "scores": {}, "report": {}}]
    path.write_text(json.dumps({"version": 2, "base": base, "stages": stages}))
    return path


def keep(kept: dict[int, list[int]]) -> list[dict]:
    return [{"edit": "keep_experts", "layer": layer, "experts": experts} for layer, experts in kept.items()]


def everywhere(experts: list[int], layers: int = 3) -> list[dict]:
    """The same experts in every layer."""
    return keep({layer: experts for layer in range(layers)})


def drop(*layers: int) -> list[dict]:
    return [{"edit": "drop_layer", "layer": layer} for layer in layers]
