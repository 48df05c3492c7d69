"""Prompts that a user names: read from a file, and as token windows, one a prompt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from moe_compress.data.windows import Windows
from moe_compress.utils.files import HEAD, require_regular, require_utf8
from moe_compress.utils.hashing import fingerprint, tensor_bytes

FIELDS = ("prompt", "text")
MAX_BYTES = 1 << 26


def read_prompts(path: Path) -> list[str]:
    """Prompts of a file: the lines of a text, or `prompt` (or `text`) of every row of a .jsonl."""
    if not path.exists():
        raise ValueError(f"there is no file of prompts {path}.")
    require_regular(path)
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} has more than {MAX_BYTES >> 20} MiB: prompts are lines of a small file.")
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        require_utf8(path, bytes(error.object[:HEAD]))
        raise ValueError(f"{path} is not UTF-8 text ({error}).") from error
    prompts = [_row(path, line) for line in lines] if path.suffix.lower() == ".jsonl" else lines
    if not prompts:
        raise ValueError(f"{path} holds no prompt.")
    return prompts


def _row(path: Path, line: str) -> str:
    try:
        row = json.loads(line)
        return next(str(row[name]) for name in FIELDS if name in row)
    except (json.JSONDecodeError, TypeError, StopIteration) as error:
        raise ValueError(f"{path}: a row is an object with a `prompt` (or `text`), not {line[:60]!r}.") from error


def prompt_windows(prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, source: str = "prompts") -> Windows:
    """Every prompt as a window and a document of its own, padded to the longest; all of one domain."""
    rows = [torch.tensor(ids) for prompt in prompts if (ids := tokenizer(prompt, verbose=False)["input_ids"])]
    if not rows:
        raise ValueError("the prompts hold no token: give some text.")
    length_N = torch.tensor([len(row) for row in rows])
    ids_NS = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id or 0)
    mask_NS = torch.arange(ids_NS.shape[1]) < length_N[:, None]
    document_NS = torch.arange(len(rows))[:, None].expand_as(ids_NS)
    tokens = int(length_N.sum())
    description = {"source": source, "use": "prompts", "windows": len(rows), "length": ids_NS.shape[1]}
    description |= {"packed": False, "tokens": tokens, "domains": {source: len(rows)}}
    identity = fingerprint(tensor_bytes(ids_NS), tensor_bytes(mask_NS), source)
    domain_N = torch.zeros(len(rows), dtype=torch.long)
    return Windows(ids_NS, mask_NS, document_NS, domain_N, (source,), identity, description)
