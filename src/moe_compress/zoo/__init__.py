"""The zoo: tiny trained models that ship with the package, and the text they are measured on.

A folder of the zoo is an ordinary Hugging Face checkpoint with a card. `text` and `tasks` need
the standard library only; `scripts/zoo` holds how the models came to be.
"""

import difflib
import json
from importlib import resources
from pathlib import Path

NAMES = ("tiny-mixtral", "tiny-mixtral-seed1", "tiny-deepseek", "tiny-deepseek-seed1")


def path(name: str) -> Path:
    """Return the folder of a shipped model."""
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no shipped model {name!r}: there are {', '.join(NAMES)}.{hint}")
    return Path(str(resources.files(__name__) / "models" / name))


def size(name: str) -> tuple[int, int]:
    """Return the bytes of a shipped model's weights, and its layers, from the heads of its files alone."""
    folder, count = path(name), 0
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            tensors = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        ends = (entry["data_offsets"] for key, entry in tensors.items() if key != "__metadata__")
        count += sum(end - start for start, end in ends)
    return count, json.loads((folder / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]


def descends_from(model: str) -> bool:
    """Return whether `model` is a shipped model, or the folder of a checkpoint that was made from one."""
    manifest = Path(model) / "moe_compress.json"
    if model in NAMES or not manifest.is_file():
        return model in NAMES
    try:
        return json.loads(manifest.read_text(encoding="utf-8"))["base"]["model"] in NAMES
    except (ValueError, KeyError, TypeError):
        return False


def config_path(hub_id: str) -> Path | None:
    """Return the shipped config.json of a well-known model, by its hub id; None for any other."""
    found = Path(str(resources.files(__name__) / "configs" / hub_id.replace("/", "--") / "config.json"))
    return found if found.is_file() else None


def known_configs() -> tuple[str, ...]:
    """Return the hub ids whose shapes ship with the package, so that planning needs no network."""
    folders = Path(str(resources.files(__name__) / "configs"))
    return tuple(sorted(folder.name.replace("--", "/") for folder in folders.iterdir()))
