"""Code of a checkpoint is run where it is this package's, or trusted on the command line, and nowhere else."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import moe_compress
from moe_compress.checkpoints.load import load_tokenizer
from moe_compress.checkpoints.reader import open_checkpoint
from moe_compress.cli.commands import main
from moe_compress.evaluation.verification.verify import verification
from moe_compress.models import hf
from moe_compress.models.hf import shipped_code
from moe_compress.recipes.parser import parse
from support import readers

UNEVEN = "expert_drop keep=6 budget=global score=random seed=1"
TOKENIZER = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast
from .own_words import MARK
MARK.write_text("was run")
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def edited(reader_folder, options, tmp_path) -> Callable[[str], Path]:
    """A copy of an edited checkpoint, the name of a file in it that a line is added to ("" for none)."""
    made = moe_compress.compress(UNEVEN, model=reader_folder("mixtral"), **{**options, "eval": False}).folder
    assert made is not None and (made / "modeling_moe_compress.py").is_file()

    def copy(changed: str) -> Path:
        folder = tmp_path / "copy"
        shutil.copytree(made, folder)
        if changed:
            with (folder / changed).open("a", encoding="utf-8") as file:
                file.write(marking(tmp_path / "mark"))
        return folder

    return copy


def marking(mark: Path) -> str:
    return f"\nimport pathlib; pathlib.Path({str(mark)!r}).write_text('was run')\n"


@pytest.mark.parametrize("name", ["modeling_moe_compress.py", "edit_layer.py"])
def test_a_changed_modelling_file_is_not_run(name, edited, tmp_path):
    found = verification(open_checkpoint(edited(name)))
    assert not found.passed and not (tmp_path / "mark").exists()
    assert found.problems == [f"{name} is not the file that moe-compress ships: code of a checkpoint runs only with "
                              "trust_remote_code=true; read it first"]  # fmt: skip


def test_a_generate_of_its_own_or_another_auto_map_is_not_run(edited, tmp_path):
    folder = edited("")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(marking(tmp_path / "mark"), encoding="utf-8")
    assert "custom_generate is no part of it" in verification(open_checkpoint(folder)).problems[0]
    shutil.rmtree(folder / "custom_generate")
    (folder / "other.py").write_text(marking(tmp_path / "mark"), encoding="utf-8")
    values = json.loads((folder / "config.json").read_text())
    values["auto_map"]["AutoModelForCausalLM"] = "other.MixtralForCausalLM"
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    assert "auto_map of config.json leads elsewhere" in verification(open_checkpoint(folder)).problems[0]
    assert not (tmp_path / "mark").exists()


def test_a_plain_checkpoint_that_calls_itself_edited_runs_nothing(reader_folder, tmp_path):
    folder = tmp_path / "plain"
    shutil.copytree(reader_folder("mixtral"), folder)
    (folder / "modeling_own.py").write_text(marking(tmp_path / "mark"), encoding="utf-8")
    values = json.loads((folder / "config.json").read_text())
    values |= {
        "moe_compress": {"edits": [], "moe": {}, "base_model_type": "mixtral", "base_architectures": None},
        "auto_map": {"AutoConfig": "modeling_own.Config", "AutoModelForCausalLM": "modeling_own.Model"},
    }
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ValueError, match="model_type is not moe_compress_mixtral"):
        verification(open_checkpoint(folder))
    assert not (tmp_path / "mark").exists()


@pytest.mark.slow  # what is not trusted is refused above; this one starts a process and loads a model twice
def test_what_is_trusted_on_the_command_line_is_run(edited, tmp_path):
    found = verification(open_checkpoint(edited("edit_layer.py")), trust_remote_code=True)
    assert found.passed and (tmp_path / "mark").read_text() == "was run"


def test_files_of_a_listed_earlier_version_are_ours(edited, monkeypatch):
    folder = edited("edit_layer.py")
    values = json.loads((folder / "config.json").read_text())
    files = {path.name: hashlib.sha256((folder / path.name).read_bytes()).hexdigest() for path in shipped_code.SHIPPED}
    assert hf.foreign_code(folder, values) == "edit_layer.py is not the file that moe-compress ships"
    monkeypatch.setattr(shipped_code, "EARLIER", (shipped_code.Version("edited_model", files),))
    assert hf.foreign_code(folder, values) == ""


@pytest.fixture
def coded(reader_folder, tmp_path) -> Path:
    """A checkpoint whose tokenizer is code that leaves a mark."""
    folder = tmp_path / "coded"
    shutil.copytree(reader_folder("mixtral"), folder)
    (folder / "tokenization_own.py").write_text(TOKENIZER, encoding="utf-8")
    (folder / "own_words.py").write_text(f"from pathlib import Path\nMARK = Path({str(tmp_path / 'mark')!r})\n")
    values = json.loads((folder / "tokenizer_config.json").read_text())
    values |= {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(values), encoding="utf-8")
    return folder


def test_a_tokenizer_that_is_code_is_refused_and_asks_nobody(coded, tmp_path, monkeypatch, capsys):
    """Stock transformers would ask on the terminal, and take a `y` from whatever stands there."""
    config = json.loads((coded / "config.json").read_text()) | {"model_type": "mixtral"}
    (coded / "config.json").write_text(json.dumps(config), encoding="utf-8")
    words = ["compress", "expert_drop keep=6", f"model={coded}", "eval=false", f"results={tmp_path / 'results'}"]
    monkeypatch.setattr(sys, "argv", ["moe-compress", *words])
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and not (tmp_path / "mark").exists(), capsys.readouterr()
    assert sys.stdin.read() == "y\n"


def test_a_tokenizer_s_code_goes_with_the_checkpoint(coded, options, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    made = moe_compress.compress("expert_drop score=weight_norm keep=6", model=coded, **{**options, "eval": False})
    assert made.folder is not None
    for name in ("tokenization_own.py", "own_words.py"):
        assert (made.folder / name).read_bytes() == (coded / name).read_bytes()
    assert not (tmp_path / "mark").exists()
    tokenizer = load_tokenizer(made.folder, readers.VOCAB, trust_remote_code=True)
    assert type(tokenizer).__name__ == "OwnTokenizer" and (tmp_path / "mark").exists()


def test_a_recipe_file_trusts_nobody(tmp_path):
    (tmp_path / "recipe.yaml").write_text("stages: [expert_drop]\ntrust_remote_code: true\n", encoding="utf-8")
    with pytest.raises(ValueError, match="trust_remote_code is said on the command line, not by a recipe file"):
        parse(str(tmp_path / "recipe.yaml"))
    assert "trust" not in parse("expert_drop", ("trust_remote_code=true",)).to_yaml()
