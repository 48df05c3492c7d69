"""Evaluating checkpoints: the original once, every variant against it, one record each."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from moe_compress.checkpoints.folder import read_manifest
from moe_compress.checkpoints.load import load_as_run, load_tokenizer, require_memory
from moe_compress.checkpoints.reader import Checkpoint
from moe_compress.data.windows import Windows
from moe_compress.engine.layers import Layers, ResidentLayers
from moe_compress.evaluation import statistics
from moe_compress.evaluation.pair import require_same_tokens
from moe_compress.evaluation.quality import perplexity
from moe_compress.evaluation.quality.perplexity import Measurement, Original
from moe_compress.evaluation.routing import fidelity as routing
from moe_compress.evaluation.routing.fidelity import RoutingSample, Samples, fidelity, free_running
from moe_compress.evaluation.routing.report import ancestry_of
from moe_compress.models import hf
from moe_compress.models.families import family_of
from moe_compress.models.sizes import sizes
from moe_compress.reports.record import Metric, Record, environment, now
from moe_compress.run.context import Run
from moe_compress.run.progress import progress_bar
from moe_compress.utils.devices import dtype_name
from moe_compress.utils.files import one_at_a_time
from moe_compress.utils.hashing import fingerprint
from moe_compress.utils.logging import log
from moe_compress.zoo import tasks

ITEMS = 500
VERSION = 1
FEW = 20  # documents: percentile bootstraps of 10 hold the truth in 90 % of cases, of 5 in 86 %, not in 95 %


@dataclass(frozen=True)
class Protocol:
    """What all models of one table are measured on: the text, the items, and what identifies both."""

    windows: Windows
    items: tuple[tasks.Item, ...]
    values: dict[str, Any]


def protocol_of(checkpoint: Checkpoint, run: Run) -> Protocol:
    """Tokenize the evaluation text with the checkpoint's own tokenizer."""
    windows = run.windows("heldout", checkpoint)
    items = tasks.items("heldout", ITEMS) if run.options.eval_data == "zoo" else ()
    text = {**windows.description, "fingerprint": windows.fingerprint}
    values = {
        "version": VERSION,
        "text": text,
        "items": len(items),
        "dtype": dtype_name(run.dtype),
        "stored": dtype_name(checkpoint.stored_dtype),
        "device": run.device.type,
        "attn": run.options.attn or hf.skeleton(checkpoint.config, run.dtype).config._attn_implementation,
    }
    return Protocol(windows, items, {**values, "id": fingerprint(values)})


def measured_original(checkpoint: Checkpoint, protocol: Protocol, run: Run) -> tuple[Original, Samples]:
    """The original's measurement, final hidden states and routing, measured once and kept under runs/originals."""
    path = run.results("originals") / f"{_pair(checkpoint, protocol)}.safetensors"
    routed = path.with_suffix(".routing.safetensors")
    with one_at_a_time(path.with_suffix(".lock"), f"measuring {checkpoint.name}"):
        if not path.is_file() or not routed.is_file():
            log.info("measuring the original %s on %d tokens.", checkpoint.name, protocol.windows.tokens)
            layers = layers_of(checkpoint, run)
            measurement, hidden_NSD, samples = _measure(layers, checkpoint, protocol, None, run)
            routing.save(routed, samples)
            perplexity.save_original(path, measurement, hidden_NSD)
    outer = run.layers(checkpoint)
    try:
        return perplexity.load_original(path, outer.model, protocol.windows), routing.load(routed)
    except (SafetensorError, KeyError) as error:
        raise ValueError(
            f"{path} and {routed.name} are no whole measurement: remove them, and it is measured anew."
        ) from error


def _pair(checkpoint: Checkpoint, protocol: Protocol) -> str:
    """Identity of a model under a protocol."""
    return fingerprint(checkpoint.fingerprint, protocol.values["id"])


def layers_of(checkpoint: Checkpoint, run: Run) -> Layers:
    """Streamed layers, or the whole model in memory with `resident=true`; the numbers are the same."""
    if not run.options.resident:
        return run.layers(checkpoint)
    require_memory([checkpoint], run.dtype, run.device, "has to be whole here")
    return ResidentLayers(load_as_run(checkpoint, run.dtype, run.device, run.options.attn))


