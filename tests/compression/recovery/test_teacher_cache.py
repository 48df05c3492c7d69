"""What a teacher says is kept once: finished where it was stopped, and trusted only as far as it is whole."""

from __future__ import annotations

import functools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import moe_compress
from moe_compress.checkpoints import safetensors_file
from moe_compress.compression.recovery import teacher_cache, teacher_pass, whole_training
from moe_compress.compression.recovery.teacher_cache import TeacherCache
from moe_compress.compression.recovery.teacher_pass import filled
from moe_compress.engine import forward
from moe_compress.engine.layers import StreamedLayers
from moe_compress.methods.recovery.kept_targets import keeping_of
from moe_compress.models import hf
from support import tiny
from support.interrupted import Interrupted, counting
from support.slow import slow_after

WINDOWS = tiny.windows_of(tiny.token_ids(rows=6, length=16))
RECIPE = "expert_drop ratio=0.5 + router_kd steps=3 batch=2"


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(teacher_cache, "TOKENS_PER_SHARD", 32)
    monkeypatch.setattr(teacher_pass, "SHARDS_AT_ONCE", 2)


@pytest.fixture
def teacher(family_checkpoint):
    return family_checkpoint("mixtral")


def layers_of(teacher):
    return StreamedLayers(teacher, tiny.CPU, torch.float32)


def cache_in(place, cache="sampled", top=8, temperature=1.0, windows=WINDOWS, **said):
    keeping = keeping_of(cache, top, "forward", temperature, 0.5)
    return TeacherCache(place, keeping, windows, {"teacher": "a", "dtype": "float32", **said})


def fill(place, teacher, **words):
    return filled(cache_in(place, **words), lambda: layers_of(teacher), teacher.name, None)


def shards(cache):
    return {path.name: path.read_bytes() for path in cache.folder.glob("shard-*")}


# --- what is kept -------------------------------------------------------------------------------------------


def test_it_is_what_the_teacher_says_token_by_token(teacher, tmp_path):
    ids = tiny.token_ids(rows=6, length=16)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 10:] = mask[4, 5:] = False
    windows = tiny.windows_of(ids, mask)
    found = fill(tmp_path, teacher, cache="topk", windows=windows)
    model = hf.auto_class(teacher.config).from_pretrained(teacher.folder, dtype=torch.float32).eval()
    for chosen in ([4, 1], [0], [5, 3, 2]):
        kept = found.targets(torch.tensor(chosen))
        with torch.no_grad():
            logits = model(ids[chosen], attention_mask=mask[chosen].long()).logits
        where = mask[chosen][:, 1:].nonzero()
        log_p, best = logits[where[:, 0], where[:, 1]].log_softmax(-1).topk(8)
        assert torch.equal(kept["ids"].long(), best)
        assert torch.allclose(kept["log_p"].float(), log_p, atol=5e-3)
        left = torch.log1p(-log_p.double().exp().sum(1)).float()
        assert torch.allclose(kept["log_rest"].float(), left, atol=5e-3)


def test_identity_is_that_of_teacher_text_and_what_is_kept(tmp_path):
    other = tiny.windows_of(tiny.token_ids(rows=6, length=16, seed=5))
    several = [
        cache_in(tmp_path), cache_in(tmp_path, top=9), cache_in(tmp_path, cache="topk"),
        cache_in(tmp_path, temperature=2.0), cache_in(tmp_path, teacher="b"), cache_in(tmp_path, dtype="bfloat16"),
        cache_in(tmp_path, windows=other.select(torch.arange(6))),
    ]  # fmt: skip
    assert len({each.identity for each in several}) == len(several)
    assert cache_in(tmp_path).identity == several[0].identity


# --- what is made once --------------------------------------------------------------------------------------


def nobody():
    raise AssertionError("the teacher is loaded.")


def test_a_stopped_run_goes_on_behind_the_last_shard(teacher, tmp_path, monkeypatch):
    whole = shards(fill(tmp_path / "whole", teacher))
    assert len(whole) == 3
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        counting(patch, teacher_cache, "write_shard", stop_at=1)
        fill(tmp_path, teacher)
    assert [*shards(cache_in(tmp_path))] == ["shard-00000.safetensors"]
    with monkeypatch.context() as patch:
        ran, written = counting(patch, forward.hf, "run_layer"), counting(patch, teacher_cache, "write_shard")
        found = fill(tmp_path, teacher)
    # The first two shards' hidden states were kept behind the last layer, so the last shard alone is run.
    assert shards(found) == whole and len(written) == 2 and len(ran) == tiny.LAYERS
    assert sorted(path.name for path in found.folder.iterdir()) == [*sorted(whole), "teacher.json"]
    assert shards(filled(cache_in(tmp_path), nobody, "nobody", None)) == whole


