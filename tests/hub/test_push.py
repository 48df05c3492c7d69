"""Pushing to the hub: what would be sent, what is not said of this machine, and what a hub of our own is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub.errors import LocalTokenNotFoundError

import moe_compress
from moe_compress.checkpoints.reader import open_checkpoint
from moe_compress.cli.commands import main
from moe_compress.hub import push

REPO = "me/tiny-half"


@pytest.fixture
def made(reader_folder, options) -> Path:
    words = {**options, "eval": False}
    folder = moe_compress.compress(
        "expert_drop budget=global keep=5", model=str(reader_folder("mixtral")), **words
    ).folder
    assert folder is not None
    return folder


def test_a_dry_run_says_what_would_be_sent_and_hides_this_machine(made, reader_folder, options):
    before = {path.name: path.read_bytes() for path in made.iterdir()}
    found = moe_compress.push(made, REPO, dry_run=True)
    assert found.url is None and set(found.sizes) == set(before)
    assert {path.name: path.read_bytes() for path in made.iterdir()} == before
    base, text = reader_folder("mixtral"), Path(str(options["data"]))
    assert set(found.rewritten) == {"README.md", "moe_compress.json", "plan.json", "recipe.yaml"}
    for name, content in found.rewritten.items():
        assert str(base).encode() not in content and str(text).encode() not in content
        assert found.sizes[name] == len(content)
    assert json.loads(found.rewritten["moe_compress.json"])["base"]["model"] == base.name
    assert yaml.safe_load(found.rewritten["recipe.yaml"])["data"] == text.name
    card = found.rewritten["README.md"].decode()
    assert f"from_pretrained('{REPO}'" in card and "\n# tiny-half\n" in card and made.name not in card
    said = found.markdown()
    assert f"{made} -> {REPO} (public)" in said and "Nothing was sent" in said
    assert "The card has no numbers" in said and "trust_remote_code" in said


def test_a_link_out_of_the_folder_is_not_sent(made, tmp_path):
    (tmp_path / "private").write_text("secret", encoding="utf-8")
    (made / "notes.txt").symlink_to(tmp_path / "private")
    with pytest.raises(ValueError, match=r"notes.txt leads out of its folder"):
        moe_compress.push(made, REPO, dry_run=True)


def test_what_is_rewritten_still_loads(made, tmp_path):
    found = moe_compress.push(made, REPO, dry_run=True)
    for name in found.sizes:
        (tmp_path / name).write_bytes(found.rewritten.get(name) or (made / name).read_bytes())
    assert open_checkpoint(tmp_path).num_layers == open_checkpoint(made).num_layers
    moe_compress.load(str(tmp_path))


class Hub:
    """Stands in for the hub's client; keeps what it is asked for."""

    def __init__(self, error: Exception | None = None) -> None:
        self.asked: list[tuple] = []
        self.error = error

    def whoami(self) -> None:
        if self.error is not None:
            raise self.error

    def create_repo(self, repo: str, **words: object) -> None:
        self.asked.append((repo, words))

    def create_commit(self, repo: str, operations: list, **words: object) -> SimpleNamespace:
        self.asked.append((repo, words, {each.path_in_repo: each for each in operations}))
        return SimpleNamespace(commit_url="https://hub/commit/1")


def test_one_commit_with_everything(made, monkeypatch):
    hub = Hub()
    monkeypatch.setattr(push, "HfApi", lambda: hub)
    monkeypatch.setattr(push, "hub_answers", lambda: True)
    (made / ".hidden").write_text("x")
    (made / "notes").mkdir()
    found = moe_compress.push(made, REPO, private="true", message="half", revision="main")
    created, (repo, words, sent) = hub.asked
    assert created == (REPO, {"private": True, "exist_ok": True}) and repo == REPO
    assert words == {"commit_message": "half", "revision": "main"} and set(sent) == set(found.sizes)
    assert sent["recipe.yaml"].path_or_fileobj == found.rewritten["recipe.yaml"]
    assert sent["config.json"].path_or_fileobj == str(made / "config.json") and ".hidden" not in sent
    assert found.url == "https://hub/commit/1" and "uploaded: https://hub/commit/1" in found.markdown()
    assert "Folders stay here: notes." in found.markdown()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (LocalTokenNotFoundError("no token"), "nobody is logged in to the hub: run `hf auth login`"),
        (RuntimeError("gone"), r"the upload broke off \(RuntimeError: gone\)"),
    ],
)
def test_a_hub_that_refuses_is_one_sentence(made, monkeypatch, error, said):
    monkeypatch.setattr(push, "HfApi", lambda: Hub(error))
    monkeypatch.setattr(push, "hub_answers", lambda: True)
    with pytest.raises(ValueError, match=said):
        moe_compress.push(made, REPO)
    monkeypatch.setattr(push, "hub_answers", lambda: False)
    with pytest.raises(ValueError, match="the hub cannot be reached: --dry-run"):
        moe_compress.push(made, REPO)


def test_what_cannot_be_pushed(made, reader_folder, monkeypatch, capsys):
    with pytest.raises(ValueError, match="was not made by moe-compress"):
        moe_compress.push(reader_folder("mixtral"), REPO, dry_run=True)
    for name in ("half", "a/b/c", "me/bad name", "me/", "../x"):
        with pytest.raises(ValueError, match="write user/name"):
            moe_compress.push(made, name, dry_run=True)
    monkeypatch.setattr("sys.argv", ["moe-compress", "push", str(made)])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "push FOLDER USER/NAME" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["moe-compress", "push", str(made), REPO, "--dry-run"])
    with pytest.raises(SystemExit, match="0"):
        main()
    assert "Nothing was sent" in capsys.readouterr().out
