"""Channels: experts made narrower, in memory, on skeletons, in checkpoints and by recipes."""

from __future__ import annotations

import contextlib
import functools
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import moe_compress
import naive
import naive_pruning as slow
import readers
import tiny
from editing import FOUR, IDS, cut, logits_of, moe_layers, original, write
from moe_compress.calibration.channel_statistics import ChannelStatistics
from moe_compress.calibration.gradients import ChannelGradients
from moe_compress.calibration.model_statistics import LayerStatistics
from moe_compress.checkpoints.folder import read_manifest
from moe_compress.checkpoints.load import load_model
from moe_compress.checkpoints.reader import Checkpoint, open_checkpoint
from moe_compress.edits.apply import check_edits
from moe_compress.edits.edits import Edit, KeepChannels, KeepExperts, from_json, to_json
from moe_compress.edits.plan_file import read_plan
from moe_compress.engine.backward import backward
from moe_compress.engine.forward import forward_layers
from moe_compress.engine.layers import ResidentLayers, StreamedLayers
from moe_compress.methods.pruning.channels import channel_scores
from moe_compress.models import hf
from moe_compress.models.families import family_of
from moe_compress.models.moe import inner_width, moe_views
from moe_compress.models.shape import moe_shapes
from test_identity import windows_of

WIDTH = 16
WORDS = torch.randint(3, readers.VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))
# One width for all experts of a model is plain unless shared experts are measured in experts' widths: 24 * n / 16.
EDITED = ("deepseek_v3", "glm4_moe", "dots1", "afmoe", "hunyuan_v1_moe", "llama4_text", "jamba")


def chosen(source: Checkpoint, width: int = WIDTH) -> list[Edit]:
    """Random neurons of every expert, in every layer with experts."""
    generator = torch.Generator().manual_seed(5)
    edits: list[Edit] = []
    for layer in moe_layers(source):
        rows = [torch.randperm(tiny.INNER, generator=generator)[:width].sort().values for _ in range(tiny.EXPERTS)]
        edits.append(KeepChannels(layer, width, arrays={"channels": torch.stack(rows).int()}))
    return edits


@torch.no_grad()
@pytest.mark.parametrize("family", tiny.EDITABLE)
def test_experts_compute_with_the_neurons_that_stay(family, sources):
    source = sources(family)
    edits, whole = chosen(source), original(source)
    layer = edits[0].layer
    config, fused = whole.config, moe_views(whole)[layer].experts
    x_TD = torch.randn(4, tiny.HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kept_EW = edits[0].arrays["channels"].long()
    small = moe_views(cut(source, edits))[layer]
    assert inner_width(small) == WIDTH
    for e in (0, tiny.EXPERTS - 1):
        before = naive.expert(family, config, fused.double(), e)
        after = naive.expert(family, config, small.experts.double(), e)
        gone = torch.ones(tiny.INNER, dtype=torch.bool)
        gone[kept_EW[e]] = False
        down = before.matrices[-1].clone()
        before.matrices[-1][:, gone] = 0  # a view onto the weights
        for x in x_TD:
            torch.testing.assert_close(after.run(x), before.run(x))
        before.matrices[-1].copy_(down)


@pytest.mark.parametrize("family", tiny.EDITABLE)
def test_checkpoints_reload_as_they_are_in_memory(family, sources, tmp_path):
    source = sources(family)
    edits = chosen(source)
    written = write(source, edits, tmp_path / "out")
    assert (written.config.model_type == source.config.model_type) == (family not in EDITED), family
    torch.testing.assert_close(logits_of(load_model(tmp_path / "out", torch.float32)), logits_of(cut(source, edits)))


def test_different_widths_are_edited_and_full_width_changes_nothing(sources, tmp_path):
    source = sources("mixtral")
    uneven = [*chosen(source)[:1], *chosen(source, 8)[1:2]]
    assert write(source, uneven, tmp_path / "uneven").config.model_type == "moe_compress_mixtral"
    torch.testing.assert_close(
        logits_of(load_model(tmp_path / "uneven", torch.float32)), logits_of(cut(source, uneven))
    )
    whole = chosen(source, tiny.INNER)
    torch.testing.assert_close(logits_of(cut(source, whole)), logits_of(original(source)))


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "llama4_text", "nemotron_h", "qwen2_moe"])
def test_sums_and_scores_are_those_of_the_naive_reference(family):
    model = tiny.make(family)
    seen, _ = forward_layers(ResidentLayers(model), windows_of(IDS), [ChannelStatistics(family_of(model.config))])
    layer = next(iter(moe_views(model)))
    found, rows = seen[layer][0], slow.rows(tiny.make(family), family, IDS)[layer]
    nothing = torch.zeros(1, tiny.INNER, dtype=torch.float64)
    inner = [torch.stack(each.inner) if each.inner else nothing for each in rows]
    gated = [a * torch.tensor(r.gates or [0.0]).double().unsqueeze(1) for a, r in zip(inner, rows, strict=True)]
    square = torch.stack([a.square().sum(0) for a in inner])
    total, largest = (torch.stack([f(a.square()) for a in gated]) for f in (lambda a: a.sum(0), lambda a: a.amax(0)))
    close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-7)
    close(found["channel_square"], square)
    close(found["channel_gated"], total)
    close(found["channel_max"], largest)
    view = moe_views(model)[layer]
    shape = next(shape for shape in moe_shapes(model) if shape.layer == layer)
    sums = LayerStatistics(shape, found, 3, "full", lambda: contextlib.nullcontext(view))
    matrices = [[m.double() for m in expert] for expert in slow.matrices(model, family, layer)]
    down = torch.stack([expert[-1] for expert in matrices])
    close(channel_scores(sums, "camera", 0.25), down.square().sum(1) * (0.75 * total + 0.25 * largest))
    close(channel_scores(sums, "wanda", 0.25), down.abs().sum(1) * square.sqrt())
    into = torch.stack([sum(m.square().sum(1) for m in expert[:-1]) for expert in matrices])
    close(channel_scores(sums, "magnitude", 0.25), into + down.square().sum(1))


