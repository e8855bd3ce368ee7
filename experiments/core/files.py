"""Text and JSON files that are replaced as a whole, and hashes of files.

Built on `mixers.files.atomic_path`; `unet_adapters.files` does the same for safetensors files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from experiments.core.errors import first_line
from mixers.files import atomic_path


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that it survives a power failure whole, or stays as it was before.

    Raises:
        OSError: the disk is full or fails.
    """
    with atomic_path(path, durable=True) as partial:
        partial.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically: a reader sees the old file or the new one."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically: a reader sees the old file or the new one."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; returns an empty one if the file is missing, damaged or holds something else."""
    try:
        return parse_json_object(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def parse_json_object(text: str) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        ValueError: it is not JSON, nested too deeply, or something else than an object.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def read_identity(path: Path, results: Iterable[Path] = (), option: str = "--out") -> dict[str, Any]:
    """Read the JSON object that says what a folder was made from; returns an empty one if there is none.

    Args:
        path: of the file.
        results: what the folder has that a run would continue from; those that do not exist are left out.
        option: of the command line, by which the user gives the folder.

    Raises:
        ValueError: the file is damaged, or missing beside results, so that nothing in the folder can be continued.
    """
    if not path.exists():
        result = next((result for result in results if result.exists()), None)
        if result is not None:
            raise ValueError(
                f"Cannot continue in {path.parent}: it has {result.relative_to(path.parent)}, but no {path.name} that "
                f"says what that was made from. Give another {option}."
            )
        return {}
    try:
        return parse_json_object(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"Cannot continue in {path.parent}: {path.name}, which says what it was made from, is damaged ({error}). "
            f"Give another {option}."
        ) from error


def require_same_inputs(
    path: Path, inputs: Mapping[str, Any], results: Iterable[Path] = (), option: str = "--out"
) -> bool:
    """Refuse to continue in a folder that was made from other inputs: what it has belongs to those.

    Args:
        path: of the JSON object with the inputs of the folder, beside its results.
        inputs: name, as the message has it after "another" -> value, in JSON's types.
        results, option: as `read_identity` takes them.

    Returns:
        Whether the file exists. If it does not, write the inputs before the first result.

    Raises:
        ValueError: an input differs, all of which are named; or as `read_identity`.
    """
    existing = read_identity(path, results, option)
    changed = [name.replace("_", " ") for name, value in inputs.items() if existing and existing.get(name) != value]
    if changed:
        raise ValueError(
            f"{path.parent} holds a run of another {' and another '.join(changed)}, see {path.name} there: give "
            f"another {option}."
        )
    return bool(existing)


def save_folder(folder: Path, save: Callable[[Path], Any]) -> None:
    """Let `save` fill a folder that appears as a whole or not at all.

    Args:
        folder: does not exist yet.
        save: called with the path of a temporary folder, such as the `save_pretrained` of a model.

    Raises:
        OSError: the disk is full or fails; safetensors itself raises `SafetensorError`, which is no OSError.
    """
    with atomic_path(folder) as partial:
        try:
            save(partial)
        except SafetensorError as error:
            raise OSError(f"Cannot write {folder}: {first_line(error)}.") from error


def folder_state(source: str) -> str:
    """Return a hash of the names, sizes and modification times of a file or a folder's files; "" if there is none.

    A part of the key of caches in memory, so that they notice a model or data set that was replaced on disk.
    """
    path = Path(source)
    files = sorted(path.rglob("*")) if path.is_dir() else [path] if path.is_file() else []
    if not files:
        return ""
    states = [f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files if file.is_file()]
    return hashlib.sha256("\n".join(states).encode()).hexdigest()


def sha256_of_file(path: Path) -> str | None:
    """Return a file's SHA-256 as hexadecimal digits, or None if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None
