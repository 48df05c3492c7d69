"""Whole models in memory, loaded by stock transformers and checked: nothing missing, unexpected or mismatched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from moe_compress.model import hf


def load_model(folder: Path, dtype: torch.dtype | None = None, **keywords: Any) -> PreTrainedModel:
    """Load a plain or edited checkpoint; transformers would fill missing tensors with noise, this raises."""
    loader: Any = AutoModelForCausalLM
    with hf.quiet():
        model, info = loader.from_pretrained(folder, dtype=dtype or "auto", output_loading_info=True, **keywords)
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if wrong:
        kind, names = next(iter(wrong.items()))
        raise ValueError(f"{folder} does not load cleanly: {kind.replace('_', ' ')}, such as {names[0]}.")
    return model.eval()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def load_tokenizer(folder: Path, vocab_size: int) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer; ValueError if there is none or it has ids that the embedding lacks."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # tokenizers raises bare Exceptions
        raise ValueError(f"{folder} holds no tokenizer that transformers can read ({_first_line(error)}).") from error
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if not 0 <= largest < vocab_size:
        raise ValueError(
            f"the tokenizer of {folder} has ids up to {largest}, but the model's vocabulary has {vocab_size}: "
            "it belongs to another model."
        )
    return tokenizer
