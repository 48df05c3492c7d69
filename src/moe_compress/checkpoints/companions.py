"""What goes with the weights of a checkpoint: the files of its tokenizer and its processors, and its licences."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from moe_compress.models import hf
from moe_compress.utils.files import read_json, room_for

# Names in small letters; in a checkpoint they may be in any.
COMPANIONS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*tiktoken*",
    "chat_template*", "*.jinja", "generation_config.json", "*processor_config.json",
    "*licen[sc]e*", "copying*", "notice*", "*notices*", "*use_policy*",
)  # fmt: skip
TEMPLATES = "additional_chat_templates"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".py")
# Code that goes along even if no file names it: engines and people run it beside the tokenizer.
CODE = ("tokeniz*.py", "*process*.py", "tool*.py", "chat*.py", "encoding*.py")
# Files that may say which code of the checkpoint makes a tokenizer or a processor.
NAMES_CODE = ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json", "config.json")


def companions(folder: Path) -> list[Path]:
    """All of them. ValueError for one that is a link out of the folder: what it leads to would be copied."""
    found = [path for path in folder.iterdir() if path.is_file() and _is_companion(path)]
    found += [path for path in (folder / TEMPLATES).glob("*.jinja") if path.is_file()]
    found += _code(folder)
    found = sorted(dict.fromkeys(found))
    require_own(folder, found)
    return found


def copy_companions(source: Path, target: Path) -> None:
    """Copy all of them."""
    for path in companions(source):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        with room_for(copy):
            shutil.copyfile(path, copy)


def _is_companion(path: Path) -> bool:
    name = path.name.lower()
    return path.suffix.lower() not in WEIGHTS and any(fnmatch(name, pattern) for pattern in COMPANIONS)


def _code(folder: Path) -> Iterator[Path]:
    """The files of code that make a tokenizer or a processor, and those that they import; modelling code stays."""
    for file in (path for pattern in CODE for path in folder.glob(pattern) if path.is_file()):
        yield from (file, *hf.imported_files(file))
    for name in NAMES_CODE:
        values = read_json(folder / name) if (folder / name).is_file() else {}
        for module in code_modules(values.get("auto_map") if isinstance(values, dict) else None):
            file = folder / f"{module}.py"
            if file.is_file():
                yield from (file, *hf.imported_files(file))


def code_modules(auto_map: Any) -> list[str]:
    """The modules of the checkpoint's own that an auto_map names for tokenizers and processors."""
    named: list[Any] = list(auto_map) if isinstance(auto_map, list | tuple) else []
    for key in hf.PROCESSORS if isinstance(auto_map, Mapping) else ():
        entry = auto_map.get(key)
        named += list(entry) if isinstance(entry, list | tuple) else [entry]
    return [one.partition(".")[0] for one in named if isinstance(one, str) and "--" not in one and "/" not in one]


def require_own(folder: Path, paths: Iterable[Path]) -> None:
    """ValueError for a link out of the folder, by name; links of the hub's cache lead to its blobs and are its own."""
    whole = folder.resolve()
    homes = [whole, *([whole.parent.parent / "blobs"] if whole.parent.name == "snapshots" else [])]
    for path in paths:
        target = path.resolve()
        if not any(target.is_relative_to(home) for home in homes):
            raise ValueError(f"{path} leads out of its folder, to {target}: put the file itself there, or remove it.")
