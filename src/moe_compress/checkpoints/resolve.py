"""From what a user calls a model to a folder: a zoo name, a local path, or a hub id."""

from __future__ import annotations

import contextlib
from pathlib import Path

from huggingface_hub import constants, get_session, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from moe_compress import zoo
from moe_compress.checkpoints.model_names import local_folder, require_model_name
from moe_compress.checkpoints.quantization_config import EXPORT
from moe_compress.checkpoints.reader import Checkpoint, architecture_values, open_checkpoint
from moe_compress.models import hf
from moe_compress.utils.choices import nearest

FILES = (
    "model*.safetensors", "*.json", "*.txt", "*.model", "*tiktoken*", "*.jinja", "*.py",
    "*[Ll][Ii][Cc][Ee][Nn][CcSs][Ee]*", "[Cc][Oo][Pp][Yy][Ii][Nn][Gg]*", "*[Nn][Oo][Tt][Ii][Cc][Ee]*",
    "*[Uu][Ss][Ee]_[Pp][Oo][Ll][Ii][Cc][Yy]*", "README.md",
)  # fmt: skip
HUB_SECONDS = 10.0


def resolve_model(model: str, revision: str | None = None) -> Checkpoint:
    """Open the checkpoint that the user means; fetches a hub model (weights included) if it is one."""
    folder = local_folder(model)
    if folder is not None:
        if revision is not None:
            raise ValueError(f"revision={revision} belongs to a hub model, but {model} is a local folder.")
        return open_checkpoint(folder, model if model in zoo.NAMES else str(folder))
    require_model_name(model)
    cached_only = not hub_answers()
    with _hub_errors(model, revision):
        config = _fetch_config(model, revision, cached_only)
    architecture_values(config)  # refuses what cannot be read, before gigabytes are fetched
    with _hub_errors(model, revision):
        path = snapshot_download(model, revision=revision, allow_patterns=list(FILES), local_files_only=cached_only)
    folder = Path(path)
    return open_checkpoint(folder, model, commit=folder.name)


def tokenizer_folder(model: str, revision: str | None = None) -> Path:
    """A folder that holds all of the model but its weights."""
    folder = local_folder(model)
    if folder is not None:
        return folder
    require_model_name(model)
    cached_only = not hub_answers()
    files = [name for name in FILES if "safetensors" not in name]
    with _hub_errors(model, revision):
        return Path(snapshot_download(model, revision=revision, allow_patterns=files, local_files_only=cached_only))


def config_folder(model: str, revision: str | None = None) -> Path:
    """A folder that holds at least the model's config.json; fetches no weights.

    Configs of well-known models ship with the package, so that planning works offline.
    """
    folder = local_folder(model)
    if folder is not None:
        return folder
    shipped = zoo.config_path(model)
    if shipped is not None and revision is None:
        return shipped.parent
    require_model_name(model)
    cached_only = not hub_answers()
    with _hub_errors(model, revision):
        return _fetch_config(model, revision, cached_only)


def _fetch_config(model: str, revision: str | None, cached_only: bool) -> Path:
    """The folder of a hub model's config.json, and of what NVIDIA's exports have beside it."""
    path = hf_hub_download(model, "config.json", revision=revision, local_files_only=cached_only)
    with contextlib.suppress(EntryNotFoundError):  # which an entry that is not in the cache is, too
        hf_hub_download(model, EXPORT, revision=revision, local_files_only=cached_only)
    return Path(path).parent


def layers_of(model: str) -> int:
    """How many decoder layers a model has, from its config alone."""
    return hf.num_layers(hf.config_from(architecture_values(config_folder(model))))


def hub_answers() -> bool:
    """Whether the hub can be reached: asked once and briefly; its client alone would try for half a minute."""
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
    except Exception:  # whatever the client's HTTP library raises: nothing came back
        return False
    return True


def _suggestion(model: str) -> str:
    """The well-known hub id that the user may have meant."""
    known = {hub_id.lower(): hub_id for hub_id in zoo.known_configs() if hub_id != model}
    near = nearest(model.lower(), known, cutoff=0.8)
    return f" Did you mean {known[near]!r}?" if near else ""


class _hub_errors:
    """Turns the hub client's errors into one sentence that says what to do."""

    def __init__(self, model: str, revision: str | None) -> None:
        self.model, self.revision = model, revision

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            return
        model = self.model
        if isinstance(error, GatedRepoError):
            text = f"{model} is gated: accept its licence on the hub, then log in with `hf auth login`."
        elif isinstance(error, RevisionNotFoundError):
            text = f"{model} has no revision {self.revision!r}."
        elif isinstance(error, RepositoryNotFoundError):
            text = (
                f"there is no folder {model} here, and the hub has no such model or keeps it private: check the name, "
                f"or log in with `hf auth login`.{_suggestion(model)}"
            )
        elif isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled | HfHubHTTPError | OSError):
            text = (
                f"there is no folder {model} here, and it could not be fetched from the hub ({type(error).__name__}): "
                f"check the name and the connection, or use a local folder.{_suggestion(model)}"
            )
        elif isinstance(error, HFValidationError):
            text = f"{model} is neither a folder here nor a valid hub id."
        else:
            return
        raise ValueError(text) from error
