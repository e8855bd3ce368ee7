"""The source of a user's own classes, for the keys of runs and caches: an edited plug-in is another mixer."""

from __future__ import annotations

import ast
import hashlib
import inspect
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

LIBRARIES = frozenset(
    {"mixers", "unet_adapters", "experiments", "builtins", "torch", "diffusers", "transformers", "accelerate", "peft"}
)
"""Packages whose classes are described by their names alone."""


def source_digest(*classes: type) -> str:
    """Return a SHA-256 of classes: the names of all that they inherit from, and the source of those of a user.

    The source of a class is its file and the files of the same package or folder that the file imports, directly or
    through others. A class without a file, such as one that is defined in a shell, counts by its name.
    """
    digest = hashlib.sha256()
    for base in (base for cls in classes for base in cls.__mro__[:-1]):
        digest.update(f"{base.__module__}.{base.__qualname__}".encode())
        if not is_library_class(base):
            with suppress(OSError, TypeError):
                for file in _imported_files(Path(inspect.getfile(base)).resolve()):
                    digest.update(file.read_bytes())
    return digest.hexdigest()


def is_library_class(cls: type) -> bool:
    """Whether a class belongs to one of LIBRARIES."""
    return cls.__module__.partition(".")[0] in LIBRARIES


def _imported_files(path: Path) -> list[Path]:
    """Return a file and every file of its package or folder that it imports, in alphabetical order after the file."""
    files = {path}
    waiting = [path]
    while waiting:
        for file in _direct_imports(waiting.pop()):
            if file not in files:
                files.add(file)
                waiting.append(file)
    return [path, *sorted(files - {path})]


def _direct_imports(path: Path) -> Iterator[Path]:
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _module_files(_import_root(path, alias.name), alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            start = path.parents[node.level - 1] if node.level else _import_root(path, module)
            yield from _module_files(start, module)
            for alias in node.names:
                yield from _module_files(start, f"{module}.{alias.name}".strip("."))


def _import_root(path: Path, module: str) -> Path | None:
    """The folder in which an absolute import of a user's own module starts; None for modules of others."""
    folder = path.parent
    while (folder / "__init__.py").is_file():
        folder = folder.parent
    package = path.relative_to(folder).parts[0]
    is_own_package = folder != path.parent and module.partition(".")[0] == package
    is_script_folder = folder == path.parent and folder.name not in ("site-packages", "dist-packages")
    return folder if is_own_package or is_script_folder else None


def _module_files(start: Path | None, module: str) -> Iterator[Path]:
    """Yield the files of a dotted module below a folder, if it is there: one module, or a package's __init__."""
    if start is None or not module:
        return
    target = start.joinpath(*module.split("."))
    for file in (target.with_suffix(".py"), target / "__init__.py"):
        if file.is_file():
            yield file.resolve()
