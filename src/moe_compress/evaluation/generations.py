"""Two models side by side: what each goes on with after a prompt, and how close their predictions are on a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from moe_compress.checkpoints.load import load_as_run, require_memory
from moe_compress.checkpoints.reader import Checkpoint
from moe_compress.data.prompts import prompt_windows, read_prompts
from moe_compress.data.windows import Windows
from moe_compress.engine.forward import Progress
from moe_compress.engine.layers import ResidentLayers
from moe_compress.evaluation import statistics
from moe_compress.evaluation.pair import require_same_tokens
from moe_compress.evaluation.quality.perplexity import Original, measure
from moe_compress.evaluation.saved_report import save_sealed
from moe_compress.models import hf
from moe_compress.reports.table_formats import with_interval
from moe_compress.run.context import Run, start
from moe_compress.run.options import Options
from moe_compress.run.progress import progress_bar
from moe_compress.utils.devices import threads

MAX_TOKENS = 30
DEFAULT_PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "Hello, how are you?",
    "SELECT * FROM users WHERE",
    "The derivative of x**2 is",
    "for index in range(",
)


@dataclass(frozen=True, slots=True)
class Generation:
    """What both models generate greedily after a prompt, up to `positions` tokens.

    overlap: share of positions at which both have the same token (the shorter one's missing tokens are different);
    prefix: tokens until they first differ.
    """

    prompt: str
    before: str
    after: str
    overlap: float
    prefix: int
    positions: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """Generations side by side; KL(before || after) and agreement of the most likely token on `tokens` of a text."""

    generations: list[Generation]
    metrics: dict[str, Any]
    tokens: int
    text: str

    def markdown(self) -> str:
        """Prompt by prompt, then the numbers."""
        parts = [
            f"**{found.prompt!r}**: {found.overlap:.0%} of {found.positions} tokens the same, the first {found.prefix} "
            f"in a row\n\n- before: {found.before!r}\n- after: {found.after!r}"
            for found in self.generations
        ]
        mean = sum(found.overlap for found in self.generations) / len(self.generations)
        parts.append(f"Token overlap: {mean:.1%}, mean over {len(self.generations)} prompts.")
        named = {name: self.metrics[key] for name, key in NAMES.items()}
        lines = [f"- {name}: {with_interval(each['value'], each['interval'], '.4f')}" for name, each in named.items()]
        ends = self.metrics["delta_nll"]["interval"]
        lines[-1] += ", no detectable difference" if ends and ends[0] <= 0 <= ends[1] else ""
        return "\n\n".join([*parts, f"On {self.tokens:,} tokens of {self.text}:", "\n".join(lines)]) + "\n"


NAMES = {"KL (nats)": "kl", "same top token": "top1_agreement", "change of NLL (nats)": "delta_nll"}


def compare(
    before: PreTrainedModel,
    after: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    windows: Windows,
    max_tokens: int = MAX_TOKENS,
    progress: Progress | None = None,
) -> Comparison:
    """Generate from every prompt with both models, and compare their predictions on the windows."""
    pairs = zip(*(greedy(model, tokenizer, prompts, max_tokens) for model in (before, after)), strict=True)
    generations = []
    for prompt, (one, other) in zip(prompts, pairs, strict=True):
        share, prefix = token_overlap(one, other)
        texts = [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in (one, other)]
        generations.append(Generation(prompt, texts[0], texts[1], share, prefix, max(len(one), len(other))))
    first, hidden_NSD, _ = measure(ResidentLayers(before), windows, progress=progress)
    second, *_ = measure(ResidentLayers(after), windows, Original(hidden_NSD, before, first), progress=progress)
    found = statistics.metrics(second, first)
    return Comparison(
        generations,
        {key: found[key] for key in NAMES.values()},
        int(second.tokens.sum()),
        str(windows.description["source"]),
    )


def compare_checkpoints(
    first: Checkpoint, second: Checkpoint, options: Options, prompts: str, max_tokens: int
) -> Comparison:
    """The same of two checkpoints, kept under generations/. prompts: a file, or `default`.

    ValueError for other vocabularies, for more tokens than the first one was made for, and for models that do not fit
    into memory together.
    """
    require_same_tokens(second, first)
    positions = getattr(first.text_config, "max_position_embeddings", None) or max_tokens + 1
    if not 0 < max_tokens < positions:
        raise ValueError(f"max_tokens={max_tokens}: a number from 1 to {positions - 1} is needed for {first.name}.")
    run = start(options)
    require_memory((first, second), run.dtype, run.device, "have to be whole to generate")
    tokenizer = run.tokenizer(first)
    given, windows = _prompts(prompts, first, tokenizer, run)
    with threads(options.threads), progress_bar("comparing") as progress:
        one, other = (load_as_run(each, run.dtype, run.device, options.attn) for each in (first, second))
        found = compare(one, other, tokenizer, given, windows, max_tokens, progress)
    names = {"before": Path(first.name).name, "after": Path(second.name).name}
    save_sealed(run.results("generations") / f"{names['before']}-{names['after']}.json", {**names, **asdict(found)})
    return found


def _prompts(
    prompts: str, checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase, run: Run
) -> tuple[list[str], Windows]:
    """What is generated from, and the text on which predictions are compared."""
    if prompts == "default":
        return list(DEFAULT_PROMPTS), run.windows("heldout", checkpoint)
    given = read_prompts(Path(prompts))
    windows = prompt_windows(given, tokenizer, Path(prompts).name)
    if windows.ids_NS.shape[1] < 2:
        raise ValueError(f"{prompts}: every prompt is a single token, which predicts nothing: give longer ones.")
    return given, windows


@torch.no_grad()
def greedy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_tokens: int = MAX_TOKENS
) -> list[list[int]]:
    """The tokens that a model goes on with after each prompt, most likely one at a time, one prompt at a time."""
    found, generator = [], _generator(model)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    # Beams, penalties and bans that the checkpoint asks for are none of the model's predictions.
    model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id, pad_token_id=pad)
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
        with hf.quiet():
            out = generator(ids, max_new_tokens=max_tokens, do_sample=False)
        found.append(out[0, ids.shape[1] :].tolist())
    return found


def _generator(model: PreTrainedModel) -> Any:
    return model.generate


def token_overlap(one: Sequence[int], other: Sequence[int]) -> tuple[float, int]:
    """(share of positions with the same token, tokens until they first differ); two empty ones are the same."""
    same = [a == b for a, b in zip_longest(one, other)]
    if not same:
        return 1.0, 0
    return sum(same) / len(same), same.index(False) if False in same else len(same)
