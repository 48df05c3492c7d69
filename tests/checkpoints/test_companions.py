"""Files that go with the weights arrive, whatever their case; links out of the folder do not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import moe_compress
from moe_compress.checkpoints.companions import companions
from support.interrupted import leftovers

EXTRA = (
    "additional_chat_templates/tool_use.jinja", "THIRD_PARTY_NOTICES.md", "License.md", "COPYING",
    "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json", "qwen.tiktoken",
    "Acceptable_Use_Policy.txt", "tokenization_own.py", "tool_declaration.py",
)  # fmt: skip
OTHERS = ("modeling_own.py", "configuration_own.py", "notes.txt", "model.gguf", "README.md", "training_args.bin")


@pytest.fixture
def rich(reader_folder, tmp_path) -> Path:
    folder = tmp_path / "rich"
    shutil.copytree(reader_folder("mixtral"), folder)
    (folder / "additional_chat_templates").mkdir()
    for name in (*EXTRA, *OTHERS):
        (folder / name).write_text("{}", encoding="utf-8")
    return folder


def test_what_goes_with_the_weights_arrives_and_nothing_else(rich, options):
    made = moe_compress.compress(
        "expert_drop score=weight_norm keep=6", model=rich, **{**options, "eval": False}
    ).folder
    assert made is not None
    assert all((made / name).read_text(encoding="utf-8") == "{}" for name in EXTRA)
    assert not any((made / name).is_file() and (made / name).read_text() == "{}" for name in OTHERS)


def test_a_link_out_of_the_folder_is_refused_by_name(rich, options, tmp_path):
    (tmp_path / "private").write_text("secret", encoding="utf-8")
    (rich / "LICENSE").unlink()
    (rich / "LICENSE").symlink_to(tmp_path / "private")
    with pytest.raises(ValueError, match=r"rich/LICENSE leads out of its folder, to .*private: put the file itself"):
        moe_compress.compress("expert_drop score=weight_norm keep=6", model=rich, **{**options, "eval": False})
    assert leftovers(Path(str(options["results"]))) == []
    (rich / "LICENSE").unlink()
    (rich / "LICENSE").symlink_to("License.md")
    assert rich / "LICENSE" in companions(rich)


def test_links_of_the_hub_s_cache_lead_to_its_blobs(tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "abc").write_text("{}", encoding="utf-8")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/abc")
    assert companions(snapshot) == [snapshot / "tokenizer.json"]
