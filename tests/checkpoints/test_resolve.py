"""Models that are not there, not the hub's, or out of reach."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

import moe_compress
from moe_compress.checkpoints import resolve
from moe_compress.cli.terminal import set_up_logging
from moe_compress.utils import files


def test_unknown_models_are_named(refused, tmp_path):
    assert "Did you mean 'tiny-mixtral'?" in refused(model="tiny-mixtrel")
    assert "there is no model" in refused(model=tmp_path / "nowhere")
    assert "there is no model ''" in refused(model="")
    (tmp_path / "file").write_text("")
    assert "is not a folder" in refused(model=tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "holds no config.json" in refused(model=tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{")
    assert "is not valid JSON" in refused(model=tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("[]")
    assert "config.json" in refused(model=tmp_path / "empty")


def test_the_hub_is_out_of_reach(refused, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**50))
    said = refused(model="nobody/nothing")
    assert "there is no folder nobody/nothing here, and it could not be fetched from the hub" in said
    assert "is neither a folder here nor a valid hub id" in refused(model="no body/nothing")
    assert "could not be fetched" in refused(model="mistralai/Mixtral-8x7B-v0.1", data="zoo", eval_data="zoo")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (GatedRepoError, "some/model is gated: accept its licence on the hub, then log in with `hf auth login`."),
        (RepositoryNotFoundError, "the hub has no such model or keeps it private"),
        (RevisionNotFoundError, "some/model has no revision 'x'."),
    ],
)
def test_what_the_hub_refuses_is_said(kind, said, refused, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise kind("no", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(resolve, "hf_hub_download", refuse)
    assert said in refused(model="some/model", revision="x")


def test_a_revision_belongs_to_the_hub(reader_folder, refused):
    assert "belongs to a hub model" in refused(model=reader_folder("mixtral"), revision="main")


def test_a_mistyped_hub_id_is_answered_at_once(monkeypatch):
    asked = []

    def unreachable() -> None:
        asked.append(1)
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(resolve, "get_session", unreachable)
    with pytest.raises(ValueError, match=r"Did you mean 'mistralai/Mixtral-8x7B-v0\.1'\?"):
        moe_compress.plan("expert_drop", model="mistralai/mixtral-8x7b-v0.1")
    with pytest.raises(ValueError, match=r"or use a local folder\.$"):
        moe_compress.plan("expert_drop", model="nobody/nothing")
    assert len(asked) == 2
    real = logging.getLogger("moe_compress")
    kept = real.handlers, real.propagate, real.level
    set_up_logging(verbose=False)
    assert not logging.getLogger("huggingface_hub.utils._http").isEnabledFor(logging.WARNING)
    real.handlers, real.propagate, real.level = kept


def test_the_hub_is_not_asked_where_it_does_not_answer(monkeypatch):
    given = {}
    monkeypatch.setattr(resolve, "hf_hub_download", lambda *_, **words: given.update(words) or "/nowhere/config.json")
    for answers in (True, False):
        monkeypatch.setattr(resolve, "hub_answers", lambda answers=answers: answers)
        resolve.config_folder("some/model")
        assert given["local_files_only"] is not answers
