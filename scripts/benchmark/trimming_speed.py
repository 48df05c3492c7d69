"""Trimming searches against plain implementations of the same thing, as ratios measured in this one run.

The plain ones follow the papers' algorithms: every subset by a forward, linkage in Python loops, all experts on all
tokens. Each time is the least of several, the two sides alternating.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu
from transformers import MixtralConfig, MixtralForCausalLM

import moe_compress
from common import RESULTS, add_smoke, fastest, save_figures
from moe_compress import zoo
from moe_compress.calibration.output_sample import SAMPLE_TOKENS, OutputSample, OutputSampler
from moe_compress.checkpoints.load import load_tokenizer
from moe_compress.data.documents import DataSpec
from moe_compress.data.windows import Windows, make_windows
from moe_compress.engine.observer import BatchInfo, evenly_T
from moe_compress.methods.expert_drop.subset_search import best_subset
from moe_compress.methods.expert_merge.alignment import align_groups
from moe_compress.methods.expert_merge.grouping import hierarchical
from moe_compress.models import hf
from moe_compress.models.families import family_of
from moe_compress.models.moe import Expert, MoEView, moe_views
from moe_compress.models.shape import moe_shapes
from moe_compress.utils.devices import threads

WIDTH = 256


@dataclass(frozen=True)
class Size:
    """Calibration windows of the search, experts to cluster, neurons to align, and experts and tokens to sample."""

    windows: int = 64
    length: int = 256
    clustered: int = 128
    neurons: int = 2048
    experts: int = 64
    tokens: int = 32768
    rounds: int = 3


SMOKE = Size(1, 64, 12, 32, 8, 128, 1)


def block(experts: int, top_k: int, inner: int) -> tuple[MixtralForCausalLM, MoEView]:
    """A random Mixtral of one layer, and its MoE block."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64, hidden_size=WIDTH, intermediate_size=inner, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, num_local_experts=experts, num_experts_per_tok=top_k,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval().requires_grad_(False)
    hf.use_experts_function(model)
    view = moe_views(model)[0]
    view.router_rows_ED.normal_(0, 3 * WIDTH**-0.5)
    for matrix_EOI in view.stacks().values():
        matrix_EOI.normal_(0, matrix_EOI.shape[-1] ** -0.5)
    return model, view


def output_sample_of(model: Any, view: MoEView, x_TD: Tensor, sample: int, layer: int = 0) -> OutputSample:
    """An output sample of the block on `sample` of the tokens."""
    tokens = len(x_TD)
    observer = OutputSampler(family_of(model.config), model.config, tokens, sample)
    observer.enter(layer, hf.decoder_layers(model)[layer])
    observer.begin(BatchInfo(torch.ones(tokens, dtype=torch.bool), torch.zeros(tokens, dtype=torch.long)))
    view.block(x_TD[None])
    return OutputSample.from_tensors(observer.leave())


# --- the plain side -----------------------------------------------------------------------------------------


def plain_expert(expert: Expert, x_TD: Tensor) -> Tensor:
    """One SwiGLU expert."""
    assert expert.gate is not None
    return (silu(x_TD @ expert.gate.T) * (x_TD @ expert.up.T)) @ expert.down.T


def plain_block(view: MoEView, x_TD: Tensor, top_k: int, kept: tuple[int, ...]) -> Tensor:
    """The routed output with only some experts, one expert after the other."""
    logits_TE = x_TD @ view.router_rows_ED.T
    dropped = [e for e in range(view.num_experts) if e not in kept]
    logits_TE[:, dropped] = -torch.inf
    weight_TK, index_TK = logits_TE.softmax(-1).topk(top_k, -1)
    weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
    out_TD = torch.zeros_like(x_TD)
    for expert in kept:
        token, slot = torch.where(index_TK == expert)
        if len(token):
            out_TD.index_add_(0, token, plain_expert(view.expert(expert), x_TD[token]) * weight_TK[token, slot, None])
    return out_TD


def plain_search(view: MoEView, x_TD: Tensor, top_k: int, keep: int) -> tuple[int, ...]:
    """NAEE: a forward for every subset."""
    everyone = tuple(range(view.num_experts))
    target_TD = plain_block(view, x_TD, top_k, everyone)

    def loss(kept: tuple[int, ...]) -> float:
        return float((target_TD - plain_block(view, x_TD, top_k, kept)).double().square().sum())

    return min(itertools.combinations(everyone, keep), key=loss)


def plain_linkage(distance_EE: list[list[float]], count: int) -> list[list[int]]:
    """Average linkage in Python: the two nearest clusters, again and again."""
    clusters = [[e] for e in range(len(distance_EE))]
    while len(clusters) > count:
        best, pair = float("inf"), (0, 1)
        for i in range(len(clusters)):
            for j in range(i + 1, len(clusters)):
                between = [distance_EE[a][b] for a in clusters[i] for b in clusters[j]]
                mean = sum(between) / len(between)
                if mean < best:
                    best, pair = mean, (i, j)
        clusters[pair[0]] += clusters.pop(pair[1])
    return sorted(sorted(cluster) for cluster in clusters)


# --- what is measured ---------------------------------------------------------------------------------------


def block_inputs(model: Any, windows: Windows) -> dict[int, Tensor]:
    """What enters every MoE block on a text, [T, D] by layer."""
    seen: dict[int, list[Tensor]] = {}
    hooks = [
        view.block.register_forward_pre_hook(lambda _m, args, i=i: seen.setdefault(i, []).append(args[0].flatten(0, 1)))
        for i, view in moe_views(model).items()
    ]
    for batch in windows.batches(4):
        model.model(windows.ids_NS[batch], use_cache=False)
    for hook in hooks:
        hook.remove()
    return {i: torch.cat(parts) for i, parts in seen.items()}


