"""Tiny random models that can read: with a tokenizer trained on a few lines, beside small text files."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from support import tiny

VOCAB = 320
LINES = [
    "the quick brown fox jumps over the lazy dog while the slow red hen looks on",
    "a model is a function from a list of numbers to another list of numbers",
    "every layer adds a little to the stream and passes it on to the next layer",
    "experts are chosen by a router which looks at one token at a time",
    "two and two make four, three and three make six, four and four make eight",
    "def add(left, right): return left + right",
    "for index in range(10): print(index, index * index)",
    "if not found: raise ValueError('there is nothing here')",
]
# What every run on these models is told; the numbers keep a run under a second.
OPTIONS: dict[str, object] = {"samples": 8, "length": 16, "eval_samples": 4, "eval_length": 16}


def tokenizer(lines: list[str] = LINES, size: int = VOCAB) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `size` entries."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=trained, pad_token=special[0], bos_token=special[1], eos_token=special[2]
    )


def save_model(family: str, folder: Path, **overrides: object) -> Path:
    """A tiny checkpoint with its tokenizer and a licence file."""
    tiny.save(tiny.make(family, vocab_size=VOCAB, **overrides), folder)
    tokenizer().save_pretrained(folder)
    (folder / "LICENSE").write_text("do what you like\n", encoding="utf-8")
    return folder


def save_lonely(folder: Path, expert: int) -> Path:
    """A tiny GPT-OSS, one expert of whose first layer is never chosen."""
    model = tiny.make("gpt_oss", vocab_size=VOCAB)
    with torch.no_grad():
        model.model.layers[0].mlp.router.bias[expert] = -1e4
    tiny.save(model, folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_texts(folder: Path) -> Path:
    """calibration.txt, heldout.txt (paragraphs) and domains.jsonl (prose and code)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "calibration.txt").write_text("\n\n".join(LINES * 4), encoding="utf-8")
    (folder / "heldout.txt").write_text("\n\n".join(line[::-1] for line in LINES * 2), encoding="utf-8")
    rows = [{"text": line, "domain": "code" if ":" in line else "prose"} for line in LINES * 6]
    (folder / "domains.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder
