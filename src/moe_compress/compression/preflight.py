"""What can be known before any weight is read: texts, names, disk, and whether the recipe fits the model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from moe_compress.checkpoints.folder import begun_bytes, read_manifest, require_free, stage_folder
from moe_compress.checkpoints.reader import Checkpoint
from moe_compress.checkpoints.resolve import config_folder, resolve_model
from moe_compress.compression.forecast import Forecast, forecast
from moe_compress.data.documents import Use, parts, read_documents, require_sources, text_identity
from moe_compress.data.overlap import refuse_same_documents, refuse_same_files
from moe_compress.data.windows import parse_mix
from moe_compress.methods import registry
from moe_compress.methods.stage_options import TEACHER, TrainingOptions
from moe_compress.recipes.recipe import Recipe, Stage
from moe_compress.run.context import Run, text_spec
from moe_compress.run.trackers import require_tracker
from moe_compress.utils.devices import dtype_name
from moe_compress.utils.files import require_disk
from moe_compress.utils.hashing import fingerprint

# Characters of a name, and of the identity behind it.
MAX_NAME, DIGITS = 120, 6


def preflight(recipe: Recipe, out: Path) -> None:
    """Whatever can fail before a weight is fetched or read: counts, texts, the folder, the disk."""
    options = recipe.options
    expected = forecast(recipe, config_folder(options.model, options.revision))
    parse_mix(options.mix)
    for stage in recipe.stages:
        require_tracker(TrainingOptions.of(stage.parameters).log)
    uses = _uses(recipe)
    specs = [text_spec(options, use) for use in uses]
    for spec in specs:
        require_sources(spec)
    if len(specs) == 2 and not options.allow_overlap:
        refuse_same_files(*specs)
    for part in (part for spec in specs for part in parts(spec)):
        read_documents(part)
    if read_manifest(out) is None:
        require_free(out)
        require_disk(out.parent, bytes_to_write(recipe, expected, out), "the new checkpoint")
        fewer = "use fewer or shorter windows (samples=, length=), or another disk with results="
        boundaries = 2 * expected.boundary_bytes if "calibration" in uses else 0
        require_disk(Path(options.results), boundaries, "the calibration's hidden states", fewer)


def bytes_to_write(recipe: Recipe, expected: Forecast, out: Path) -> int:
    """Bytes of the checkpoints that are not there yet: those of earlier stages are kept until the end."""
    earlier = [stage_folder(out, n) for n in range(len(recipe.stages) - 1)]
    sizes = {out: expected.after.bytes, **dict.fromkeys(earlier, expected.before.bytes)}
    whole = sum(size - begun_bytes(folder) for folder, size in sizes.items() if read_manifest(folder) is None)
    return whole + sum(map(_step_checkpoints, recipe.stages)) * expected.after.bytes


def _step_checkpoints(stage: Stage) -> int:
    """How many of the student so far are there at the same time: of step 0, of those that stay, and a new one."""
    options = TrainingOptions.of(stage.parameters)
    if not options.checkpoint_every:
        return 0
    written = (options.steps - 1) // options.checkpoint_every
    return 1 + min(written, options.keep_checkpoints + 1 if options.keep_checkpoints else written)


def _uses(recipe: Recipe) -> list[Use]:
    text = any(stage.needs in registry.FROM_TEXT for stage in recipe.stages)
    uses: dict[Use, bool] = {"calibration": text, "heldout": recipe.options.eval}
    return [use for use, needed in uses.items() if needed]


def read_texts(recipe: Recipe, source: Checkpoint, run: Run) -> None:
    """Tokenize all texts before the first forward, so that none can fail after it."""
    texts = {use: run.windows(use, source) for use in _uses(recipe)}
    if "calibration" in texts:
        parse_mix(run.options.mix, texts["calibration"].domains)
    if len(texts) == 2 and not run.options.allow_overlap:
        refuse_same_documents(texts["calibration"], texts["heldout"])


def default_name(recipe: Recipe) -> str:
    """A name for folder and record: model, methods with what differs from their defaults, a short identity."""
    parts = [Path(os.path.abspath(recipe.options.model)).name]
    for stage in recipe.stages:
        parts += [stage.method, *(f"{key}-{value}" for key, value in stage.explicit_parameters.items())]
    name = "".join(c if c.isalnum() or c in "-_." else "." for c in "-".join(parts))
    return f"{name[:MAX_NAME]}-{fingerprint(recipe.to_yaml())[:DIGITS]}"


def made_before(out: Path, identity: str) -> Path:
    """The folder beside `out`, a default name, that holds the checkpoint already; `out` itself where there is none.

    Names depend on how a checkpoint is evaluated, too; its weights do not.
    """
    alike = sorted(out.parent.glob(f"{out.name[:-DIGITS]}{'?' * DIGITS}"))
    return next((folder for folder in [out, *alike] if _identity(folder) == identity), out)


def _identity(folder: Path) -> str | None:
    """Of a finished checkpoint; of one whose manifest was changed, there is none."""
    try:
        return (read_manifest(folder) or {}).get("identity")
    except ValueError:
        return None


def stage_identity(stages: list[Stage], source: Checkpoint, run: Run) -> str:
    """What the weights of a checkpoint depend on."""
    steps: list[dict[str, Any]] = [{"method": stage.method, "parameters": stage.lasting_parameters} for stage in stages]
    steps += [{TEACHER: resolve_model(name).fingerprint} for s in stages if (name := s.parameters.get(TEACHER))]
    options = run.options
    arithmetic = [dtype_name(run.dtype), run.device.type, options.attn]
    if all(stage.needs not in registry.FROM_TEXT for stage in stages):
        # Noise is run through layers, and weights are read, in the arithmetic of the run.
        noisy = any(stage.needs == "noise" or registry.find(stage.method).scope != "model" for stage in stages)
        return fingerprint(source.fingerprint, steps, *([arithmetic] if noisy else []))
    return fingerprint(
        source.fingerprint, steps, text_identity(text_spec(options, "calibration")), options.mix, arithmetic
    )
