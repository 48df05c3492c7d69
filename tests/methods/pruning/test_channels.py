"""Recipes that make experts narrower keep the best neurons."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import pytest
import torch

import moe_compress
from moe_compress.checkpoints.folder import read_manifest
from moe_compress.checkpoints.load import load_model
from moe_compress.checkpoints.reader import open_checkpoint
from moe_compress.edits.plan_file import read_plan
from moe_compress.models.moe import inner_width, moe_views
from support import readers, tiny
from support.editing import cut, logits_of, moe_layers, original
from support.slow import DIFFERENT, each_once, slow_after, slow_unless

WIDTH = 16
WORDS = torch.randint(3, readers.VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))


SCORES = ("camera", "heapr", "wanda", "magnitude")
once = each_once(DIFFERENT, SCORES)


@pytest.mark.parametrize(
    ("family", "score"),
    slow_unless(lambda family, score: family in DIFFERENT[:5] and once(family, score), tiny.EDITABLE, SCORES),
)
def test_recipes_keep_the_best_neurons(family, score, reader_folder, made):
    folder = made(family, f"channels score={score} keep={WIDTH}")
    source, narrow = open_checkpoint(reader_folder(family)), load_model(folder, torch.float32)
    assert {inner_width(view) for view in moe_views(narrow).values()} == {WIDTH}
    assert bool(logits_of(narrow, WORDS).isfinite().all())
    plan = read_plan(folder / "plan.json")[0][0].plan
    torch.testing.assert_close(logits_of(narrow, WORDS), logits_of(cut(source, plan.edits), WORDS))
    assert plan.report["widths"] == {str(layer): WIDTH for layer in moe_layers(source)}


def test_a_global_budget_leaves_as_many_neurons(reader_folder, options):
    run = functools.partial(moe_compress.compress, model=str(reader_folder("mixtral")), eval=False, **options)
    widths = read_plan(run("channels ratio=0.34 budget=global").folder / "plan.json")[0][0].plan.report["widths"]
    assert sum(widths.values()) == 3 * WIDTH and set(widths.values()) <= {8, 16, 24}
    again = run("channels ratio=0.34 budget=global + expert_drop keep=6 score=frequency + channels keep=8").folder
    assert {inner_width(view) for view in moe_views(load_model(again, torch.float32)).values()} == {8}
    assert read_manifest(again)["form"] == "plain"


def test_duplicated_channels_that_do_nothing_go_first(reader_folder, options, tmp_path):
    folder = tmp_path / "idle"
    model = original(open_checkpoint(reader_folder("mixtral")))
    with torch.no_grad():
        for view in moe_views(model).values():
            view.experts.down_proj[:, :, ::3] = 0
    model.save_pretrained(folder)
    for path in reader_folder("mixtral").glob("token*"):
        shutil.copy(path, folder)
    made = moe_compress.compress(f"channels keep={WIDTH}", model=str(folder), eval=False, **options).folder
    torch.testing.assert_close(logits_of(load_model(made, torch.float32), WORDS), logits_of(model, WORDS))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("ratio=1", "fraction of neurons removed is in"),
        ("keep=20", "can keep multiples of 8 up to 24"),
        ("keep=0", "can keep multiples of 8 up to 24"),
        ("multiple=16", "multiple=16 does not divide the 24 neurons"),
        ("keep=6 multiple=2", "no multiple of 16 bytes"),
        ("keep=20 multiple=4 dtype=bfloat16", "no multiple of 16 bytes"),
        ("alpha=2", "from 0 to 1"),
        ("keep=16 ratio=0.5", "not both"),
    ],
)
def test_bad_widths_are_one_sentence(words, said, reader_folder, options):
    with pytest.raises(ValueError, match=said):
        moe_compress.compress(f"channels {words}", model=str(reader_folder("mixtral")), **options)
    assert not Path(str(options["results"]), "checkpoints").exists()


@pytest.mark.parametrize("budget", slow_after(1, ["layer", "global"]))
def test_ranking_within_layers_gives_experts_widths_of_their_own(budget, reader_folder, options):
    run = functools.partial(moe_compress.compress, model=str(reader_folder("qwen2_moe")), eval=False, **options)
    made = run(f"channels ratio=0.34 within=layer budget={budget} score=wanda").folder
    widths = [view.widths for view in moe_views(load_model(made)).values()]
    assert sum(map(sum, widths)) == len(widths) * tiny.EXPERTS * WIDTH
    assert budget == "global" or [sum(each) for each in widths] == [tiny.EXPERTS * WIDTH] * len(widths)
    assert any(len(set(each)) > 1 for each in widths) and read_manifest(made)["form"] == "edited"
    plan = read_plan(made / "plan.json")[0][0].plan
    torch.testing.assert_close(
        logits_of(load_model(made, torch.float32), WORDS),
        logits_of(cut(open_checkpoint(reader_folder("qwen2_moe")), plan.edits), WORDS),
    )
    small = run(
        f"channels ratio=0.34 within=layer budget={budget} score=wanda + layer_drop drop=1 + expert_drop keep=6"
    )
    assert {view.num_experts for view in moe_views(load_model(small.folder)).values()} == {6}
    for behind in ("prune", "channels", "expert_merge"):
        with pytest.raises(ValueError, match="put this stage before the one that made them so"):
            run(f"channels ratio=0.34 within=layer budget={budget} + {behind}")
