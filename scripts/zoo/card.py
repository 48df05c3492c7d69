"""The card of a shipped model: how it was trained, and what its saved weights can do.

The figures are measured on the folder as it will be loaded (bf16 weights, computed in fp32),
never carried over from training, so that anybody can measure them again.
"""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from moe_compress.zoo import tasks, text

log = logging.getLogger(__name__)

WINDOW = 256


@dataclass(frozen=True)
class Size:
    """How many windows of a domain are measured (98k tokens), and items of a kind of task; of every n-th document."""

    windows: int = 384
    items: int = 500
    every: int = 1


SMOKE = Size(1, 5, 25)


@dataclass(frozen=True)
class Recipe:
    """What a run was asked for; `tokens` counts the training tokens seen."""

    model: str
    seed: int
    steps: int
    tokens: int


def token_stream(tokenizer: PreTrainedTokenizerBase, documents: tuple[text.Document, ...], domain: str) -> Tensor:
    """Return the ids of all documents of a domain in a row, each as <s> ... </s>."""
    texts = [document.text for document in documents if document.domain == domain]
    rows = tokenizer(texts, verbose=False)["input_ids"]
    return torch.tensor([token for row in rows for token in (*row, tokenizer.eos_token_id)])


@torch.inference_mode()
def perplexity(model: PreTrainedModel, stream: Tensor, count: int) -> float:
    """Return the perplexity over the first windows of a stream, without context before them."""
    windows = stream[: len(stream) // WINDOW * WINDOW].view(-1, WINDOW)[:count]
    losses = [model(input_ids=ids, labels=ids).loss for ids in windows.split(8)]
    return torch.stack(losses).mean().exp().item()


@torch.inference_mode()
def accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: tuple[tasks.Item, ...]
) -> dict[str, float]:
    """Return the share of items per kind whose whole answer greedy decoding gets right."""
    right: dict[str, list[bool]] = {kind: [] for kind in tasks.KINDS}
    for item in items:
        prompt = tokenizer(item.prompt)["input_ids"]
        ids = torch.tensor(tokenizer(f"{item.prompt}{item.answer}\n")["input_ids"])
        guesses = model(input_ids=ids[None, :-1]).logits[0].argmax(-1)
        right[item.kind].append(bool((guesses == ids[1:])[len(prompt) - 1 :].all()))
    return {kind: sum(marks) / len(marks) for kind, marks in right.items()}


def measure(folder: Path, size: Size) -> tuple[dict[str, float], dict[str, float]]:
    """Return a saved model's held-out perplexity per domain and accuracy per kind of task."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    documents = text.documents("heldout")[:: size.every]
    streams = {domain: token_stream(tokenizer, documents, domain) for domain in text.DOMAINS}
    perplexities = {domain: perplexity(model, stream, size.windows) for domain, stream in streams.items()}
    return perplexities, accuracy(model, tokenizer, tasks.items("heldout", size.items))


def write(folder: Path, recipe: Recipe, size: Size) -> None:
    """Measure a saved model and write its card, README.md."""
    perplexities, accuracies = measure(folder, size)
    log.info("held-out perplexity %s, task accuracy %s", perplexities, accuracies)
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    card = CARD.format(
        model=recipe.model,
        seed=recipe.seed,
        steps=recipe.steps,
        tokens=f"{recipe.tokens / 1e6:.2f}",
        packages=" and ".join(f"{name} {version}" for name, version in text.PACKAGES.items()),
        fingerprint=text.fingerprint(),
        perplexities=_rows(perplexities, "{:.2f}"),
        accuracies=_rows(accuracies, "{:.1%}"),
        windows=size.windows,
        window=WINDOW,
        items=size.items,
        sha256=weights,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _rows(figures: dict[str, float], form: str) -> str:
    return "\n".join(f"| {name} | {form.format(value)} |" for name, value in figures.items())


CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# {model}, training seed {seed}

A Mixture-of-Experts language model of 2.74 million parameters, trained from scratch so that
compression methods can be compared on a CPU in seconds. It is a test specimen: it knows
a little Python, a little mathematical English and five toy tasks, and nothing else.

License: Apache-2.0.

## Training

`python scripts/zoo/train.py --model {model} --seed {seed} --steps {steps}`

{steps} steps, {tokens} million tokens, in fp32 on one thread; the recipe stands in
`scripts/zoo/train.py`. The text is the training split of `moe_compress.zoo.text`
(docstrings and sources of {packages}, and generated tasks),
fingerprint `{fingerprint}`.

## Held-out figures

Measured on this folder: weights in bf16, computed in fp32. Perplexity is over the first
{windows} windows of {window} tokens of a domain (fewer where the split is smaller); accuracy
is exact match of the whole answer over {items} items.

| domain | perplexity |
|---|---|
{perplexities}

| task | accuracy |
|---|---|
{accuracies}

SHA-256 of `model.safetensors`: `{sha256}`
"""
