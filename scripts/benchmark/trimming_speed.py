"""Trimming searches against plain implementations of the same thing, as ratios measured in this one run.

The plain ones follow the papers' algorithms: every subset by a forward, linkage in Python loops, all experts on all
tokens. Each time is the least of several, the two sides alternating.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import torch
from engine_speed import fastest
from torch import Tensor
from torch.nn.functional import silu
from transformers import MixtralConfig, MixtralForCausalLM

import moe_compress
from moe_compress import zoo
from moe_compress.calibration.output_sample import PROBE_TOKENS, OutputSample, OutputSampler
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
from moe_compress.utils.files import atomic_write

RESULTS = Path(__file__).resolve().parents[2] / "results"
WIDTH, INNER = 256, 896
TEXT = 32768


def block(experts: int, top_k: int, width: int = WIDTH, inner: int = INNER) -> tuple[MixtralForCausalLM, MoEView]:
    """A random Mixtral of one layer, and its MoE block."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64, hidden_size=width, intermediate_size=inner, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, num_local_experts=experts, num_experts_per_tok=top_k,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval().requires_grad_(False)
    hf.use_experts_function(model)
    view = moe_views(model)[0]
    view.router_rows_ED.normal_(0, 3 * width**-0.5)
    for matrix in view.matrices:
        matrix.normal_(0, matrix.shape[-1] ** -0.5)
    return model, view


def probe_of(model: Any, view: MoEView, x_TD: Tensor, sample: int, layer: int = 0) -> OutputSample:
    """A probe of the block on `sample` of the tokens."""
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


def naee(keep: int) -> dict[str, Any]:
    """Exact search in every layer of tiny-mixtral on its calibration text."""
    model = moe_compress.load("tiny-mixtral", torch.float32).requires_grad_(False)
    hf.use_experts_function(model)
    folder = zoo.path("tiny-mixtral")
    spec = DataSpec(source="zoo", use="calibration", samples=64, length=256)
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
            probe = probe_of(model, views[i], some_TD, len(some_TD), i)
            found[name][i] = best_subset(probe, shapes[i], keep).kept

    runs = {"plain": plain, "all": lambda: probed("all", 10**9), "sample": lambda: probed("sample", PROBE_TOKENS)}
    seconds = fastest(runs, 3)
    same = {f"same_{n}": sum(found[n][i] == found["plain"][i] for i in inputs) for n in ("all", "sample")}
    return {**seconds, **same, "layers": len(inputs), "tokens": len(inputs[0])}


def clustering() -> dict[str, Any]:
    """128 experts into 64 groups."""
    features_EN = torch.randn(128, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    distance_EE = torch.cdist(features_EN, features_EN)
    table, weight_E = distance_EE.tolist(), torch.ones(128)
    found: dict[str, Any] = {}

    def plain() -> None:
        found["plain"] = plain_linkage(table, 64)

    def ours() -> None:
        groups = hierarchical(distance_EE, 64, weight_E=weight_E)
        found["ours"] = sorted(sorted(group) for group in groups)

    seconds = fastest({"plain": plain, "ours": ours}, 2)
    return {**seconds, "same": found["plain"] == found["ours"]}


def alignment() -> dict[str, float]:
    """Eight pairs of experts of 2,048 neurons, on one core and on two."""
    _, view = block(16, 2, inner=2048)
    groups = tuple((e, e + 8) for e in range(8))
    one = torch.get_num_threads()
    torch.set_num_threads(1)
    runs = {str(n): lambda n=n: align_groups(groups, view.expert, by="weights", workers=n) for n in (1, 2)}
    seconds = fastest(runs, 2)
    torch.set_num_threads(one)
    return seconds


def sampled() -> dict[str, float]:
    """What merging has to know of 64 experts from 32,768 tokens: from a sample, and from all experts on all tokens."""
    model, view = block(64, 4, inner=128)
    x_TD = torch.randn(TEXT, WIDTH, generator=torch.Generator().manual_seed(3))

    def dense() -> None:
        for x_tD in x_TD.split(1024):
            output_ETD = torch.stack([plain_expert(view.expert(e), x_tD) for e in range(64)])
            output_ETD.mean(1)
            torch.nn.functional.normalize(output_ETD, dim=-1).flatten(1).cov()

    return fastest({"dense": dense, "sampled": lambda: probe_of(model, view, x_TD, PROBE_TOKENS)}, 2)


def main() -> None:
    """Measure, print the ratios, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "trimming.json")
    given = parser.parse_args()
    figures: dict[str, Any] = {}
    for keep in (6, 4):
        found = figures[f"naee_{keep}_of_8"] = naee(keep)
        print(
            f"NAEE, {keep} of 8 experts, tiny-mixtral, {found['tokens']} tokens, against a forward for every subset:\n"
            f"  {found['plain'] / found['sample']:.1f} x as fast with a probe of {PROBE_TOKENS} tokens, as recipes do "
            f"(at least 20); same subset in {found['same_sample']} of {found['layers']} layers\n"
            f"  {found['plain'] / found['all']:.1f} x as fast with a probe of all tokens; same subset in "
            f"{found['same_all']} of {found['layers']} layers"
        )
    found = figures["clustering_128"] = clustering()
    print(
        f"clustering of 128 experts: {found['plain'] / found['ours']:.0f} x a pure Python linkage (at least 100); "
        f"same groups: {found['same']}"
    )
    pair = figures["alignment"] = alignment()
    print(f"alignment of 8 pairs of 2,048 neurons: {pair['1'] / pair['2']:.2f} x as fast on two cores as on one")
    pair = figures["statistics"] = sampled()
    print(f"merging's statistics from {PROBE_TOKENS} of {TEXT} tokens: {pair['dense'] / pair['sampled']:.1f} x as fast")
    atomic_write(given.out, (json.dumps(figures, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