# --- recipes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.EDITABLE)
@pytest.mark.parametrize("score", ["camera", "heapr", "wanda", "magnitude"])
def test_recipes_keep_the_best_neurons(family, score, reader_folder, options):
    folder = reader_folder(family)
    made = moe_compress.compress(
        f"channels score={score} keep={WIDTH}", model=str(folder), eval=False, **options
    ).folder
    source, narrow = open_checkpoint(folder), load_model(made, torch.float32)
    assert {inner_width(view) for view in moe_views(narrow).values()} == {WIDTH}
    assert bool(logits_of(narrow, WORDS).isfinite().all())
    plan = read_plan(made / "plan.json")[0][0].plan
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


def test_plans_are_checked(sources):
    source = sources("mixtral")
    edit = chosen(source)[0]
    assert to_json(edit) == {"edit": "keep_channels", "layer": 0, "width": WIDTH, "widths": None}
    assert from_json(to_json(edit), edit.arrays) == edit and edit.needed_array == "channels"
    skeleton = functools.partial(hf.skeleton, source.config, torch.float32)
    ids = edit.arrays["channels"]
    for width, kept in ((25, None), (0, None), (8, ids), (16, ids * 2), (16, ids + 0.5)):
        with pytest.raises(ValueError, match="layer 0"):
            check_edits(skeleton(), [KeepChannels(0, width, arrays={} if kept is None else {"channels": kept})])


# --- experts of different widths ------------------------------------------------------------------------------------

WIDTHS = (8, 16, 24, 8, 16, 8, 16, 8)


def uneven(source: Checkpoint) -> list[Edit]:
    """Random neurons, of each expert another number."""
    generator = torch.Generator().manual_seed(6)
    edits: list[Edit] = []
    for layer in moe_layers(source):
        rows = [torch.randperm(tiny.INNER, generator=generator)[:w].sort().values for w in WIDTHS]
        kept = torch.stack([torch.nn.functional.pad(row, (0, tiny.INNER - len(row))) for row in rows]).int()
        edits.append(KeepChannels(layer, max(WIDTHS), WIDTHS, arrays={"channels": kept}))
    return edits


@torch.no_grad()
@pytest.mark.parametrize("family", tiny.EDITABLE)
def test_experts_of_different_widths_are_those_with_other_neurons_zeroed(family, sources, tmp_path):
    source = sources(family)
    edits, whole = uneven(source), original(source)
    for edit in edits:
        stacks = moe_views(whole)[edit.layer].stacks()
        for e, width in enumerate(WIDTHS):
            gone = torch.ones(tiny.INNER, dtype=torch.bool)
            gone[edit.arrays["channels"][e, :width].long()] = False
            stacks["down"][e][:, gone] = 0  # a view onto the weights
    edited = cut(source, edits)
    assert [view.widths for view in moe_views(edited).values()] == [list(WIDTHS)] * len(edits)
    torch.testing.assert_close(logits_of(edited), logits_of(whole))
    written = write(source, edits, tmp_path / "out")
    assert written.config.model_type == f"moe_compress_{source.config.model_type}"
    assert written.bytes < source.bytes
    loaded = load_model(tmp_path / "out", torch.float32)
    assert torch.equal(logits_of(loaded), logits_of(edited))
    streamed = forward_layers(StreamedLayers(written, torch.device("cpu"), torch.float32), windows_of(IDS))[1]
    torch.testing.assert_close(hf.head(loaded, streamed.flatten(0, 1)).view_as(logits_of(edited)), logits_of(edited))


