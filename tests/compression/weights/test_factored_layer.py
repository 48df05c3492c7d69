"""What stages and exports make of experts that are held in factors."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

import moe_compress
from moe_compress.checkpoints.folder import MANIFEST, read_manifest
from moe_compress.checkpoints.load import load_model
from moe_compress.checkpoints.reader import open_checkpoint
from moe_compress.checkpoints.writer import CheckpointWriter
from moe_compress.compression.weights.factored_layer import FactoredStore
from moe_compress.edits.edits import KeepExperts
from moe_compress.edits.factors import Form
from moe_compress.edits.resulting_config import resulting_config
from moe_compress.engine.layers import StreamedLayers
from moe_compress.hub.card import model_card
from moe_compress.models import hf
from moe_compress.models.families import family_of
from moe_compress.models.modeling.factored_experts import FactoredMatrix
from moe_compress.models.modeling.packed_linear import PackedMatrix
from moe_compress.models.modeling.unfused_experts import ExpertMatrix, halves
from moe_compress.models.moe import moe_view, moe_views, permute_neurons
from moe_compress.models.sizes import sizes
from support import tiny
from support.editing import logits_of, original
from support.editing import write as write_edits
from support.factored import MIXED, OTHERS, factors_of, write
from support.slow import DIFFERENT, slow_unless

# Ranks are such as a group of 8 divides.
SAME = {"gate": Form(rank=8, core=True), "up": Form(bases=(2, 8)), "down": Form(basis=16)}
OTHER = {"gate": Form(rank=(8, 16) * 4), "up": Form(rank=8, residue=3), "down": Form(rank=(8, 16) * 4, core=True)}
RTN = "quantize method=rtn group_size=8 clip=max format=packed where=experts"


@pytest.fixture(scope="module")
def factored(reader_folder, tmp_path_factory):
    """By forms, a checkpoint with a tokenizer."""
    folder = tmp_path_factory.mktemp("factored")
    source = open_checkpoint(reader_folder("mixtral"))
    return {name: write(source, forms, folder / name)[0] for name, forms in (("same", SAME), ("other", OTHER))}


def compressed(sentence, checkpoint, lab, **options):
    words = {**lab("mixtral"), "model": str(checkpoint.folder), "eval": False}
    return moe_compress.compress(sentence, **{**words, **options}).folder


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["same", "other"])
def test_factors_are_rounded_and_packed(bits, name, factored, lab, tmp_path):
    folder = compressed(f"{RTN} bits={bits}", factored[name], lab, out=str(tmp_path / "out"))
    found, before = load_model(folder, torch.float32), load_model(factored[name].folder, torch.float32)
    ours = moe_compress.load(folder, torch.float32)
    packed = 0
    for new, old in zip(moe_views(found).values(), moe_views(before).values(), strict=True):
        assert new.factored and new.widths == old.widths
        for path, module in old.experts.named_modules():
            after = new.experts.get_submodule(path)
            if isinstance(after, PackedMatrix):
                packed += 1
                step = after.scales.repeat_interleave(8, 1)
                assert bool(((after.dense() - module.weight).abs() <= step * 0.5001).all())
            elif isinstance(after, FactoredMatrix):
                assert after.shares == module.shares
    assert packed > 0
    torch.testing.assert_close(logits_of(ours), logits_of(found), rtol=1e-4, atol=1e-4)
    checkpoint = open_checkpoint(folder)
    assert sizes(hf.skeleton(checkpoint.config, torch.float32), 16, torch.float32).bytes == checkpoint.bytes


@pytest.mark.parametrize(
    "sentence",
    ["quantize method=gptq bits=4", "quantize method=awq bits=4", "quantize method=rtn bits=auto budget=4", "prune"],
)
def test_whatever_has_to_know_what_factors_are_given_is_refused(sentence, factored, lab):
    with pytest.raises(ValueError, match="held in factors can be rounded to the nearest alone") as caught:
        compressed(sentence, factored["same"], lab)
    assert "\n" not in str(caught.value)


def test_a_plain_format_holds_no_factors(factored, lab):
    with pytest.raises(ValueError, match="use format=packed"):
        compressed("quantize method=rtn bits=4 format=compressed-tensors", factored["same"], lab)


# --- whole again --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "name"), slow_unless(lambda f, n: f in DIFFERENT and n == "mixed", tiny.EDITABLE, ["mixed", "others"])
)
def test_an_export_is_the_ordinary_architecture_with_full_matrices(family, name, sources, tmp_path):
    source = sources(family)
    checkpoint, _ = write(source, {"mixed": MIXED, "others": OTHERS}[name], tmp_path / "factored")
    plain = open_checkpoint(moe_compress.export(checkpoint.folder, tmp_path / "plain"))
    assert plain.values["model_type"] == source.values["model_type"] and "moe_compress" not in plain.values
    assert plain.tensors.keys() == source.tensors.keys() and not list(plain.folder.glob("*.py"))
    model, stock = load_model(checkpoint.folder, torch.float32), load_model(plain.folder, torch.float32)
    assert type(stock) is type(load_model(source.folder, torch.float32))
    torch.testing.assert_close(logits_of(stock), logits_of(model), rtol=1e-3, atol=2e-4)


def test_an_export_says_that_nothing_is_saved(sources, tmp_path, caplog):
    checkpoint, _ = write(sources("mixtral"), MIXED, tmp_path / "factored")
    folder = moe_compress.export(checkpoint.folder)
    assert folder == tmp_path / "factored-full"
    assert "full matrices save no memory" in caplog.text
    manifest = read_manifest(folder)
    assert manifest is not None and manifest["full_matrices_from"]["model"] == checkpoint.name
    assert "no memory is saved" in model_card({**manifest, "base": {"model": "some/one", "fingerprint": "0"}}, name="x")


def test_an_export_keeps_what_other_edits_left(sources, tmp_path):
    kept = [KeepExperts(layer, (0, 2, 3, 5, 6, 7)) for layer in range(tiny.LAYERS)]
    checkpoint, _ = write(write_edits(sources("mixtral"), kept, tmp_path / "six"), MIXED, tmp_path / "factored")
    fewer = write_edits(checkpoint, [KeepExperts(layer, (0, 2, 3)) for layer in range(tiny.LAYERS)], tmp_path / "three")
    (fewer.folder / MANIFEST).unlink()
    plain = open_checkpoint(moe_compress.export(fewer.folder, tmp_path / "plain"))
    assert plain.values["num_local_experts"] == 3 and "moe_compress" not in plain.values
    expected = logits_of(load_model(fewer.folder, torch.float32))
    torch.testing.assert_close(logits_of(load_model(plain.folder, torch.float32)), expected, rtol=1e-3, atol=2e-4)


def test_an_export_of_uneven_layers_or_packed_factors_is_refused(factored, sources, lab, tmp_path):
    checkpoint, _ = write(sources("mixtral"), MIXED, tmp_path / "factored")
    uneven = write_edits(checkpoint, [KeepExperts(0, (0, 2, 3))], tmp_path / "uneven")
    with pytest.raises(ValueError, match="differs from a plain model in more than its factors"):
        moe_compress.export(uneven.folder, tmp_path / "plain")
    packed = compressed(f"{RTN} bits=8", factored["same"], lab, out=str(tmp_path / "packed"))
    with pytest.raises(ValueError, match="holds packed factors: export what it was before quantize"):
        moe_compress.export(packed, tmp_path / "plain")
    assert not (tmp_path / "plain").exists() and not (tmp_path / "plain.partial").exists()


# --- beside packed weights ----------------------------------------------------------------------------------


def test_what_is_packed_besides_stays_so(reader_folder, lab, tmp_path):
    sentence = "quantize method=rtn bits=8 group_size=8 clip=max where=all format=compressed-tensors"
    source = open_checkpoint(compressed(sentence, open_checkpoint(reader_folder("mixtral")), lab))
    checkpoint, _ = write(source, {"up": Form(rank=4, core=True)}, tmp_path / "out")
    before, after = moe_compress.load(source.folder, torch.float32), moe_compress.load(checkpoint.folder, torch.float32)
    for index, view in moe_views(after).items():
        assert view.factored
        old, new = (model.model.layers[index].self_attn.q_proj for model in (before, after))
        assert isinstance(new, PackedMatrix) and torch.equal(old.dense(), new.dense())
        torch.testing.assert_close(view.stacks()["down"], moe_views(before)[index].stacks()["down"])
    assert logits_of(after).isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("name", ["same", "other"])
def test_packed_factors_round_what_experts_are_given_and_nothing_behind_it(name, factored, lab, tmp_path):
    """As the same numbers do that are not packed: only what is rounded is multiplied as whole numbers."""
    sentence = f"{RTN} bits=8 group_size=0 + activations where=experts".replace("group_size=8 ", "")
    folder = compressed(sentence, factored[name], lab, out=str(tmp_path / "out"))
    ours, plain = moe_compress.load(folder, torch.float32), moe_compress.load(folder, torch.float32)
    for view in moe_views(plain).values():
        for path, module in list(view.experts.named_modules()):
            if isinstance(module, PackedMatrix):
                holder, _, child = path.rpartition(".")
                view.experts.get_submodule(holder).register_module(child, ExpertMatrix(module.dense(), module.bias))
    found, expected = logits_of(ours), logits_of(plain)
    assert float((found - expected).norm() / expected.norm()) < 1e-4


# --- one layer after the other ------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_layer_is_stored_exactly_and_goes_on_as_it_was_stored(family, dtype, sources, tmp_path):
    """In narrower arithmetic, too; with neurons in another order, whatever is not in factors follows them."""
    source, forms = sources(family), {"gate": Form(rank=4), "up": Form(basis=6)}
    layers = StreamedLayers(source, tiny.CPU, dtype)
    writer = CheckpointWriter(tmp_path / "out", source, "test")
    store, edits, orders, passed = FactoredStore(source, layers, writer), [], {}, {}
    writer.copy(None)
    for index in range(source.num_layers):
        with layers.layer(index) as layer:
            stacks = moe_views(layers.model)[index].stacks()
            found = {part: factors_of(form, tuple(stacks[part].shape), part, index) for part, form in forms.items()}
            orders[index] = torch.rand(tiny.EXPERTS, tiny.INNER).argsort(1)
            permute_neurons(moe_view(layer, family_of(source.config)), orders[index])
            edits.append(store.write(index, layer, found, orders[index]))
            passed[index] = {part: stack.clone() for part, stack in moe_views(layers.model)[index].stacks().items()}
        assert layers.model.model.layers[index].mlp.experts.down_proj.is_meta
    writer.finish(resulting_config(source.values, edits).values, {})
    model, before = load_model(tmp_path / "out", torch.float32), original(source)
    for index, view in moe_views(model).items():
        down = moe_views(before)[index].stacks()["down"]
        expected = torch.stack([down[e][:, orders[index][e]] for e in range(tiny.EXPERTS)])
        assert torch.equal(view.stacks()["down"], expected)
        query = [each.model.layers[index].self_attn.q_proj.weight for each in (model, before)]
        assert torch.equal(*query)
        for part, stack in view.stacks().items():
            torch.testing.assert_close(passed[index][part], stack.to(dtype), rtol=1e-5, atol=1e-6)
        if family == "gpt_oss":
            bias = halves(moe_views(before)[index].experts, moe_views(before)[index].experts.gate_up_proj_bias)[0]
            for number, expert in enumerate(view.experts.separate):
                assert torch.equal(expert["w_switch"].bias, bias[number][orders[index][number]])


# --- stages behind it ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sentence", ["expert_drop keep=6 score=reap", "layer_drop layers=1", "expert_drop keep=6 novice=mean"]
)
def test_stages_that_only_leave_out_follow(sentence, factored, lab):
    checkpoint = open_checkpoint(compressed(sentence, factored["same"], lab))
    model = moe_compress.load(checkpoint.folder, torch.float32)
    assert all(view.factored for view in moe_views(model).values()) and logits_of(model).isfinite().all()


@pytest.mark.parametrize("sentence", ["expert_merge keep=4", "channels keep=16"])
def test_stages_that_change_whole_matrices_are_refused(sentence, factored, lab):
    with pytest.raises(ValueError, match="its experts are held in factors, and have to be whole matrices") as caught:
        compressed(sentence, factored["same"], lab)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [lambda mask: mask.zero_(), lambda mask: mask[0].bitwise_xor_(1)])
def test_a_mask_that_does_not_fit_its_values_is_refused(change, sources, tmp_path):
    checkpoint, _ = write(sources("mixtral"), {"up": Form(rank=4, residue=3)}, tmp_path / "broken")
    file = next(
        path
        for path in sorted(checkpoint.folder.glob("*.safetensors"))
        if "residue.mask" in path.read_bytes().decode("latin1")
    )
    tensors = load_file(file)
    change(next(tensor for name, tensor in tensors.items() if name.endswith("residue.mask")))
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match="does not name 3 places in every row"):
        load_model(checkpoint.folder, torch.float32)
    with pytest.raises(ValueError, match=r"layer 0: the mask of .* does not name 3 places"):
        moe_compress.export(checkpoint.folder, out=tmp_path / "out")
