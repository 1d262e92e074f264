"""What is downloaded from the Hugging Face hub, and uploaded to it."""

import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from detailflow.errors import DetailFlowError, explained, first_line
from detailflow.files import similar
from detailflow.published import CONFIG_FILE
from detailflow.settings import Location, checked

HUB = "https://huggingface.co"
OFFLINE = "check it and the connection"


def is_hub_name(name: str) -> bool:
    """Return whether a name is written as the hub's ids are, owner/name."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII) is not None


def fetch(repository: str, patterns: Sequence[str], revision: str | None = None, advice: str | None = None) -> Path:
    """Download a repository's files of these patterns into the hub's cache; return their folder.

    `advice` ends the error if that fails.
    """
    chosen: dict[str, Any] = {} if checked("revision", revision, Location | None) is None else {"revision": revision}
    try:
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(repository, allow_patterns=list(patterns), **chosen))
    except Exception as error:  # connection, name, permission, disk: the hub's client has an exception type for each
        raise DetailFlowError(_why_not_fetched(repository, revision, error, advice)) from error
    if not folder.is_dir():  # what the hub's client returns if no file matches
        raise DetailFlowError(f"{repository!r} on the Hugging Face hub holds no such model")
    return folder


def _why_not_fetched(repository: str, revision: str | None, error: Exception, advice: str | None) -> str:
    kinds = {kind.__name__ for kind in type(error).__mro__}  # of the hub's client, which may not be there
    if revision and "RevisionNotFoundError" in kinds:
        return f"{repository!r} on the Hugging Face hub has no revision {revision!r}"
    if "GatedRepoError" in kinds:
        return f"{repository!r} on the Hugging Face hub is gated: accept its terms there, and log in (hf auth login)"
    problem = f"could not download {repository!r} from the Hugging Face hub ({first_line(error)})"
    if "RepositoryNotFoundError" in kinds:
        advice = advice or f"it is not there, or private; {similar(repository) or 'check the name (owner/name)'}"
    return f"{problem}: {advice or f'no local folder has that name; {similar(repository) or OFFLINE}'}"


def push(
    save: Callable[[Path], object],
    repository: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Upload the pair that `save` writes, making the repository if it is missing; return the commit's address."""
    if not isinstance(repository, str) or not is_hub_name(repository):
        raise DetailFlowError(f"a repository on the hub is named owner/name, not {repository!r}")
    for name, text in (("revision", revision), ("commit_message", commit_message)):
        checked(name, text, Location | None)
    hint = "check the name, the connection and that you are logged in (hf auth login)"
    problem = f"could not upload the model to {repository!r} on the Hugging Face hub"
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        with explained(problem, Exception, hint):  # as in `fetch`
            from huggingface_hub import HfApi

            api = HfApi()
            api.create_repo(repository, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(repository, branch=revision, exist_ok=True)
            present = api.list_repo_files(repository, revision=revision)
        if CONFIG_FILE in present:
            raise DetailFlowError(
                f"{repository!r} on the Hugging Face hub holds one model, which would hide a pair: push to another"
            )
        with explained(problem, Exception, hint):
            commit = api.upload_folder(
                repo_id=repository, folder_path=folder, revision=revision, commit_message=commit_message
            )
    return str(commit)