def naee(keep: int, size: Size) -> dict[str, Any]:
    """Exact search in every layer of tiny-mixtral on its calibration text."""
    model = moe_compress.load("tiny-mixtral", torch.float32).requires_grad_(False)
    hf.use_experts_function(model)
    folder = zoo.path("tiny-mixtral")
    spec = DataSpec(source="zoo", use="calibration", samples=size.windows, length=size.length)
    inputs = block_inputs(model, make_windows(spec, load_tokenizer(folder, model.config.vocab_size)))
    shapes, views = {shape.layer: shape for shape in moe_shapes(model)}, moe_views(model)
    found: dict[str, dict[int, tuple[int, ...]]] = {"plain": {}, "all": {}, "sample": {}}

    def plain() -> None:
        for i, x_TD in inputs.items():
            found["plain"][i] = plain_search(views[i], x_TD, 2, keep)

    def probed(name: str, sample: int) -> None:
        for i, x_TD in inputs.items():
            # Like the plain side, from the block's inputs: the pass over the whole text is done for both.
            some_TD = x_TD[evenly_T(0, len(x_TD), min(sample, len(x_TD)), len(x_TD), x_TD.device)]
            seen = output_sample_of(model, views[i], some_TD, len(some_TD), i)
            found[name][i] = best_subset(seen, shapes[i], keep).kept

    runs: dict[str, Callable[[], object]] = {
        "plain": plain,
        "all": lambda: probed("all", 10**9),
        "sample": lambda: probed("sample", SAMPLE_TOKENS),
    }
    seconds = fastest(runs, size.rounds)
    same = {f"same_{n}": sum(found[n][i] == found["plain"][i] for i in inputs) for n in ("all", "sample")}
    return {**seconds, **same, "layers": len(inputs), "tokens": len(inputs[0])}


def clustering(size: Size) -> dict[str, Any]:
    """Experts into half as many groups."""
    experts = size.clustered
    features_EN = torch.randn(experts, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    distance_EE = torch.cdist(features_EN, features_EN)
    table, weight_E = distance_EE.tolist(), torch.ones(experts)
    found: dict[str, Any] = {}

    def plain() -> None:
        found["plain"] = plain_linkage(table, experts // 2)

    def ours() -> None:
        groups = hierarchical(distance_EE, experts // 2, weight_E=weight_E)
        found["ours"] = sorted(sorted(group) for group in groups)

    seconds = fastest({"plain": plain, "ours": ours}, min(size.rounds, 2))
    return {**seconds, "same": found["plain"] == found["ours"]}


def alignment(size: Size) -> dict[str, float]:
    """Eight pairs of experts, on one core and on two."""
    _, view = block(16, 2, size.neurons)
    groups = tuple((e, e + 8) for e in range(8))

    def align(workers: int) -> Callable[[], object]:
        return lambda: align_groups(groups, view.expert, by="weights", workers=workers)

    with threads(1):
        return fastest({str(workers): align(workers) for workers in (1, 2)}, min(size.rounds, 2))


def sampled(size: Size) -> dict[str, float]:
    """What merging has to know of experts from a text: from a sample of it, and from all experts on all tokens."""
    model, view = block(size.experts, 4, 128)
    x_TD = torch.randn(size.tokens, WIDTH, generator=torch.Generator().manual_seed(3))

    def dense() -> None:
        for x_tD in x_TD.split(1024):
            output_ETD = torch.stack([plain_expert(view.expert(e), x_tD) for e in range(size.experts)])
            output_ETD.mean(1)
            torch.nn.functional.normalize(output_ETD, dim=-1).flatten(1).cov()

    runs = {"dense": dense, "sampled": lambda: output_sample_of(model, view, x_TD, SAMPLE_TOKENS)}
    return fastest(runs, min(size.rounds, 2))


def report(size: Size) -> dict[str, Any]:
    """Measure, print the ratios; returns all figures."""
    figures: dict[str, Any] = {}
    for keep in (6, 4):
        found = figures[f"naee_{keep}_of_8"] = naee(keep, size)
        print(
            f"NAEE, {keep} of 8 experts, tiny-mixtral, {found['tokens']} tokens, against a forward for every subset:\n"
            f"  {found['plain'] / found['sample']:.1f} x as fast with {SAMPLE_TOKENS} of the tokens, as recipes do "
            f"(at least 20); same subset in {found['same_sample']} of {found['layers']} layers\n"
            f"  {found['plain'] / found['all']:.1f} x as fast with a sample of all tokens; same subset in "
            f"{found['same_all']} of {found['layers']} layers"
        )
    found = figures["clustering_128"] = clustering(size)
    print(
        f"clustering of {size.clustered} experts: {found['plain'] / found['ours']:.0f} x a pure Python linkage (at "
        f"least 100); same groups: {found['same']}"
    )
    pair = figures["alignment"] = alignment(size)
    print(
        f"alignment of 8 pairs of {size.neurons} neurons: {pair['1'] / pair['2']:.2f} x as fast on two cores as on one"
    )
    pair = figures["statistics"] = sampled(size)
    print(
        f"merging's statistics: {SAMPLE_TOKENS} of {size.tokens} tokens: {pair['dense'] / pair['sampled']:.1f} x as "
        "fast"
    )
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the ratios, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "trimming.json")
    add_smoke(parser)
    given = parser.parse_args(arguments)
    save_figures(report(SMOKE if given.smoke else Size()), given.out, given.smoke)


if __name__ == "__main__":
    main()
