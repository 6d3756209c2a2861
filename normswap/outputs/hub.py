"""An output folder onto the Hugging Face Hub, in one commit: what would go there, and that it goes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id

from ..errors import ArgumentError, CheckpointError, HubError, one_line
from ..records.report import LOAD_WITH
from .bounds_file import BOUNDS
from .save import CARD, CONFIG, RECORD, WEIGHTS, read_record

_TOKEN = "set HF_TOKEN to a token that may write there, or run: hf auth login"


@dataclass(frozen=True)
class Upload:
    """What goes to the Hub.

    Attributes:
        repo_id: "user/name" or "organisation/name".
        revision: branch; None for the main one.
        private: whether a repository that is made for it is private; one that exists stays what it is.
        files: path in the repository -> path here, in order of name; the model card is the text below instead.
        sizes: of each file, in bytes.
        card: text of README.md, with the line that loads the model from the Hub.
        kept: paths of the LayerNorms that stay in the model.
        met: whether it holds the accuracy budget it was converted with; None without one.
    """

    repo_id: str
    revision: str | None
    private: bool
    files: dict[str, Path]
    sizes: dict[str, int]
    card: str
    kept: list[str]
    met: bool | None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types; the card's metadata in place of its text."""
        return {
            "repo_id": self.repo_id,
            "revision": self.revision,
            "private": self.private,
            "files": [{"path": name, "bytes": self.sizes[name]} for name in self.files],
            "card": ModelCard(self.card).data.to_dict(),
            "kept": self.kept,
            "budget_met": self.met,
        }


def prepare(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    base_model: str | None = None,
) -> Upload:
    """Return what `push` would send; reads the folder and nothing else.

    All files of the folder go, except hidden ones. In the model card the line that loads the model from the folder
    becomes the one that loads it from the Hub.

    Args:
        folder: an output folder of `normswap.Conversion.save`.
        repo_id: "user/name" or "organisation/name".
        private: for a repository that is made for it.
        revision: branch; it is made if it is not there; default: the main one.
        base_model: the original's id on the Hub, where the card does not name it yet.

    Raises:
        ArgumentError: the folder is not normswap's, or the id is none.
        CheckpointError: a file of it is missing or cannot be read, or its card has no valid metadata.
    """
    folder = Path(folder)
    for name in (repo_id, base_model):
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise ArgumentError(f"{name!r} is no repository of the Hub: {one_line(error)}") from error
    if "/" not in repo_id:
        raise ArgumentError(f"{repo_id!r} is no repository of the Hub: write USER/{repo_id}")
    record = read_record(folder)
    into = record.get("report", {}).get("load_with") == LOAD_WITH[2]
    bounds = [BOUNDS] if record.get("edits", {}).get("bound") else []
    for name in (WEIGHTS, *bounds, CARD) if into else (WEIGHTS, *bounds, CONFIG, CARD):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: {name} is missing; convert again")
    try:
        report = record["report"]
        kept = [site["path"] for site in report["plan"] if site["verdict"] == "keep"]
        budget = report.get("budget")
        met = budget["met"] if budget else None
        card = ModelCard((folder / CARD).read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: {RECORD} or {CARD} cannot be read: {one_line(error)}") from error
    if card.data.get("library_name") != "timm":
        raise CheckpointError(f"{folder / CARD}: its metadata does not say library_name: timm; convert again")
    if base_model is not None:
        card.data["base_model"] = base_model
    card.text = _from_hub(card.text, repo_id, revision)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder): path for path in paths}
    files = {name.as_posix(): path for name, path in names.items() if not any(p.startswith(".") for p in name.parts)}
    text = str(card)
    sizes = {name: len(text.encode()) if name == CARD else path.stat().st_size for name, path in files.items()}
    return Upload(repo_id, revision, private, files, sizes, text, kept, met)


def push(upload: Upload, message: str = "Add a model converted by normswap") -> str:
    """Send it, in one commit, and return the address of that commit. A repository that is not there is made.

    The token is huggingface_hub's: HF_TOKEN, or what ``hf auth login`` stored.

    Raises:
        HubError: the Hub cannot be reached, or refuses: no token, no right to write, metadata it does not take.
    """
    api = HfApi(library_name="normswap")
    operations = [
        CommitOperationAdd(name, upload.card.encode() if name == CARD else path) for name, path in upload.files.items()
    ]
    with _clear_errors(upload.repo_id):
        api.create_repo(upload.repo_id, private=upload.private, exist_ok=True)
        if upload.revision is not None:
            api.create_branch(upload.repo_id, branch=upload.revision, exist_ok=True)
        done = api.create_commit(
            upload.repo_id, operations=operations, commit_message=message, revision=upload.revision
        )
    return done.commit_url


@contextmanager
def _clear_errors(repo_id: str) -> Iterator[None]:
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise HubError(f"{repo_id}: no token: {_TOKEN}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        told = error.server_message or one_line(error)
        hint = f"; {_TOKEN}" if status in (401, 403) else ""
        raise HubError(f"{repo_id}: the Hub refused it ({status}): {' '.join(told.split())}{hint}") from error
    except OfflineModeIsEnabled as error:
        raise HubError(f"{repo_id}: HF_HUB_OFFLINE is set, so nothing can be sent") from error
    except (HTTPError, OSError) as error:
        raise HubError(f"{repo_id}: the Hub cannot be reached: {one_line(error)}") from error
    except ValueError as error:  # what its validator says of the card's metadata
        raise HubError(f"{repo_id}: the Hub does not take it: {one_line(error)}") from error


def _from_hub(text: str, repo_id: str, revision: str | None) -> str:
    """Put the repository in the place of the folder in the lines that load the model."""
    at = "" if revision is None else f"@{revision}"
    revised = "" if revision is None else f', revision="{revision}"'
    where = f'"{repo_id}"{revised}'
    text = text.replace('"local-dir:PATH"', f'"hf-hub:{repo_id}{at}"')
    if f'"PATH/{BOUNDS}"' in text:
        text = text.replace(f'"PATH/{BOUNDS}"', f'hf_hub_download("{repo_id}", "{BOUNDS}"{revised})')
        text = text.replace(
            "from safetensors import", "from huggingface_hub import hf_hub_download\nfrom safetensors import"
        )
    text = text.replace("import normswap\n", "import normswap\nfrom huggingface_hub import snapshot_download\n")
    text = text.replace('normswap.load_into(model, "PATH")', f"normswap.load_into(model, snapshot_download({where}))")
    return text.replace('normswap.load("PATH")', f"normswap.load(snapshot_download({where}))")
