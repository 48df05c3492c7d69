"""Perplexity and closeness to the original, kept per document so that every comparison is paired.

One fold gives the final hidden states; norm and head then run over them in chunks, so the logits of a whole text
never exist at once. Streamed and resident models give the same numbers. N windows of S positions, D width, V words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_compress.checkpoints.safetensors_file import write_shard
from moe_compress.data.windows import Windows
from moe_compress.engine.forward import Progress, forward_layers
from moe_compress.engine.layers import Layers
from moe_compress.engine.observer import Observer
from moe_compress.models import hf
from moe_compress.zoo.tasks import Item


@dataclass(frozen=True)
class Measurement:
    """Sums per document: float64 [documents]. kl and agree are None without an original to compare with.

    nll: negative log likelihood in nats; tokens: predicted tokens; kl: KL(original || this) in nats; agree:
    tokens whose most likely continuation is the original's; domain: index into `domains`; correct: per item.
    """

    nll: Tensor
    tokens: Tensor
    domain: Tensor
    domains: tuple[str, ...]
    kl: Tensor | None = None
    agree: Tensor | None = None
    correct: Tensor | None = None


@dataclass(frozen=True)
class Original:
    """What is kept of the original model: its final hidden states [N, S, D] and what turns them into logits."""

    hidden_NSD: Tensor
    model: PreTrainedModel
    measurement: Measurement


def measure(
    layers: Layers,
    windows: Windows,
    original: Original | None = None,
    watch: Sequence[Observer] = (),
    *,
    state: Path | None = None,
    progress: Progress | None = None,
) -> tuple[Measurement, Tensor, list[list[dict[str, Tensor]]]]:
    """Run the text through the model: sums per document, final hidden states [N, S, D], what the observers saw."""
    seen, hidden_NSD = forward_layers(layers, windows, watch, state=state, progress=progress)
    return score_hidden(layers.model, hidden_NSD, windows, original), hidden_NSD, seen


@torch.no_grad()
def score_hidden(
    model: PreTrainedModel, hidden_NSD: Tensor, windows: Windows, original: Original | None = None
) -> Measurement:
    """Norm and head over final hidden states, in chunks, reduced per document."""
    where = windows.predictions()
    target_P = windows.ids_NS[where[:, 0], where[:, 1] + 1]
    document_P = windows.document_NS[where[:, 0], where[:, 1] + 1]
    domain_P = windows.domain_N[where[:, 0]]
    per_token = _per_token(model, hidden_NSD, where, target_P, original)
    count = int(document_P.max()) + 1
    sums = torch.zeros(count, 4, dtype=torch.float64).index_add_(0, document_P, per_token)
    domain_D = torch.zeros(count, dtype=torch.long).index_copy_(0, document_P, domain_P)
    used = sums[:, 0] > 0
    tokens, nll, kl, agree = sums[used].unbind(1)
    compared = original is not None
    return Measurement(
        nll, tokens, domain_D[used], windows.domains, kl if compared else None, agree if compared else None
    )


def _per_token(
    model: PreTrainedModel, hidden_NSD: Tensor, where: Tensor, target_P: Tensor, original: Original | None
) -> Tensor:
    """[P, 4] of 1, nll, kl, agreement for the P predicted tokens."""
    rows = hf.head_rows(model)
    parts = []
    for start in range(0, len(where), rows):
        n, s = where[start : start + rows].unbind(1)
        target = target_P[start : start + rows].to(hidden_NSD.device)
        log_p = hf.head(model, hidden_NSD[n, s]).float().log_softmax(-1)
        nll = -log_p.gather(1, target[:, None])[:, 0]
        kl = agree = torch.zeros_like(nll)
        if original is not None:
            log_q = hf.head(original.model, original.hidden_NSD[n, s]).float().log_softmax(-1)
            kl = (log_q.exp() * (log_q - log_p)).sum(-1)
            agree = (log_q.argmax(-1) == log_p.argmax(-1)).float()
        values = torch.stack([torch.ones_like(nll), nll, kl, agree], dim=1).double().cpu()
        if not bool(values.isfinite().all()):
            raise ValueError("the model's logits are not finite on this text, so it has no perplexity.")
        parts.append(values)
    return torch.cat(parts)


# --- answers ------------------------------------------------------------------------------------------------


def item_windows(items: Sequence[Item], tokenizer: PreTrainedTokenizerBase) -> tuple[Windows, Tensor]:
    """Items as padded windows, and which positions [N, S] hold the answer."""
    rows = []
    for item in items:
        prompt = tokenizer(item.prompt, add_special_tokens=False)["input_ids"]
        answer = tokenizer(item.answer, add_special_tokens=False)["input_ids"]
        rows.append((prompt, answer))
    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    pad = tokenizer.pad_token_id or 0
    ids = torch.tensor([[*p, *a, *[pad] * (length - len(p) - len(a))] for p, a in rows])
    position = torch.arange(length)
    begin = torch.tensor([len(p) for p, _ in rows])[:, None]
    end = torch.tensor([len(p) + len(a) for p, a in rows])[:, None]
    number = torch.arange(len(rows))[:, None].expand(-1, length)
    windows = Windows(ids, position < end, number, torch.zeros(len(rows), dtype=torch.long), ("items",), "", {})
    return windows, (position >= begin) & (position < end)


@torch.no_grad()
def answers(layers: Layers, items: Sequence[Item], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Which items the model answers: every token of the answer is its most likely one. Bool [items]."""
    windows, answer_NS = item_windows(items, tokenizer)
    _, hidden_NSD = forward_layers(layers, windows)
    where = answer_NS[:, 1:].nonzero()
    wrong = torch.zeros(len(items), dtype=torch.bool)
    rows = hf.head_rows(layers.model)
    for start in range(0, len(where), rows):
        n, s = where[start : start + rows].unbind(1)
        best = hf.head(layers.model, hidden_NSD[n, s]).argmax(-1).cpu()
        missed = n[best != windows.ids_NS[n, s + 1]]
        wrong[missed] = True
    return ~wrong


# --- what is kept ------------------------------------------------------------------------------


def save_documents(path: Path, measurement: Measurement) -> None:
    """Keep the sums per document, so that any two models measured on one text can be compared in pairs."""
    sums = {name: getattr(measurement, name) for name in ("nll", "tokens", "domain", "kl", "agree", "correct")}
    write_shard(path, {name: tensor for name, tensor in sums.items() if tensor is not None})


def save_original(path: Path, measurement: Measurement, hidden_NSD: Tensor) -> None:
    """Keep what comparisons with the original need; written whole or not at all."""
    tensors = {"hidden": hidden_NSD, "nll": measurement.nll, "tokens": measurement.tokens, "domain": measurement.domain}
    if measurement.correct is not None:
        tensors["correct"] = measurement.correct
    write_shard(path, tensors)


def load_original(path: Path, model: PreTrainedModel, windows: Windows) -> Original:
    """Read it back; `model` needs only its norm and head."""
    kept = load_file(path)
    measurement = Measurement(kept["nll"], kept["tokens"], kept["domain"], windows.domains, correct=kept.get("correct"))
    # A wrapper's other towers, which may come first, are nowhere.
    embedding: Any = model.get_input_embeddings()
    return Original(kept["hidden"].to(embedding.weight.device), model, measurement)
