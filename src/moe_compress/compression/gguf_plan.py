"""A saved plan applied to a GGUF file: for those who hold nothing but a quantized file of the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_compress.checkpoints.folder import STATE, clear_partial, partial_folder, require_free
from moe_compress.checkpoints.gguf.base_model import require_base_model, shape_values
from moe_compress.checkpoints.gguf.cut import cut_of
from moe_compress.checkpoints.gguf.reader import open_gguf
from moe_compress.checkpoints.gguf.rewrite import cut_bytes, write_cut
from moe_compress.checkpoints.lock import exclusive_output
from moe_compress.checkpoints.reader import architecture_values
from moe_compress.checkpoints.resolve import config_folder
from moe_compress.compression.pipeline import read_structural_plan
from moe_compress.edits.edits import to_json
from moe_compress.models import hf
from moe_compress.utils.files import require_disk, write_json
from moe_compress.utils.hashing import fingerprint


def cut_gguf(plan: Path, file: Path, out: Path | None, any_model: bool) -> Path:
    """Write what the plan leaves of a GGUF model; split files stay as many, in a folder. Returns where it is.

    Raises ValueError, before anything is written, for a file of another model and for what GGUF cannot express.
    """
    stages, base = read_structural_plan(plan)
    model = open_gguf(file)
    shape = base.get("shape")
    if shape is None:  # of a plan that an earlier version wrote
        folder = config_folder(base["model"], base.get("commit"))
        shape = shape_values(hf.config_from(architecture_values(folder)))
    require_base_model(model, base, shape, any_model)
    edits = [edit for stage in stages for edit in stage.plan.edits]
    cut = cut_of(model, edits, plan)
    split = len(model.shards) > 1
    target = out or _beside(model.path, split)
    if target.exists():
        raise ValueError(f"{target} is there already: choose another name with out=, or remove it first.")
    require_free(target)
    require_disk(target.parent, cut_bytes(model, cut), "the smaller model")
    identity = fingerprint("gguf", str(model.path.resolve()), [to_json(edit) for edit in edits])
    with exclusive_output(target, [identity]), _work(target, identity) as work:
        names = [shard.path.name for shard in model.shards] if split else [target.name]
        write_cut(model, cut, {shard.path: work / name for shard, name in zip(model.shards, names, strict=True)})
        (work / STATE).unlink()
        if split:
            work.rename(target)
        else:
            (work / target.name).rename(target)
    return target


def _beside(path: Path, split: bool) -> Path:
    """Where a cut model goes: beside its source, a file for a file and a folder for several."""
    stem = path.name.removesuffix(".gguf")
    return path.with_name(f"{stem.rpartition('-of-')[0].rpartition('-')[0]}-cut" if split else f"{stem}-cut.gguf")


@contextmanager
def _work(target: Path, identity: str) -> Iterator[Path]:
    """A folder beside the target for what is not whole yet; nothing of it stays, however this ends."""
    folder = partial_folder(target)
    clear_partial(folder)
    write_json(folder / STATE, {"identity": identity})
    try:
        yield folder
    except BaseException:
        clear_partial(folder)
        raise
