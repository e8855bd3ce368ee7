"""Download files from the Hugging Face Hub and upload them to it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


def fetch(source: str | os.PathLike[str], files: Sequence[str]) -> Path:
    """The directory `source` itself or, if there is none, a local copy of these files of the Hub repository `source`.

    Args:
        source: a directory, or the id of a repository.
        files: names to download; wildcards are allowed.

    Raises:
        FileNotFoundError: it is neither a directory nor a repository that can be downloaded; the message says why.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(os.fspath(source), allow_patterns=list(files)))
    except (HFValidationError, LocalEntryNotFoundError, _transport_error(), OSError) as error:
        raise FileNotFoundError(
            f"{source} is neither a directory nor a Hub repository that can be downloaded: {_reason(error)}"
        ) from error


def push(folder: Path, repo_id: str, private: bool | None, message: str, token: str | None) -> str:
    """Upload a folder's files in one commit; returns the address of the repository, which is created if needed.

    Raises:
        ConnectionError: the upload failed; the message says why.
        ValueError: `repo_id` is not a valid id of a repository.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError

    api = HfApi(token=token)
    try:
        repository = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository.repo_id, folder_path=folder, commit_message=message)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is not a valid id of a Hub repository: {_reason(error)}") from error
    except (LocalTokenNotFoundError, _transport_error(), OSError) as error:
        raise ConnectionError(
            f"the adapter was not uploaded to {repo_id}: {_reason(error)} (`hf auth login` signs in)"
        ) from error
    return str(repository)


def _transport_error() -> type[Exception]:
    """The base class of all errors of huggingface_hub's HTTP library, which is httpx or httpx2, with its version.

    Without a network, some calls of huggingface_hub raise these errors as they are, and they are no OSErrors.
    """
    from huggingface_hub import errors

    base: type[Exception] = vars(errors)["HTTPError"]
    return base


def _reason(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