def _measure(
    layers: Layers, checkpoint: Checkpoint, protocol: Protocol, original: Original | None, run: Run
) -> tuple[Measurement, Any, Samples]:
    """Measure; the layers that an interrupted run has done are not run again."""
    state = run.results("originals") / f"{_pair(checkpoint, protocol)}.partial"
    with progress_bar("evaluating") as progress:
        watch = [RoutingSample(family_of(checkpoint.config), protocol.windows)]
        measurement, hidden_NSD, seen = perplexity.measure(
            layers, protocol.windows, original, watch, state=state, progress=progress
        )
        if protocol.items:
            tokenizer = load_tokenizer(checkpoint.folder, checkpoint.text_config.vocab_size)
            correct = perplexity.answers(layers, protocol.items, tokenizer)
            measurement = dataclasses.replace(measurement, correct=correct)
    shutil.rmtree(state)
    return measurement, hidden_NSD, free_running(seen)


def evaluate_pair(checkpoint: Checkpoint, base: Checkpoint, run: Run) -> tuple[Record, Record]:
    """Records (unsaved) of a checkpoint and of its original, measured on the same text; the same one if it is it."""
    require_same_tokens(checkpoint, base)
    protocol = protocol_of(base, run)
    original, routed = measured_original(base, protocol, run)
    if (documents := len(original.measurement.tokens)) < FEW:
        log.warning("the text has %d documents: intervals of fewer than %d are too narrow.", documents, FEW)
    first = make_record(base, base, protocol, statistics.metrics(original.measurement, None), {}, run).sealed()
    if checkpoint.folder == base.folder:
        return first, first
    with one_at_a_time(
        run.results("originals") / f"{_pair(checkpoint, protocol)}.lock", f"measuring {checkpoint.name}"
    ):
        measurement, _, samples = _measure(layers_of(checkpoint, run), checkpoint, protocol, original, run)
    found = statistics.metrics(measurement, original.measurement) | _routing(
        checkpoint, base, routed, samples, protocol
    )
    record = make_record(checkpoint, base, protocol, found, read_manifest(checkpoint.folder) or {}, run).sealed()
    for name, sums in ((first.name, original.measurement), (record.name, measurement)):
        perplexity.save_documents(run.results("documents") / f"{name}.safetensors", sums)
    return record, first


def _routing(
    checkpoint: Checkpoint, base: Checkpoint, before: Samples, after: Samples, protocol: Protocol
) -> dict[str, statistics.Metric]:
    """How far the free-running routing differs; nothing where it is not known whose experts are whose."""
    try:
        found = fidelity(before, after, ancestry_of(checkpoint, base), protocol.windows)
    except ValueError as error:
        log.info("routing is not compared: %s", error)
        return {}
    return {f"routing_{name}": value for name, value in found.together.items()}


def make_record(
    checkpoint: Checkpoint,
    base: Checkpoint,
    protocol: Protocol,
    metrics: dict[str, Any],
    manifest: dict[str, Any],
    run: Run,
) -> Record:
    """Everything that a row of a table needs."""
    skeleton = hf.skeleton(checkpoint.config, checkpoint.stored_dtype)
    counted = sizes(skeleton, protocol.windows.ids_NS.shape[1], checkpoint.stored_dtype)
    is_original = checkpoint.folder == base.folder
    if is_original:
        name = f"{Path(base.name).name}-original-{_pair(base, protocol)[:6]}"
    else:
        # Folders of one name may hold other checkpoints, now or later.
        identity = fingerprint(checkpoint.fingerprint, _pair(base, protocol))
        name = run.options.name or f"{checkpoint.folder.name}-{identity[:6]}"
    # Beside a model that it was not made from, its recipe says nothing.
    told = manifest if manifest.get("base", {}).get("fingerprint") == base.fingerprint else {}
    return Record(
        name=name,
        model=Path(base.name).name,
        base={"commit": base.commit, "fingerprint": base.fingerprint},
        recipe=told.get("stages") or [],
        seed=run.options.seed,
        form="original" if is_original else manifest.get("form", "plain"),
        protocol=protocol.values,
        metrics={name: Metric(**value) for name, value in metrics.items()},
        sizes={**counted.to_json(), "bytes": checkpoint.bytes},
        cost=_cost(told),
        report=told.get("report") or [],
        environment=environment(),
        written=now(),
        fingerprint=checkpoint.fingerprint,
    )


def _cost(manifest: dict[str, Any]) -> dict[str, float]:
    """What the compression took: its calibration (whenever that was made), its surgery, the larger peak."""
    if not manifest:
        return {}
    measured = [stage["calibration"] for stage in manifest["report"] if stage.get("calibration")]
    peaks = [manifest["cost"]["peak_bytes"], *(found["peak_bytes"] for found in measured)]
    return {
        "calibration_seconds": round(sum(found["seconds"] for found in measured), 3),
        "surgery_seconds": round(manifest["cost"]["surgery_seconds"], 3),
        "peak_bytes": max(peaks),
    }
