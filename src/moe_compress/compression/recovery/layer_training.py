"""Recovery of one layer at a time: trained towards the teacher's, its router fitted, or its selection rebalanced.

B windows of S positions, T tokens that count, D model width, E experts or rows of a router.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moe_compress.compression.recovery.adapters import Trained
from moe_compress.compression.recovery.arithmetic import Arithmetic
from moe_compress.compression.recovery.distillation import rows_of_step
from moe_compress.compression.recovery.layer_pairs import LayerPair, RoutingObserver
from moe_compress.compression.recovery.lineage import Lineage
from moe_compress.compression.recovery.trained_weights import Optimiser
from moe_compress.engine.forward import Batch, Stream
from moe_compress.methods.recovery.relative_error import relative_error
from moe_compress.methods.recovery.ridge import ridge_step
from moe_compress.methods.recovery.router_targets import mapped_logits, router_kl
from moe_compress.methods.recovery_method import LayerDistillation, Rebalancing, RouterFit
from moe_compress.methods.stage_options import TrainingOptions
from moe_compress.models import hf
from moe_compress.models.moe import MoEView, learned_view
from moe_compress.models.router_rule import selection_bias
from moe_compress.utils.logging import log

Report = dict[str, Any]
# Called behind every step of a layer's training: how many were taken, the last one's loss, the tokens of all.
FollowStep = Callable[[int, float, int], None]
# How far a router's logits may be from its rows times its inputs, of the largest, to be called linear.
LINEAR = 1e-3
# An expert's step while it is on the same side of the mean load, and where it has changed sides.
LONGER, SHORTER = 1.2, 0.5


# --- training -----------------------------------------------------------------------------------------------


def train_layer(
    pair: LayerPair,
    task: LayerDistillation,
    trained: Trained,
    options: TrainingOptions,
    seed: int,
    follow: FollowStep,
) -> Report:
    """Train some parameters of a layer, in place, to give what the teacher's layers give; never leaves it worse."""
    parameters, arithmetic = trained.parameters, Arithmetic(pair.stream.hidden_NSD.device, adapters=trained.adapters)
    enters = pair.entered if task.inputs == "teacher" else pair.stream
    before = {name: each.detach().clone() for name, each in parameters.items()}
    optimiser = Optimiser(parameters, options)
    first = _error(pair, enters, arithmetic)
    at_once = max(1, options.batch // (pair.batches[0].rows.stop - pair.batches[0].rows.start))
    tokens = 0
    for step in range(options.steps):
        chosen = [pair.batches[n] for n in rows_of_step(step, at_once, len(pair.batches), seed).tolist()]
        counted = sum(int(batch.info.real_T.sum()) for batch in chosen)
        loss = 0.0
        for batch in chosen:
            with torch.enable_grad():
                share = _batch_error(pair, enters, batch, arithmetic).sum() / max(counted, 1)
                share.backward()
            loss += float(share.detach())
        optimiser.step(step)
        tokens += counted
        follow(step + 1, loss, tokens)
    last = _error(pair, enters, arithmetic)
    if not last < first:  # NaN counts as worse
        log.warning("layer %d stays as it was, for its error has not fallen: a lower lr= may help.", pair.index)
        with torch.no_grad():
            for name, each in parameters.items():
                each.copy_(before[name])
    with torch.no_grad():  # what later layers see
        for adapter in trained.adapters.values():
            adapter.held.copy_(adapter.merged())
    for each in parameters.values():
        each.requires_grad_(False)
    return {"error": [first, min(last, first) if last == last else first], "tokens": tokens}


def _batch_error(pair: LayerPair, enters: Stream, batch: Batch, arithmetic: Arithmetic) -> Tensor:
    """Squared error of what leaves the layer, over the square of what should, of each token that counts, [T]."""
    call, handed = batch.calls[pair.index], enters.handed_to(batch)
    if handed is not None and handed.is_floating_point():
        handed = handed.float()
    # The teacher's stream may be in bf16; the student's layer is not.
    with arithmetic.layer(pair.layer):
        output = hf.layer_output(pair.layer, enters.hidden_NSD[batch.rows].float(), call, handed)
    ours_TD, theirs_TD = (
        each.flatten(0, 1).flatten(1)[batch.info.real_T]
        for each in (output.hidden_BSD, pair.target.hidden_NSD[batch.rows])
    )
    return relative_error(ours_TD, theirs_TD)


@torch.no_grad()
def _error(pair: LayerPair, enters: Stream, arithmetic: Arithmetic) -> float:
    """The mean over all tokens."""
    return float(torch.cat([_batch_error(pair, enters, batch, arithmetic) for batch in pair.batches]).double().mean())


# --- routers in closed form ---------------------------------------------------------------------------------


@torch.no_grad()
def fit_router(pair: LayerPair, task: RouterFit, kin: Lineage) -> tuple[dict[str, Tensor], Report]:
    """Fit a layer's router, in place; its changed parameters by their names in the layer, and what came of it."""
    view = learned_view(pair.layer, pair.family)
    if view is None or not pair.routing:
        return {}, {}
    seen = pair.observe(RoutingObserver(pair.family, inputs=True))
    scores, rows = pair.family.router_scores, view.router_rows
    target_TE = mapped_logits(pair.routing["logits"], kin.rows[pair.index], rows, scores)
    name, weight = _router_matrix(view)
    beside = f"{name.removesuffix('weight')}bias"
    bias = dict(view.router.named_parameters()).get(beside)
    _require_linear(pair.index, seen, weight[:rows], None if bias is None else bias[:rows])
    residual_TE = target_TE - seen["logits"]
    if scores == "softmax":  # what all experts have in common means nothing
        residual_TE = residual_TE - residual_TE.mean(1, keepdim=True)
    added_ED, added_E = ridge_step(seen["inputs"], residual_TE, task.ridge, offset=bias is not None)
    changed = {name: weight}
    before = {each: tensor.clone() for each, tensor in {name: weight, beside: bias}.items() if tensor is not None}
    weight[:rows] += added_ED.to(weight)
    if bias is not None and added_E is not None:
        bias[:rows] += added_E.to(bias)
        changed[beside] = bias
    first = float(router_kl(seen["logits"], target_TE, scores).double().mean())
    last = float(router_kl(pair.observe(RoutingObserver(pair.family))["logits"], target_TE, scores).double().mean())
    if not last < first:
        for each, tensor in changed.items():
            tensor.copy_(before[each])
    inside = view.names["router"]
    return {f"{inside}.{each}": tensor for each, tensor in changed.items()}, {"kl": [first, min(first, last)]}


def _router_matrix(view: MoEView) -> tuple[str, Tensor]:
    """The name, in the router, of the matrix that has a row for each expert, and all of it."""
    rows = view.router_rows + view.spare_rows
    return next((n, p.detach()) for n, p in view.router.named_parameters() if p.dim() == 2 and p.shape[0] == rows)


def _require_linear(index: int, seen: Mapping[str, Tensor], weight_ED: Tensor, bias_E: Tensor | None) -> None:
    """Raise ValueError for a router that does more to what it is given than multiply it."""
    expected_TE = seen["inputs"] @ weight_ED.float().T + (0.0 if bias_E is None else bias_E.float())
    off_TE = expected_TE - seen["logits"]
    off_TE = off_TE - off_TE.mean(1, keepdim=True)
    if float(off_TE.abs().max()) > LINEAR * max(float(seen["logits"].abs().max()), 1e-6):
        raise ValueError(
            f"the router of layer {index} does more than multiply what it is given, so that it has no closed form: use "
            "solver=adam."
        )


# --- balance ------------------------------------------------------------------------------------------------


@torch.no_grad()
def rebalance(pair: LayerPair, task: Rebalancing) -> tuple[dict[str, Tensor], Report]:
    """Move a layer's selection bias, in place, until its experts are used as evenly as the teacher's."""
    view = learned_view(pair.layer, pair.family)
    if view is None or not pair.routing:
        return {}, {}
    found = _selection_bias(pair.layer, view)
    if found is None:
        raise ValueError(
            f"layer {pair.index} has no selection bias to be moved: rebalance is for routers like DeepSeek-V3's."
        )
    name, bias = found
    goal = variation(pair.routing["load"])
    load_E = pair.observe(RoutingObserver(pair.family))["load"]
    first = best = variation(load_E)
    kept, step, before = bias.clone(), torch.full_like(bias, task.rate), torch.zeros_like(bias)
    for _ in range(task.rounds):
        if best <= goal * (1 + task.tolerance):
            break
        # DeepSeek-V3's rule, with a step for each expert: the text is the same every time, and may need long ways.
        side = torch.sign(load_E.double().mean() - load_E).to(bias).view_as(bias)
        step *= torch.where(side * before < 0, SHORTER, torch.where(side * before > 0, LONGER, 1.0))
        bias += step * side
        before = side
        load_E = pair.observe(RoutingObserver(pair.family))["load"]
        if variation(load_E) < best:
            best, kept = variation(load_E), bias.clone()
    bias.copy_(kept)
    if best > goal * (1 + task.tolerance):
        log.warning(
            "layer %d: its experts' load varies by %.3g after rounds=%d, the original's by %.3g: more rounds may help.",
            pair.index, best, task.rounds, goal,
        )  # fmt: skip
    return {name: bias}, {"variation": [first, best], "teacher": goal}


def variation(load_E: Tensor) -> float:
    """The coefficient of variation of the experts' tokens."""
    load_E = load_E.double()
    return float(load_E.std(correction=0) / load_E.mean().clamp_min(1e-12))


def _selection_bias(layer: nn.Module, view: MoEView) -> tuple[str, Tensor] | None:
    """Its name in the layer, and the tensor itself."""
    flat = selection_bias(view)
    if flat is None:
        return None
    named = (*layer.named_parameters(), *layer.named_buffers())
    return next(((name, each.detach()) for name, each in named if each.data_ptr() == flat.data_ptr()), None)
