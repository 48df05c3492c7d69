"""Every kind of edit on every family: a written checkpoint is the model edited in memory."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from safetensors.torch import save_file

from moe_compress.checkpoints.load import load_model
from moe_compress.checkpoints.reader import open_checkpoint
from moe_compress.edits.apply import check_edits
from moe_compress.models import hf
from support import readers, tiny
from support.edit_kinds import EDITED_BLOCK_DROP, EXPERTS_ONLY, KINDS, REFUSED, SHIPPED, edits_of, is_edited
from support.editing import IDS, cut, greedy, logits_of, make, write
from support.slow import each_once, slow_unless
from support.stock_process import STRANGER, generated, stranger

once = each_once(tiny.EDITABLE, KINDS)


@pytest.mark.parametrize(
    ("family", "kind"),
    slow_unless(lambda family, kind: family == "mixtral" or once(family, kind), tiny.EDITABLE, KINDS),
)
def test_a_written_checkpoint_is_the_model_edited_in_memory(family, kind, sources, written):
    source = sources(family)
    edits = edits_of(kind, source)
    if (family, kind) in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[family, kind]):
            check_edits(hf.skeleton(source.config, torch.float32), edits)
        return
    checkpoint = written(family, kind)
    edited = "moe_compress" in checkpoint.values
    assert edited is is_edited(family, kind)
    assert sorted(path.name for path in checkpoint.folder.glob("*.py")) == (SHIPPED if edited else [])
    model = load_model(checkpoint.folder, torch.float32)
    assert isinstance(model, type(make(family))) and (type(model) is type(make(family))) is not edited
    logits = logits_of(model)
    assert logits.isfinite().all() and torch.equal(logits, logits_of(cut(source, edits)))
    if kind not in EXPERTS_ONLY:  # with a cache as without
        assert torch.equal(generated(model), greedy(model, tiny.token_ids(2, 18), 3, never=model.config.eos_token_id))


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_all_kinds_load_and_generate_where_the_package_is_unknown(every, written, tmp_path):
    """Every kind of one family, and a few of the others; or of all."""
    expected, folders = {}, {}
    families = ("mixtral", "deepseek_v3", "gpt_oss", "minimax", "jamba", "dbrx")
    few = each_once(families, KINDS)
    for family, kind in itertools.product(families, KINDS):
        chosen = every or family == "mixtral" or few(family, kind) or (family, kind) in EDITED_BLOCK_DROP
        if chosen and (family, kind) not in REFUSED and is_edited(family, kind):
            name, folder = f"{family} {kind}", written(family, kind).folder
            model = load_model(folder, torch.float32)
            folders[name], expected[name] = str(folder), logits_of(model)
            expected[f"{name} generated"] = generated(model)
    assert {name.partition(" ")[2] for name in folders} == {*KINDS} - {"merge centroid", "top_k"}
    save_file(expected, tmp_path / "expected.safetensors")
    ids = json.dumps([IDS.tolist(), tiny.token_ids(2, 18).tolist()])
    done = stranger(
        "-c", STRANGER, json.dumps(folders), str(tmp_path / "expected.safetensors"), ids, home=tmp_path / "hf"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [str(len(folders))]


TASK = """task: tiny_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""


@pytest.mark.slow
def test_lm_eval_runs_an_edited_checkpoint(reader_folder, tmp_path):
    """The fast test above loads and generates where the package is unknown, which is all that it needs."""
    pytest.importorskip("lm_eval")
    source = open_checkpoint(reader_folder("mixtral"))
    checkpoint = write(source, edits_of("mixed", source), tmp_path / "model")
    (tmp_path / "tasks").mkdir()
    text = "".join(json.dumps({"text": line}) + "\n" for line in readers.LINES)
    (tmp_path / "tasks" / "text.jsonl").write_text(text)
    (tmp_path / "tasks" / "tiny_text.yaml").write_text(TASK.format(path=tmp_path / "tasks" / "text.jsonl"))
    words = ["--model", "hf", "--model_args", f"pretrained={checkpoint.folder},trust_remote_code=True,dtype=float32"]
    words += ["--tasks", "tiny_text", "--include_path", str(tmp_path / "tasks"), "--device", "cpu"]
    done = stranger("-m", "lm_eval", *words, "--output_path", str(tmp_path / "results"), home=tmp_path / "hf")
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = (tmp_path / "results").rglob("*.json")
    found = json.loads(path.read_text())["results"]["tiny_text"]["bits_per_byte,none"]
    model, tokenizer = load_model(checkpoint.folder, torch.float32), readers.tokenizer()
    bits, count = 0.0, 0
    for line in readers.LINES:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(line, add_special_tokens=False)["input_ids"]]])
        chosen = logits_of(model, ids)[0, :-1].double().log_softmax(-1).gather(1, ids[0, 1:, None])
        bits, count = bits - float(chosen.sum()) / math.log(2), count + len(line.encode())
    assert found == pytest.approx(bits / count, rel=1e-4)


PADDED = ("mixtral", "gpt_oss", "deepseek_v2", "afmoe", "granitemoeshared")
LOST = ("skip attention", "skip moe", "drop first")


@torch.no_grad()
@pytest.mark.parametrize(("family", "kind"), slow_unless(each_once(PADDED, LOST), PADDED, LOST))
def test_padded_rows_generate_what_they_generate_alone(family, kind, sources):
    source = sources(family)
    model = cut(source, edits_of(kind, source))
    ids = tiny.token_ids(2, 12)
    short = ids[1:, 5:]
    padded = ids.clone()
    padded[1, :5] = 0
    mask = (padded != 0).long()
    words = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    made = model.generate(padded, attention_mask=mask, **words)
    assert torch.equal(made[:1, 12:], model.generate(ids[:1], **words)[:, 12:])
    assert torch.equal(made[1:, 12:], model.generate(short, **words)[:, 7:])


PAIRS = (
    ("skip moe", "drop first"), ("drop first", "top_k of one"), ("merge sum", "drop first"),
    ("novices", "skip experts"), ("skip attention", "drop first"), ("skip experts", "merge sum"),
    ("mixed", "drop first"),
)  # fmt: skip
COMPOSED = ("mixtral", "deepseek_v3", "ernie4_5_moe")


@pytest.mark.parametrize(("family", "pair"), slow_unless(each_once(COMPOSED, PAIRS), COMPOSED, PAIRS))
def test_edits_of_an_edited_checkpoint_compose(family, pair, sources, written, tmp_path):
    first, second = pair
    source, before = sources(family), written(family, first)
    later = edits_of(second, before)
    again = write(before, later, tmp_path / "again")
    at_once = write(source, [*edits_of(first, source), *later], tmp_path / "at once")
    with again.read(again.tensors) as one, at_once.read(at_once.tensors) as other:
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name][...], other[name][...]) for name in one)
    assert ("moe_compress" in again.values) is ("moe_compress" in at_once.values)
    if "moe_compress" in before.values:  # else what came first is in the ordinary keys
        assert again.values == at_once.values
    models = [load_model(checkpoint.folder, torch.float32) for checkpoint in (again, at_once)]
    assert torch.equal(*map(logits_of, models))
