"""Publishing a checkpoint: what of it goes to the hub, without what is nobody else's business, and the upload."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, RevisionNotFoundError
from huggingface_hub.utils._validators import validate_repo_id

from moe_compress.checkpoints.companions import require_own
from moe_compress.checkpoints.folder import CARD, MANIFEST, RECIPE, STATISTICS, read_manifest
from moe_compress.checkpoints.reader import Checkpoint
from moe_compress.checkpoints.resolve import hub_answers
from moe_compress.edits.plan_file import PLAN
from moe_compress.hub.card import licence_of
from moe_compress.utils.files import gigabytes
from moe_compress.utils.yaml_text import parse_yaml

# Written by this package, so that it knows what in them is a path of this machine.
OURS = (MANIFEST, PLAN, RECIPE, CARD, STATISTICS)
PATHS = ("model", "data", "eval_data", "template")
MEASURED_ON = r"[\d,]+ held-out tokens of [^\n]*?(?=, \w+ on \w+, protocol)"


@dataclass(frozen=True)
class Upload:
    """What goes where: sizes in bytes by file name; `rewritten`: those that differ from the folder's, whole.

    url: of the commit; None in a dry run. notes: what a person should know before others read it.
    """

    folder: str
    repo: str
    private: bool
    sizes: dict[str, int]
    rewritten: dict[str, bytes]
    notes: tuple[str, ...]
    url: str | None = None

    def markdown(self) -> str:
        """The files, what was rewritten, and where they are now."""
        rows = [f"| {name} | {size:,} | {self._how(name)} |" for name, size in self.sizes.items()]
        done = f"uploaded: {self.url}" if self.url else "Nothing was sent: this was a dry run."
        total = f"{len(rows)} files, {gigabytes(sum(self.sizes.values()))}"
        kind = "private" if self.private else "public"
        return "\n".join(
            [f"### {self.folder} -> {self.repo} ({kind})", "", "| file | bytes | |", "|---|---|---|", *rows, "", total]
            + [line for note in (*self.notes, done) for line in ("", note)]
        )

    def _how(self, name: str) -> str:
        return "rewritten without paths of this machine, for this name" if name in self.rewritten else ""


def prepare(checkpoint: Checkpoint, repo: str, private: bool = False) -> Upload:
    """Check a checkpoint of ours, and list what is to be sent; asks no network.

    Raises ValueError for other folders, for stages between others, and for a repo that is not `user/name`.
    """
    folder = checkpoint.folder
    manifest = read_manifest(folder)
    if manifest is None:
        raise ValueError(f"{folder} was not made by moe-compress: `hf upload` sends any folder.")
    if manifest.get("intermediate"):
        raise ValueError(f"{folder} is a stage between others: run its recipe to the end first.")
    _require_repo(repo)
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    require_own(folder, files)
    folders = sorted(path.name for path in folder.iterdir() if path.is_dir())
    texts = {path.name: path.read_bytes() for path in files if path.name in OURS}
    paths = _local_paths(manifest, texts.get(RECIPE, b""))
    rewritten = {}
    for name, text in texts.items():
        new = _without(text.decode(), paths)
        new = _renamed(new, folder.name, repo) if name == CARD else new
        if new.encode() != text:
            rewritten[name] = new.encode()
    sizes = {path.name: len(rewritten.get(path.name, b"")) or path.stat().st_size for path in files}
    return Upload(str(folder), repo, private, sizes, rewritten, tuple(_notes(manifest, texts, folders)))


def _require_repo(repo: str) -> None:
    try:
        validate_repo_id(repo)
        valid = repo.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise ValueError(f"{repo!r} is no name on the hub: write user/name, such as me/Mixtral-8x7B-half.")


def _local_paths(manifest: Mapping[str, Any], recipe: bytes) -> list[str]:
    """Paths of this machine that the files name; the longest first, as one may begin with another."""
    options = parse_yaml(recipe.decode(), RECIPE) or {}
    named = [
        str(manifest["base"]["model"]),
        *(word.strip() for key in PATHS for word in str(options.get(key, "")).split(",")),
    ]
    return sorted({path for path in named if re.match(r"[/~.\\]|[A-Za-z]:[/\\]", path)}, key=len, reverse=True)


def _without(text: str, paths: list[str]) -> str:
    for path in paths:
        text = text.replace(path, re.split(r"[/\\]", path.rstrip("/\\"))[-1])
    return text


def _renamed(card: str, name: str, repo: str) -> str:
    """The card with the hub's name where it says how to load the model; the mark of an untouched one stays here."""
    return (
        re.sub(r"<!-- moe-compress \w+ -->\n$", "", card)
        .replace(f"\n# {name}\n", f"\n# {repo.partition('/')[2]}\n")
        .replace(repr(name), repr(repo))
    )


def _notes(manifest: Mapping[str, Any], texts: Mapping[str, bytes], folders: list[str]) -> list[str]:
    card = texts.get(CARD, b"").decode()
    notes = []
    if not card:
        notes.append("There is no model card: README.md was removed from the folder.")
    elif "| delta_nll |" not in card:
        notes.append("The card has no numbers: `evaluate` this folder first, and they are put into it.")
    elif text := re.search(MEASURED_ON, card):
        notes.append(f"The card's numbers are those of the latest evaluation, on {text[0]}.")
    if card and not licence_of(card):
        notes.append("The card names no licence, for the original does not say its own: look there, and add it.")
    if manifest.get("form") == "edited":
        notes.append("Others load it with moe-compress, or with trust_remote_code=True by the code that goes with it.")
    if folders:
        notes.append(f"Folders stay here: {', '.join(folders)}.")
    return notes


def send(upload: Upload, message: str = "", revision: str | None = None) -> str:
    """Create the repository if there is none, and send everything in one commit; returns its address.

    Raises ValueError where nobody is logged in, and where the hub cannot be reached or refuses.
    """
    folder, api = Path(upload.folder), HfApi()
    if not hub_answers():
        raise ValueError("the hub cannot be reached: --dry-run shows what would be sent, without a network.")
    operations = [CommitOperationAdd(name, upload.rewritten.get(name) or str(folder / name)) for name in upload.sizes]
    try:
        api.whoami()
        api.create_repo(upload.repo, private=upload.private, exist_ok=True)
        words = message or f"Upload {folder.name}"
        commit = api.create_commit(upload.repo, operations, commit_message=words, revision=revision)
    except LocalTokenNotFoundError as error:
        raise ValueError("nobody is logged in to the hub: run `hf auth login`, or set HF_TOKEN.") from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{upload.repo} has no branch {revision!r}: create it, or leave revision= out.") from error
    except HfHubHTTPError as error:
        raise ValueError(f"the hub refused {upload.repo}: {' '.join(str(error).split())}") from error
    except Exception as error:  # whatever the client's HTTP library raises
        words = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"the upload broke off ({words}): the same command sends what is missing.") from error
    return str(commit.commit_url)
