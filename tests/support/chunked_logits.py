"""A program for compression/recovery/test_chunked_loss.py: the loss of many tokens over a large vocabulary, with grads.

argv: `chunked` or `plain`, tokens, vocabulary. Prints by how many bytes the highest memory exceeds that before.
"""

from __future__ import annotations

import gc
import sys
from types import SimpleNamespace
from typing import Any

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from moe_compress.compression.recovery.whole_model import chunked_loss
from moe_compress.methods.recovery.divergences import divergence_of
from moe_compress.models import hf
from moe_compress.utils.devices import peak_memory_bytes, reset_peak_memory

WIDTH = 32


def main(way: str, tokens: int, vocabulary: int) -> None:
    size = {"hidden_size": WIDTH, "intermediate_size": 8, "num_local_experts": 2, "num_hidden_layers": 1}
    config = MixtralConfig(vocab_size=vocabulary, num_attention_heads=2, num_key_value_heads=1, **size)
    model = MixtralForCausalLM(config).requires_grad_(False)
    ours, theirs = (torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(n)) for n in range(2))
    of = divergence_of("forward", 1.0, 0.5)
    gc.collect()
    cpu = torch.device("cpu")
    reset_peak_memory(cpu)
    before = peak_memory_bytes(cpu)
    if way == "chunked":
        student: Any = SimpleNamespace(model=model, logits=lambda hidden: hf.logits(model, hidden))
        chunked_loss(student, ours, lambda logits, part: of(logits, hf.head(model, theirs[part])), 1 / tokens)
    else:
        leaf = ours.requires_grad_()
        (of(hf.logits(model, leaf), hf.head(model, theirs)).sum() / tokens).backward()
    print(peak_memory_bytes(cpu) - before)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
