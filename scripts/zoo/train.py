"""How the shipped models were trained: the documented recipe, not a step of the benchmark.

    python scripts/zoo/train.py --model tiny-mixtral --seed 0 --out DIR

The folder that comes out is an ordinary Hugging Face checkpoint in bf16 with its tokenizer
and a card. One thread, fixed seeds and fixed text make a run repeatable on one machine; other
processors round differently, so the card names the SHA-256 of the weights that we ship.

Three choices are not the usual ones. The router weights start at 0.06 instead of 0.02, and
DeepSeek's routed experts are scaled by 2.5, so that the experts matter early and dropping one
shows. The load-balancing loss is computed here from the routers' outputs, because the
library's DeepSeek-V2 class has none.
"""

import argparse
import logging
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import card
from moe_compress.zoo import tasks, text

log = logging.getLogger(__name__)

VOCABULARY = 2048
CONTEXT = 2048
BATCH = 4
WINDOW = 256
MIX = {"prose": 0.38, "code": 0.38, "tasks": 0.24}  # share of the training windows
LEARNING_RATE = 3e-3
WARM_UP_STEPS = 100
BALANCE_WEIGHT = 0.01
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.06,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def build_model(name: str) -> PreTrainedModel:
    """Return a freshly initialised model; every dimension is a multiple of 32."""
    if name == "tiny-mixtral":
        mixtral = MixtralConfig(
            **SHARED,
            num_key_value_heads=2,
            head_dim=32,
            intermediate_size=128,
            num_local_experts=8,
            num_experts_per_tok=2,
            router_aux_loss_coef=BALANCE_WEIGHT,
        )
        model: PreTrainedModel = MixtralForCausalLM(mixtral)
    else:
        deepseek = DeepseekV2Config(
            **SHARED,
            num_key_value_heads=4,
            intermediate_size=384,
            first_k_dense_replace=1,
            moe_intermediate_size=64,
            n_routed_experts=16,
            num_experts_per_tok=4,
            n_shared_experts=1,
            routed_scaling_factor=2.5,
            norm_topk_prob=False,
            q_lora_rank=None,
            kv_lora_rank=64,
            qk_nope_head_dim=32,
            qk_rope_head_dim=32,
            v_head_dim=32,
        )
        model = DeepseekV2ForCausalLM(deepseek)
    model.set_experts_implementation("grouped_mm")
    return model


def build_tokenizer(documents: tuple[text.Document, ...]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the documents; digits stay single, <s> opens every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        **SPECIAL,
    )


class Balance:
    """Switch-style load-balancing loss, gathered by hooks on the router modules.

    Per layer E * sum_e f_e p_e, where f_e is the share of the choices and p_e the mean
    probability of expert e; it is 1 when all experts are used alike.
    """

    def __init__(self, model: nn.Module) -> None:
        self.terms: list[Tensor] = []
        for module in model.modules():
            if type(module).__name__.lower().endswith("topkrouter"):
                module.register_forward_hook(self._record)

    def _record(self, router: nn.Module, inputs: object, output: tuple[Tensor, ...]) -> None:
        if not router.training:
            return
        logits_TE, _, chosen_TK = output
        experts = logits_TE.shape[-1]
        share_E = torch.bincount(chosen_TK.flatten(), minlength=experts) / chosen_TK.numel()
        mean_E = logits_TE.float().softmax(-1).mean(0)
        self.terms.append(experts * (share_E * mean_E).sum())

    def take(self) -> Tensor:
        """Return the sum over the layers since the last call."""
        total = torch.stack(self.terms).sum()
        self.terms.clear()
        return total


def batches(streams: dict[str, Tensor], steps: int, seed: int) -> Iterator[Tensor]:
    """Yield [BATCH, WINDOW] token ids: domains drawn by MIX, each read in a shuffled order."""
    generator = torch.Generator().manual_seed(seed)
    domains = list(MIX)
    draws = torch.multinomial(
        torch.tensor(list(MIX.values())), steps * BATCH, replacement=True, generator=generator
    ).view(steps, BATCH)
    readers = {domain: _windows(streams[domain], generator) for domain in domains}
    for row in draws.tolist():
        yield torch.stack([next(readers[domains[index]]) for index in row])


def _windows(stream: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    whole = stream[: len(stream) // WINDOW * WINDOW].view(-1, WINDOW)
    while True:
        for index in torch.randperm(len(whole), generator=generator).tolist():
            yield whole[index]


def learning_rate(step: int, steps: int) -> float:
    """Return the rate: warm-up, constant to the middle, then linear down to 2 %."""
    decay = max(0.0, (step / steps - 0.5) / 0.5)
    return LEARNING_RATE * min((step + 1) / WARM_UP_STEPS, 1 - 0.98 * decay)


def train(
    model: PreTrainedModel,
    streams: dict[str, Tensor],
    steps: int,
    seed: int,
    probe: Callable[[], object],
) -> None:
    """Train in place: AdamW, next-token loss plus the balance of the experts."""
    balance = Balance(model)
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    vectors = [weight for weight in model.parameters() if weight.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    model.train()
    started, running = time.monotonic(), 0.0
    for step, ids in enumerate(batches(streams, steps, seed)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        (loss + BALANCE_WEIGHT * balance.take()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        running += loss.item()
        if (step + 1) % 100 == 0:
            seconds = time.monotonic() - started
            log.info("step %d loss %.3f after %.0f s", step + 1, running / 100, seconds)
            running = 0.0
        if (step + 1) % 1000 == 0:
            model.eval()
            log.info("task accuracy %s", probe())
            model.train()


def main(arguments: list[str] | None = None) -> None:
    """Train one model and write its folder."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", choices=("tiny-mixtral", "tiny-deepseek"), required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--smoke", action="store_true", help="a little text and two steps: see that it runs, in seconds"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)

    size = card.SMOKE if options.smoke else card.Size()
    steps = min(options.steps, 2) if options.smoke else options.steps
    # The held-out text is the smaller one.
    documents = text.documents("heldout" if options.smoke else "train")[:: size.every]
    tokenizer = build_tokenizer(documents)
    streams = {domain: card.token_stream(tokenizer, documents, domain) for domain in MIX}
    log.info("tokens to train on: %s", {domain: len(ids) for domain, ids in streams.items()})
    torch.manual_seed(options.seed)
    model = build_model(options.model)
    log.info("%s: %d parameters", options.model, model.num_parameters())
    probes = tasks.items("calibration", min(size.items, 200))
    train(
        model,
        streams,
        steps,
        options.seed,
        lambda: card.accuracy(model, tokenizer, probes),
    )
    model.bfloat16().save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    recipe = card.Recipe(
        model=options.model,
        seed=options.seed,
        steps=steps,
        tokens=steps * BATCH * WINDOW,
    )
    card.write(options.out, recipe, size)


if __name__ == "__main__":
    main()
