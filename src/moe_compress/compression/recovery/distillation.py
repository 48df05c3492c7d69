"""Training end to end: the whole student learns towards what the teacher says of the calibration text.

Every loss is a mean over tokens that count, so that padding, windows, and how many run at the same time change nothing.
P predicted tokens, V vocabulary, D model width, T tokens that count.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from moe_compress.compression.recovery.adapters import Trained
from moe_compress.compression.recovery.expert_outputs import ExpertOutputs
from moe_compress.compression.recovery.following import Follow
from moe_compress.compression.recovery.holdout import Holdout
from moe_compress.compression.recovery.lineage import Lineage
from moe_compress.compression.recovery.shared_out import add_gradients
from moe_compress.compression.recovery.teacher_cache import TeacherCache
from moe_compress.compression.recovery.trained_weights import Optimiser
from moe_compress.compression.recovery.training_state import Curve, resume, save
from moe_compress.compression.recovery.whole_model import (
    TOKENS_AT_ONCE,
    TextBatch,
    WholeModel,
    chunked_loss,
    silent,
    text_batch,
)
from moe_compress.data.windows import Windows
from moe_compress.methods.recovery.relative_error import relative_error
from moe_compress.methods.recovery.router_targets import mapped_logits, router_kl
from moe_compress.methods.recovery_method import Distillation, Term
from moe_compress.methods.stage_options import TrainingOptions
from moe_compress.models import hf
from moe_compress.models.families import family_of
from moe_compress.models.moe import all_moe_views, router_logits
from moe_compress.run.launch import ElsewhereError
from moe_compress.run.processes import ALONE, Processes, connected

LARGEST_SEED = 2**31
# What a gradient promises that is no more than rounding, as a share of the loss.
UNFELT = 1e-5
NEXT_TOKENS: tuple[Term, ...] = ("logits", "labels")


class DistillationRun:
    """A student that is trained, its teacher, and the text; `run` takes all steps, or those that are left.

    The teacher runs beside the student, or is a cache of what it said, or (of loss=labels) nobody. Of several processes
    each has all of these and takes its share of every step's windows; all take the same steps.
    """

    def __init__(
        self,
        task: Distillation,
        options: TrainingOptions,
        student: WholeModel,
        teacher: WholeModel | TeacherCache | None,
        windows: Windows,
        trained: Trained,
        kin: Lineage,
        seed: int,
        processes: Processes = ALONE,
    ) -> None:
        self.processes = processes
        self.task, self.options, self.student, self.teacher = task, options, student, teacher
        self.windows, self.kin, self.seed = windows, kin, seed
        self.trained, self.optimiser = trained, Optimiser(trained.parameters, options)
        self.holdout = Holdout.of(options.holdout, windows)
        self.experts: ExpertOutputs | None = None
        if "experts" in task.terms:
            assert isinstance(teacher, WholeModel)
            self.experts = ExpertOutputs(student, teacher, kin)

    @connected()
    def run(self, state: Path, follow: Follow | None = None) -> dict[str, Any]:
        """Train; what is to be reported of it. ValueError where the loss is no number.

        follow: is given the curve before the first step and behind every one. What it leaves is there before the step
        counts as done, so that a killed run loses nothing of it.
        """
        curve = resume(state, self.optimiser)
        if len({*self.processes.all_say(curve.steps)}) > 1:
            raise ElsewhereError(f"not all processes see {state}: folders that they share are needed (out=, results=).")
        started = time.perf_counter() - curve.seconds
        if not curve.steps:
            self._measure(curve)
        if follow is not None:
            follow(curve)
        for step in range(curve.steps, self.options.steps):
            losses, tokens = self.step(step)
            curve.add(step, losses, tokens)
            if step == 0:
                self._require_gradients(losses)
            self.optimiser.step(step)
            curve.seconds = time.perf_counter() - started
            kept = (step + 1) % self.options.keep == 0 or step + 1 == self.options.steps
            if kept:
                self._measure(curve)
            if follow is not None:
                follow(curve)
            if kept:
                save(state, self.optimiser, curve, writes=not self.processes.rank)
        count = sum(each.numel() for each in self.optimiser.parameters.values())
        measured = self.holdout.settle(self.optimiser, curve.held)
        report = curve.report(self.options.checkpoint_every)
        return {**report, "trained": count, "optimiser_bytes": self.optimiser.bytes, **measured}

    @torch.no_grad()
    def _measure(self, curve: Curve) -> None:
        """Note the loss on the windows that are held aside, and remember the best state so far."""
        if self.holdout.rows.numel():
            losses, _ = self._over(self.holdout.rows)
            total = sum(self.task.terms[term] * losses[term] for term in self.task.terms)
            self.holdout.note(self.optimiser, curve.held, curve.steps, total)

    def _require_gradients(self, losses: Mapping[str, float]) -> None:
        """Raise ValueError for a loss that nothing of what is trained has a part in."""
        total = sum(self.task.terms[term] * losses[term] for term in self.task.terms)
        if total and self.optimiser.felt <= UNFELT * total:
            raise ValueError(
                "the loss has no gradient at what would be trained (such as routers whose tokens use one expert with a "
                "gate of 1, which loss=router alone feels): train other parts, or use router_kd solver=ridge."
            )

    def step(self, step: int) -> tuple[dict[str, float], int]:
        """Leave the gradients of one step; its losses by term, and how many tokens it saw."""
        rows = rows_of_step(step, self.options.batch, self.holdout.trained, self.seed)
        return self._over(rows)

    def _over(self, rows: Tensor) -> tuple[dict[str, float], int]:
        """The losses of some windows by term, and how many tokens of them count, those of all processes together."""
        text = self.windows.select(rows)
        predicted, counted = len(text.predictions()), text.tokens
        losses: dict[str, float] = dict.fromkeys(map(str, self.task.terms), 0.0)
        for batch in self._share(rows):
            # Of conversations there may be windows in which nobody says anything that counts.
            for term, value in self.back(batch, max(predicted, 1), max(counted, 1)).items():
                losses[term] += value
        return add_gradients(self.processes, list(self.optimiser.parameters.values()), losses), counted

    def _share(self, rows_B: Tensor) -> list[TextBatch]:
        """The windows of a step that this process runs, at most so many at a time.

        Where layers are shared out, all run as many batches, for each is put together by all.
        """
        size = max(1, TOKENS_AT_ONCE // self.windows.ids_NS.shape[1])
        mine_B = self.processes.share(rows_B)
        parts = mine_B.split(size) if len(mine_B) else ()
        batches = [text_batch(self.windows, part, self.student.device) for part in parts]
        if self.processes.mesh is not None:
            most = math.ceil(math.ceil(len(rows_B) / self.processes.count) / size)
            spare = silent(text_batch(self.windows, rows_B[:1], self.student.device))
            batches += [spare] * (most - len(batches))
        return batches

    def back(self, batch: TextBatch, predicted: int, counted: int) -> dict[str, float]:
        """Bring the gradients of a part of a step back, where they are enabled; its share of each loss."""
        routed = "router" in self.task.terms
        theirs, said = self._teach(batch, routed)
        # What experts are sent is taken as it is: of them alone, nothing goes back through the layers.
        felt = torch.is_grad_enabled() and self.task.terms.keys() != {"experts"}
        with _routers(self.student, routed) as ours, torch.set_grad_enabled(felt):
            states = self.student.states(batch)
        found: dict[Term, Tensor] = {}
        if "hidden" in self.task.terms:
            found["hidden"] = self._hidden(states, said, batch) / counted
        if routed:
            found["router"] = self._router(ours, theirs, batch) / counted
        losses: dict[str, float] = {term: float(loss.detach()) for term, loss in found.items()}
        if self.experts is not None:
            losses["experts"] = self._experts(self.experts, batch, counted)
        ends = [self.task.terms[term] * loss for term, loss in found.items()]
        gradients = [torch.ones_like(each) for each in ends]
        for term in (each for each in NEXT_TOKENS if each in self.task.terms):
            losses[term], gradient_PD = self._next_tokens(term, states, said, batch, predicted)
            ends.append(self.student.final(batch, states))
            gradients.append(gradient_PD)
        if ends and torch.is_grad_enabled():
            torch.autograd.backward(ends, gradients)
        return losses

    def _experts(self, experts: ExpertOutputs, batch: TextBatch, counted: int) -> float:
        """The loss of experts, a mean over tokens; its gradients are brought back layer by layer."""
        total = 0.0
        for loss in experts.losses(batch):
            total += float(loss.detach()) / counted
            if torch.is_grad_enabled():
                torch.autograd.backward(loss * (self.task.terms["experts"] / counted))
        return total

    @torch.no_grad()
    def _teach(self, batch: TextBatch, routed: bool) -> tuple[Mapping[int, Tensor], list[Tensor]]:
        """What the teacher's routers give, and its hidden states; nothing of one that does not run."""
        if not isinstance(self.teacher, WholeModel) or self.task.terms.keys() <= {"experts", "labels"}:
            return {}, []
        with _routers(self.teacher, routed) as theirs:
            return theirs, self.teacher.states(batch)

    def _next_tokens(
        self, term: Term, states: list[Tensor], said: list[Tensor], batch: TextBatch, predicted: int
    ) -> tuple[float, Tensor]:
        """The mean loss of next tokens, and its gradient at the final hidden states."""
        target_P = batch.targets_P

        def of_labels(logits_PV: Tensor, part: slice) -> Tensor:
            return cross_entropy(logits_PV.float(), target_P[part], reduction="none")

        loss_of = of_labels if term == "labels" else self._divergence(said, batch)
        student_PD = self.student.final(batch, states)
        total, gradient_PD = chunked_loss(self.student, student_PD, loss_of, self.task.terms[term] / predicted)
        return total / predicted, gradient_PD

    def _divergence(self, said: list[Tensor], batch: TextBatch) -> Callable[[Tensor, slice], Tensor]:
        """The divergence of a student's logits of some of the tokens from what the teacher says of them."""
        if isinstance(self.teacher, TeacherCache):
            keeping = self.teacher.keeping
            kept = {key: each.to(self.student.device) for key, each in self.teacher.targets(batch.rows).items()}
            return lambda logits_PV, part: keeping.divergence(logits_PV, {key: kept[key][part] for key in kept})
        assert self.teacher is not None
        teacher, teacher_PD = self.teacher.model, self.teacher.final(batch, said)
        return lambda logits_PV, part: self.task.divergence(logits_PV, hf.head(teacher, teacher_PD[part]))

    def _hidden(self, states: list[Tensor], said: list[Tensor], batch: TextBatch) -> Tensor:
        """Squared error of what leaves each layer over the square of what the teacher's gives, by token; summed."""
        total = states[-1].new_zeros((), dtype=torch.float32)
        for layer, end in enumerate(self.kin.ends):
            ours_TD, theirs_TD = (each[batch.counted_BS].flatten(1) for each in (states[layer + 1], said[end + 1]))
            total = total + relative_error(ours_TD, theirs_TD).sum() / len(self.kin.ends)
        return total

    def _router(self, ours: Mapping[int, Tensor], theirs: Mapping[int, Tensor], batch: TextBatch) -> Tensor:
        """KL of every layer's routing from the teacher's by token, the mean over layers; summed."""
        counted_T = batch.counted_BS.flatten()
        scores = family_of(self.student.model.config).router_scores
        total = next(iter(ours.values())).new_zeros((), dtype=torch.float32)
        for layer, logits_TE in ours.items():
            place = self.kin.rows[layer]
            target_TR = theirs[self.kin.sources[layer]][counted_T].float()
            target_TE = mapped_logits(target_TR, place, logits_TE.shape[1], scores)
            total = total + router_kl(logits_TE[counted_T].float(), target_TE, scores).sum() / len(ours)
        return total


@contextlib.contextmanager
def _routers(whole: WholeModel, wanted: bool) -> Iterator[dict[int, Tensor]]:
    """By layer, what its router gives to each token while the block runs, [T, rows]."""
    family, found = family_of(whole.model.config), dict[int, Tensor]()
    hooks = []
    for layer, view in all_moe_views(whole.model).items() if wanted else ():

        def keep(_module: nn.Module, _args: Any, output: Any, layer: int = layer, rows: int = view.router_rows) -> None:
            found[layer] = router_logits(output, rows, family)

        hooks.append(view.router.register_forward_hook(keep))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def rows_of_step(step: int, batch: int, count: int, seed: int) -> Tensor:
    """Which of `count` windows a step sees: all in the order of one draw, then of the next."""
    found = []
    for place in range(step * batch, (step + 1) * batch):
        epoch, within = divmod(place, count)
        found.append(_order(epoch, count, seed)[within])
    return torch.stack(found)


@functools.lru_cache(maxsize=2)  # a step sees the end of one draw and the beginning of the next
def _order(epoch: int, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % LARGEST_SEED)
    return torch.randperm(count, generator=generator)
