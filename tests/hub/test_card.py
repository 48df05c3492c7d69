"""Model cards that come with checkpoints: what they say, of broken records and of the licence too."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
import yaml

import moe_compress
from moe_compress.cli.commands import main
from moe_compress.hub.card import licence_of, model_card
from moe_compress.reports.record import Metric
from moe_compress.reports.table import SAME
from support.records import ORIGINAL, SAME_AS


@pytest.fixture
def made(reader_folder, options) -> Path:
    folder = moe_compress.compress("expert_drop keep=6", model=str(reader_folder("mixtral")), **options).folder
    assert folder is not None
    return folder


def test_a_checkpoint_comes_with_its_card(made):
    card = (made / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert {"mixture-of-experts", "expert_drop"} <= set(head["tags"]) and head["license"] == "other"
    assert "keep=6" in card and "from_pretrained" in card and "| delta_nll |" in card and "| routing_overlap |" in card


def test_a_card_before_and_after_an_evaluation(reader_folder, options):
    words = {**options, "model": str(reader_folder("mixtral"))}
    folder = moe_compress.compress("quantize method=rtn group_size=8 format=packed", **{**words, "eval": False}).folder
    before = (folder / "README.md").read_text()
    assert re.search(r"\| bytes of weights \| [\d,]+ \| [\d,]+ \|", before) and "FLOPs per token" not in before
    assert "| kl |" not in before and "trust_remote_code=True" in before and "moe_compress.load" in before
    told = {key: value for key, value in options.items() if key not in ("data", "samples")}
    moe_compress.evaluate(folder, **told)
    after = (folder / "README.md").read_text()
    assert "| kl |" in after and before.split("## How to load it")[0] == after.split("## How to load it")[0]
    (folder / "README.md").write_text("mine\n")
    moe_compress.evaluate(folder, **told)
    assert (folder / "README.md").read_text() == "mine\n"


def test_few_documents_and_several_texts_are_said(made, options, tmp_path, caplog):
    texts = [tmp_path / name for name in ("one.txt", "two.txt")]
    for text in texts:
        text.write_text("a few words of text that are said again and again. " * 20)
    logging.getLogger("moe_compress").propagate = True
    told = {**options, "eval_data": ",".join(map(str, texts))}
    record = moe_compress.evaluate(made, **told).record
    assert "the text has 2 documents: intervals of fewer than 20 are too narrow." in caplog.text
    assert {"delta_nll_one.txt", "perplexity_two.txt"} <= set(record.metrics)
    notes = moe_compress.push(made, "me/mine", dry_run=True).notes
    assert any(
        re.search(r"those of the latest evaluation, on [\d,]+ held-out tokens of one.txt,two.txt\.", n) for n in notes
    )


def run(words: list[str], monkeypatch, capsys) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", ["moe-compress", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0), capsys.readouterr().err


def test_tables_and_the_page_leave_broken_records_out_and_say_so(made, options, monkeypatch, capsys, tmp_path):
    records, out = Path(str(options["results"])) / "records", tmp_path / "made"
    for command, files in (("table", {"tables.md", "tables.tex", "tables.json"}), ("report", {"report.html"})):
        code, said = run([command, str(records), f"out={out}"], monkeypatch, capsys)
        assert code == 0 and "written:" in said and files <= {path.name for path in out.iterdir()}
    path = next(path for path in records.iterdir() if "original" not in path.name)
    values = json.loads(path.read_text())
    values["metrics"]["kl"]["value"] = 0.0
    path.write_text(json.dumps(values))
    for command in ("table", "report"):
        code, said = run([command, str(records), f"out={out}"], monkeypatch, capsys)
        assert code == 1 and path.name in said and "changed after it was written" in said
    code, said = run(["report", str(tmp_path / "nowhere")], monkeypatch, capsys)
    assert code == 2 and "there is no record or folder of records" in said


MANIFEST = {
    "identity": "1d",
    "base": {"model": "/home/me/secret/Base-8x7B", "commit": None, "fingerprint": "f0"},
    "form": "plain",
    "stages": [{"method": "expert_drop", "given": {"keep": 6}, "parameters": {}}],
    "report": [{"method": "expert_drop", "calibration": {"hash": "ca11"}}, {"method": "x", "calibration": {}}],
}
ON_HUB = {**MANIFEST, "base": {"model": "org/Base-8x7B", "commit": "c0", "fingerprint": "f0"}, "form": "edited"}
QUANTIZED = {**ON_HUB, "stages": [{"method": "quantize", "given": {}, "parameters": {}}]}


def head_of(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_a_card_of_a_plain_checkpoint():
    card = model_card(MANIFEST, SAME_AS, ORIGINAL, name="mine")
    assert head_of(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mixture-of-experts", "moe-compress", "expert_drop"],
    }
    assert "secret" not in card and "`Base-8x7B`" in card and "    expert_drop keep=6" in card
    assert 'AutoModelForCausalLM.from_pretrained("mine")' in card.replace("'", '"') and "trust_remote_code" not in card
    assert f"+0.0010 [-0.0090, +0.0110], {SAME}" in card and "| bytes of weights | 2,097,152 | 4,194,304 |" in card
    for known in ("`1d`", "`f0`", "`ca11`"):
        assert known in card
    assert "does not say here what it is" in card
    change = Metric(value=0.01, unit="nats/token", interval=(-0.01, 0.03))
    several = SAME_AS.model_copy(update={"metrics": {**SAME_AS.metrics, "delta_nll_b.txt": change}})
    card = model_card(MANIFEST, several, ORIGINAL, name="mine")
    assert f"| delta_nll_b.txt | +0.0100 [-0.0100, +0.0300], {SAME} |" in card


def test_a_card_says_whether_it_was_trained():
    recovered = {**MANIFEST, "report": [*MANIFEST["report"], {"method": "distill", "teacher": "Base-8x7B"}]}
    assert "was not trained afterwards" in model_card(MANIFEST, name="mine")
    assert "It was trained afterwards, on calibration text alone" in model_card(recovered, name="mine")


def test_a_card_of_an_edited_and_packed_one():
    base_card = "---\nlicense: other\nlicense_name: llama\nlicense_link: LICENSE\ntags: [a]\n---\n# Base\n"
    card = model_card(QUANTIZED, name="org/mine", packed=True, base_card=base_card)
    head = head_of(card)
    assert head["base_model"] == "org/Base-8x7B" and head["base_model_relation"] == "quantized"
    assert head["license_name"] == "llama" and "custom_code" in head["tags"]
    assert "trust_remote_code=True" in card and "moe_compress.load" in card and "packed" in card
    assert "What it cost" not in card and "commit of the original: `c0`" in card and "`org/Base-8x7B`: llama" in card
    assert "base_model_relation" not in head_of(model_card(ON_HUB, name="x"))


@pytest.mark.parametrize(
    ("card", "text", "known"),
    [
        ("", "", {}),
        ("---\nlicense: mit\n---\n", "Apache License", {"license": "mit"}),
        ("# no head\n", "\n   Apache License\n  Version 2.0", {"license": "apache-2.0"}),
        ("---\n: [\n---\n", "something else", {"license": "other"}),
        ("---\n- a list\n---\n", "", {}),
    ],
)
def test_the_licence_is_that_of_the_base(card, text, known):
    assert licence_of(card, text) == known
