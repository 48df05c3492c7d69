"""The command line's answers to mistakes: one sentence, its own exit code, no traceback but of our own mistakes."""

from __future__ import annotations

import sys

import pytest
import torch

import moe_compress
from moe_compress.cli.commands import main


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["compress", "exper_drop", "model=tiny-mixtral"], "unknown method 'exper_drop': did you mean 'expert_drop'?"),
        (["compress", "expert_drop", "keep=1", "model=MODEL"], "keep=1 is fewer than the 2 experts"),
        (["compress", "recipe.yaml"], "there is no recipe file recipe.yaml."),
        (["plan", "expert_drop", "model=nowhere"], "there is no model 'nowhere'."),
        (["apply", "plan.json"], "there is no file plan.json."),
        (["apply", "plan.json", "colour=red"], "unknown key 'colour'"),
        (["evaluate", "MODEL", "eval_data=nope.txt"], "there is no file nope.txt."),
        (["evaluate", "MODEL", "eval_sample=3"], "unknown key 'eval_sample': did you mean 'eval_samples'?"),
        (
            ["evaluate", "MODEL", "samples=3"],
            "evaluate would do nothing with samples=; what it uses: original, eval_data",
        ),
        (["evaluate", "MODEL", "out=here"], "evaluate would do nothing with out=; what it uses: "),
        (["evaluate", "MODEL", "seed=1", "seed=2"], "seed= is given twice."),
        (["apply", "plan.json", "data=zoo"], "apply would do nothing with data=; what it uses: any_model, eval_data"),
        (["routing", "MODEL", "data=zoo"], "routing would do nothing with data=; what it uses: original, eval_data"),
        (
            ["tasks", "MODEL", "eval_samples=3"],
            "tasks would do nothing with eval_samples=; what it uses: tasks, original",
        ),
        (["analyze", "MODEL", "eval_data=zoo"], "analyze would do nothing with eval_data=; what it uses: layers"),
        (
            ["compare", "MODEL", "MODEL", "resident=true"],
            "compare would do nothing with resident=; what it uses: prompts",
        ),
        (["data", "show", "MODEL", "device=cpu"], "data show would do nothing with device=; what it uses: documents"),
        (
            ["export", "imatrix", "MODEL", "mix=a:1"],
            "export imatrix would do nothing with mix=; what it uses: out, data",
        ),
        (["evaluate", "MODEL", "resident"], "'resident' is not key=value"),
        (["analyze", "MODEL", "threshold=nan"], "threshold=nan: a cosine from -1 to 1 is needed"),
        (["analyze", "MODEL", "threshold=-2"], "threshold=-2.0: a cosine from -1 to 1 is needed"),
        (["analyze", "MODEL", "threshold=5"], "threshold=5.0: a cosine from -1 to 1 is needed"),
        (["table", "none.json"], "there is no record or folder of records none.json"),
    ],
)
def test_the_command_line_says_one_sentence(words, said, reader_folder, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = [word.replace("MODEL", str(reader_folder("mixtral"))) for word in words]
    monkeypatch.setattr(sys, "argv", ["moe-compress", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    assert shown.err.startswith("error: ") and said in shown.err
    assert list(tmp_path.iterdir()) == []


def test_what_is_removed_meanwhile_is_a_sentence(monkeypatch, capsys):
    def gone(*_: object) -> None:
        raise FileNotFoundError(2, "No such file or directory", "runs/out.partial/state.json")

    monkeypatch.setattr(moe_compress.api, "run_recipe", gone)
    monkeypatch.setattr(sys, "argv", ["moe-compress", "compress", "expert_drop", "model=tiny-mixtral"])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1
    assert "out.partial/state.json': it was removed while it was used; run the same command again." in said


@pytest.mark.parametrize(
    ("words", "said"),
    [(["compres"], "No such command 'compres'. Did you mean 'compress'"), (["compress"], "Missing argument 'WORDS'")],
)
def test_the_command_line_s_own_mistakes(words, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["moe-compress", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted: the same command goes on from whatever was kept."),
        (PermissionError(13, "Permission denied", "results"), 2, "error: [Errno 13] Permission denied: 'results'"),
        (MemoryError("too much"), 2, "error: too much Use fewer or shorter windows, or device=cpu."),
        (torch.OutOfMemoryError("CUDA out of memory."), 2, "error: CUDA out of memory. Use fewer or shorter windows"),
    ],
)
def test_what_happens_to_the_command_line(error, code, said, monkeypatch, capsys):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(moe_compress.api, "run_recipe", fail)
    monkeypatch.setattr(sys, "argv", ["moe-compress", "compress", "expert_drop"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == code and said in capsys.readouterr().err


def test_our_own_mistakes_keep_their_traceback(monkeypatch):
    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(moe_compress.api, "run_recipe", fail)
    monkeypatch.setattr(sys, "argv", ["moe-compress", "compress", "expert_drop"])
    with pytest.raises(RuntimeError, match="a bug"):
        main()