@pytest.mark.parametrize("number", slow_after(1, [14, 3, 20, 27]))
def test_a_killed_run_goes_on(number, teacher, tmp_path):
    """Killed in the middle of a tensor: of hidden states between two layers, or of a shard."""
    whole = shards(fill(tmp_path / "whole", teacher))

    def dies(out: int, data: memoryview, seen: list[int], write: Callable[[int, memoryview], None]) -> None:
        seen.append(1)
        if len(seen) == number:
            os.write(out, data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        write(out, data)

    child = os.fork()
    if child == 0:
        safetensors_file.write_all = functools.partial(dies, seen=[], write=safetensors_file.write_all)
        fill(tmp_path, teacher)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert len(shards(cache_in(tmp_path))) < len(whole)
    found = fill(tmp_path, teacher)
    assert shards(found) == whole
    assert sorted(path.name for path in found.folder.iterdir()) == [*sorted(whole), "teacher.json"]


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def of_another(file: Path) -> None:
    safetensors_file.write_shard(file, load_file(file), {"identity": "another"})


@pytest.mark.parametrize("damage", [cut, flip, of_another, Path.unlink], ids=lambda each: each.__name__)
def test_what_is_broken_is_made_again_and_nothing_else(damage, teacher, tmp_path, monkeypatch):
    cache = fill(tmp_path, teacher)
    before, file = shards(cache), cache.folder / "shard-00001.safetensors"
    damage(file)
    written = counting(monkeypatch, teacher_cache, "write_shard")
    assert shards(fill(tmp_path, teacher)) == before and len(written) == 1


def test_a_cut_index_is_written_again(teacher, tmp_path):
    cache = fill(tmp_path, teacher)
    (cache.folder / "teacher.json").write_text('{"identity": "')
    fill(tmp_path, teacher)
    assert json.loads((cache.folder / "teacher.json").read_text())["identity"] == cache.identity
    filled(cache_in(tmp_path), nobody, "nobody", None)


# --- what is trusted ----------------------------------------------------------------------------------------


def test_a_folder_under_another_name(teacher, tmp_path):
    fill(tmp_path, teacher).folder.rename(cache_in(tmp_path, top=9).folder)
    with pytest.raises(ValueError, match=r"was kept of another teacher, text or number of tokens than its name says"):
        fill(tmp_path, teacher, top=9)


def age(cache: TeacherCache) -> None:
    """Let it be made by other libraries."""
    index = json.loads((cache.folder / "teacher.json").read_text())
    (cache.folder / "teacher.json").write_text(json.dumps({**index, "agrees_on": ["torch 1.0"]}))


@pytest.mark.parametrize("kind", ["topk", "sampled"])
def test_one_window_is_asked_of_the_teacher_by_other_libraries(kind, teacher, tmp_path, monkeypatch):
    cache = fill(tmp_path, teacher, cache=kind)
    age(cache)
    ran = counting(monkeypatch, forward.hf, "run_layer")
    fill(tmp_path, teacher, cache=kind)
    assert len(ran) == tiny.LAYERS
    filled(cache_in(tmp_path, cache=kind), nobody, "nobody", None)


@pytest.mark.parametrize("kind", ["topk", "sampled"])
def test_a_cache_that_does_not_agree_is_named(kind, teacher, tmp_path):
    cache = fill(tmp_path, teacher, cache=kind)
    kept = load_file(cache.folder / "shard-00000.safetensors")
    cache.write(0, {**kept, "log_p": kept["log_p"].flip(0), "ids": kept["ids"].flip(0)})
    age(cache)
    with pytest.raises(ValueError, match=rf"{cache.folder} does not agree with .*: what is kept of window 0 is off by"):
        fill(tmp_path, teacher, cache=kind)


# --- recipes ------------------------------------------------------------------------------------------------


def curve(folder: Path) -> list[float]:
    return json.loads((folder / "moe_compress.json").read_text())["report"][-1]["training"]["curve"]["logits"]


def test_a_grid_runs_its_teacher_once(lab, tmp_path, monkeypatch):
    options = {**lab("mixtral"), "results": str(tmp_path)}
    online = curve(moe_compress.compress(RECIPE, **options).folder)
    loaded = counting(monkeypatch, whole_training, "WholeModel")
    first = curve(moe_compress.compress(f"{RECIPE} cache=sampled", **options).folder)
    # Of 320 tokens that a random model knows nothing of, 64 tell little by themselves.
    assert first == pytest.approx(online, rel=0.2) and len(loaded) == 1
    passes = counting(monkeypatch, teacher_pass, "forward_layers")
    other = RECIPE.replace("0.5", "0.25")
    moe_compress.compress(f"{other} cache=sampled", **options)
    moe_compress.compress(f"{RECIPE} cache=sampled lr=1e-3", **options)
    assert passes == [] and len(loaded) == 3
    moe_compress.compress(f"{RECIPE} cache=sampled", **{**options, "samples": 7})
    assert len(passes) > 0


def test_students_of_all_kinds_share_a_cache(lab, tmp_path, monkeypatch):
    options = {**lab("mixtral"), "results": str(tmp_path)}
    quantized = "quantize method=rtn bits=4 group_size=8 format=packed"
    moe_compress.compress(f"{quantized} + qad steps=2 batch=2 cache=topk", **options)
    passes = counting(monkeypatch, teacher_pass, "forward_layers")
    moe_compress.compress("expert_drop ratio=0.5 + distill steps=2 batch=2 cache=topk divergence=jsd", **options)
    assert passes == [] and len(list((tmp_path / "teachers").glob("*/teacher.json"))) == 1


def test_losses_without_a_teacher_load_none(lab, tmp_path, monkeypatch):
    loaded = counting(monkeypatch, whole_training, "WholeModel")
    words = "expert_drop ratio=0.5 + distill loss=labels steps=2 batch=2"
    moe_compress.compress(words, **{**lab("mixtral"), "results": str(tmp_path)})
    assert len(loaded) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("cache=topk top=320", r"top=320: fewer tokens than the vocabulary has \(320\) are needed"),
        ("cache=topk loss=logits,router", "a cache holds next-token probabilities"),
    ],
)
def test_it_is_said_before_anything_is_read(words, said, lab, tmp_path):
    with pytest.raises(ValueError, match=said):
        moe_compress.compress(
            f"expert_drop ratio=0.5 + distill {words}", **{**lab("mixtral"), "results": str(tmp_path)}
        )
    assert not (tmp_path / "teachers").exists()
