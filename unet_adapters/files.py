"""Write safetensors files: atomically, and with an OSError where the disk is full or fails."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mixers.files import atomic_path


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically: a reader sees the old file or the new one.

    Raises:
        OSError: the disk is full or fails.
    """
    with atomic_path(path) as partial:
        write_tensors(partial, tensors, metadata, reported_path=path)


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    reported_path: Path | None = None,
) -> None:
    """Write a safetensors file in place, for use inside `atomic_path`.

    Args:
        path: the file.
        tensors: by name; made contiguous.
        metadata: for the file's header.
        reported_path: the path to name in the message; None: `path`.

    Raises:
        OSError: the disk is full or fails; safetensors itself raises `SafetensorError`, which is no OSError.
    """
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        save_file(contiguous, path, metadata=None if metadata is None else dict(metadata))
    except SafetensorError as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise OSError(f"Cannot write {reported_path or path}: {reason}.") from error
