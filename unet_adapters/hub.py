"""To and from the Hugging Face Hub: a folder's files, down and up."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


def fetch(source: str | os.PathLike[str], files: Sequence[str]) -> Path:
    """The directory `source` itself or, if there is none, a local copy of these files of the repository of that id.

    Raises:
        FileNotFoundError: neither is to be had; the message says why.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(os.fspath(source), allow_patterns=list(files)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"{source} is neither a directory nor a Hub repository within reach: {_reason(error)}"
        ) from error


def push(folder: Path, repo_id: str, private: bool | None, message: str, token: str | None) -> str:
    """Upload a folder's files in one commit, into a repository that is made if there is none; returns its address.

    Raises:
        ConnectionError: the Hub refused or is out of reach; the message says why.
        ValueError: no id of a repository.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    api = HfApi(token=token)
    try:
        found = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=found.repo_id, folder_path=folder, commit_message=message)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no id of a Hub repository: {_reason(error)}") from error
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
        raise ConnectionError(
            f"the adapter was not uploaded to {repo_id}: {_reason(error)} (`hf auth login` signs in)"
        ) from error
    return str(found)


def _reason(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