@pytest.mark.parametrize("family", tiny.EDITABLE)
def test_experts_of_different_widths_can_still_be_dropped(family, sources, tmp_path):
    source = sources(family)
    edits = uneven(source)
    first = write(source, edits, tmp_path / "first")
    drops: list[Edit] = [KeepExperts(edit.layer, FOUR) for edit in edits]
    again = write(first, drops, tmp_path / "again")
    assert [view.widths for view in moe_views(load_model(tmp_path / "again")).values()] == [[16, 24, 16, 8]] * len(
        edits
    )
    logits = logits_of(load_model(tmp_path / "again", torch.float32))
    assert torch.equal(logits, logits_of(cut(source, [*edits, *drops])))
    torch.testing.assert_close(logits, logits_of(cut(source, [*drops, *_of_four(edits)])))
    assert again.bytes < first.bytes


def _of_four(edits: list[Edit]) -> list[Edit]:
    """The same widths once only four experts are left."""
    rows = torch.tensor(FOUR)
    kept = tuple(WIDTHS[e] for e in FOUR)
    return [KeepChannels(e.layer, 24, kept, arrays={"channels": e.arrays["channels"][rows]}) for e in edits]


@pytest.mark.parametrize("budget", ["layer", "global"])
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


# --- gradients ------------------------------------------------------------------------------------------------------


def naive_heapr(family: str, layer: int) -> torch.Tensor:
    """Scores of one layer from one backward pass through the whole stock model, token by token, in float64."""
    model = tiny.make(family).double()
    model.set_experts_implementation("eager")
    outputs: list[torch.Tensor] = []
    experts = slow.block_of(model, family, layer).experts
    hook = experts.register_forward_hook(lambda _m, _args, out: outputs.append(out))
    hidden = model(IDS, use_cache=False).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(hidden.flatten(0, 1), IDS[:, 1:].flatten())
    (gradient,) = torch.autograd.grad(loss, outputs)
    hook.remove()
    gradient = gradient.reshape(IDS.numel(), -1)
    tokens, _ = slow.entering(model, family, IDS)[layer]
    squares = torch.zeros(tiny.EXPERTS, tiny.INNER, dtype=torch.float64)
    moments = torch.zeros(tiny.EXPERTS, tiny.HIDDEN, tiny.HIDDEN, dtype=torch.float64)
    counts = torch.zeros(tiny.EXPERTS, dtype=torch.float64)
    with torch.no_grad():
        for x, g in zip(tokens, gradient, strict=True):
            choice, _ = slow.routing(model, family, layer, x)
            for e, gate in zip(choice.ids, choice.gates, strict=True):
                squares[e] += slow.inner(family, model.config, experts, e, x).square()
                moments[e] += torch.outer(gate * g, gate * g)
                counts[e] += 1
        down = torch.stack([expert[-1] for expert in slow.matrices(model, family, layer)])
    mean = moments / counts.clamp_min(1)[:, None, None]
    return squares * torch.einsum("edf,edc,ecf->ef", down, mean, down)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "nemotron_h", "qwen2_moe", "granitemoe"])
def test_gradients_that_come_back_layer_by_layer_are_those_of_the_whole_model(family, family_checkpoint, tmp_path):
    layers = StreamedLayers(family_checkpoint(family), torch.device("cpu"), torch.float32)
    seen = backward(layers, windows_of(IDS), ChannelGradients(family_of(layers.model.config)), tmp_path)
    assert not [*tmp_path.iterdir()]
    for layer in [layer for layer, found in enumerate(seen) if found]:
        expected = naive_heapr(family, layer)
        torch.testing.assert_close(seen[layer]["heapr"], expected, rtol=2e-3, atol=float(expected.max()) * 1e-5)


def test_gradients_need_a_disk(family_checkpoint, monkeypatch, tmp_path):
    layers = StreamedLayers(family_checkpoint("mixtral"), torch.device("cpu"), torch.float32)
    monkeypatch.setattr("moe_compress.utils.files.shutil.disk_usage", lambda _path: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match="use fewer or shorter windows"):
        backward(layers, windows_of(IDS), ChannelGradients(family_of(layers.model.config)), tmp_path)
