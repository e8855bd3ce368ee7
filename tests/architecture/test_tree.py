"""The shape of the repository: rooms, directions, sizes, docstrings, links."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("mixers", "unet_adapters", "experiments")  # each may import itself and those before it
TOP_LEVEL = {
    *ROOMS,
    *("tests", "docs", "pyproject.toml", "README.md", "Makefile", "LICENSE"),
    *("CONTRIBUTING.md", "CHANGELOG.md", "constraints.txt", "mkdocs.yml"),
}
BUILD_OUTPUTS = {"build", "dist", "runs", "site", "__pycache__"}  # what .gitignore leaves out, for a tree without git
MAX_FILE = 400
MAX_FUNCTION = 60
MAX_KERNEL = 125  # a GPU kernel cannot hand its registers to another function; its arguments alone are 20 lines

# Beyond torch, einops and the standard library: what a file of mixers/ may import, by its place.
OPTIONAL_IMPORTS = {
    "mixers/operators/*/triton.py": {"triton"},
    "mixers/operators/*/kernels/*.py": {"triton"},
    "mixers/operators/*/fla.py": {"fla"},
    "mixers/operators/*/mamba_ssm.py": {"mamba_ssm", "selective_scan_cuda"},
    "mixers/testing/**/*.py": {"pytest", "hypothesis"},
    "mixers/testing/*.py": {"pytest", "hypothesis"},
}

# Files outside zoo/ and grids/ that may name a mixer: {path: (names, reason)}.
NAMES_ALLOWED: dict[str, tuple[set[str], str]] = {
    "experiments/bench/model_benchmarks.py": (
        {"mamba", "mamba2", "linfusion", "softmax"},
        "blocks that transformers has too",
    ),
    "unet_adapters/linfusion.py": (
        {"linfusion", "linear_attention"},
        "the published file format belongs to this one mixer, and without MLPs to the other",
    ),
    "experiments/studies/largest_image/gpu_session.py": ({"linfusion"}, "its paper makes the claim that is measured"),
    "mixers/operators/__init__.py": ({"linear_attention"}, "the operator of that name, in __all__"),
    "mixers/operators/linear/__init__.py": ({"linear_attention"}, "the operator of that name, in __all__"),
}


@cache
def tree() -> tuple[Path, ...]:
    """Every file that is, or would be, in the repository, relative to its root."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return tuple(_walk())
    paths = sorted({Path(name) for name in listed.split("\0") if name})
    return tuple(path for path in paths if (ROOT / path).is_file())


def _walk() -> Iterator[Path]:
    for folder, folders, files in os.walk(ROOT):
        folders[:] = sorted(
            name for name in folders if name not in BUILD_OUTPUTS and not name.endswith(".egg-info") and name[0] != "."
        )
        yield from ((Path(folder) / name).relative_to(ROOT) for name in sorted(files))


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), filename=str(path))


def python_files(*rooms: str) -> list[Path]:
    return [path for path in tree() if path.suffix == ".py" and (not rooms or path.parts[0] in rooms)]


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every top-level package that a file imports, anywhere in it, with the line."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.parts[0] if node.level else (node.module or "").split(".")[0]
            yield package, node.lineno


def docstrings(module: ast.Module) -> set[int]:
    """The ids of the constants that are docstrings."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    identifiers = set()
    for node in ast.walk(module):
        if isinstance(node, owners) and node.body and isinstance(node.body[0], ast.Expr):
            identifiers.add(id(node.body[0].value))
    return identifiers


def fail_with(faults: list[str]) -> None:
    assert not faults, "\n" + "\n".join(faults)


def test_the_top_level_is_exact() -> None:
    entries = {path.parts[0] for path in tree() if not path.parts[0].startswith(".")}
    fail_with([f"unexpected: {x}" for x in entries - TOP_LEVEL] + [f"missing: {x}" for x in TOP_LEVEL - entries])


def test_no_file_is_too_long() -> None:
    lengths = {path: len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in python_files()}
    fail_with([f"{path}: {n} lines, at most {MAX_FILE}" for path, n in lengths.items() if n > MAX_FILE])


def _code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The lines of a function without its docstring, which may say as much as a reader needs."""
    length = (function.end_lineno or function.lineno) - function.lineno + 1
    first = function.body[0]
    return length if ast.get_docstring(function) is None else length - (first.end_lineno or 0) + first.lineno - 1


def test_no_function_is_too_long() -> None:
    faults = []
    for path in python_files():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = _code_lines(node)
                if length > (MAX_KERNEL if "kernels" in path.parts else MAX_FUNCTION):
                    faults.append(f"{path}:{node.lineno} {node.name}: {length} lines, at most {MAX_FUNCTION}")
    fail_with(faults)


def test_imports_go_one_way() -> None:
    faults = []
    for path in python_files(*ROOMS):
        forbidden = {"tests", *ROOMS[ROOMS.index(path.parts[0]) + 1 :]}
        faults += [f"{path}:{line} imports {name}" for name, line in imports(path) if name in forbidden]
    fail_with(faults)


def test_mixers_import_torch_einops_and_the_standard_library_only() -> None:
    standard = {"torch", "einops", "mixers", *sys.stdlib_module_names}
    faults = []
    for path in python_files("mixers"):
        allowed = standard.union(*(names for place, names in OPTIONAL_IMPORTS.items() if path.match(place)))
        faults += [f"{path}:{line} imports {name}" for name, line in imports(path) if name not in allowed]
    fail_with(faults)


def test_importing_mixers_imports_nothing_optional() -> None:
    heavy = {"diffusers", "transformers", "triton", "fla", "mamba_ssm", "pytest", "hypothesis"}
    code = "import sys, torch; before = set(sys.modules); import mixers; mixers.list_mixers(); "
    code += f"print(sorted({heavy} & (set(sys.modules) - before)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_listing_mixers_imports_no_diffusers() -> None:
    """`mixlab list` answers in two seconds; diffusers, transformers and peft would add five."""
    code = "import sys; from experiments.cli import app; app(['list', 'softmax'], standalone_mode=False); "
    code += "print(sorted({'diffusers', 'transformers', 'peft'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_mixer_names_are_written_in_the_zoo_and_in_grids_only() -> None:
    from mixers import list_mixers

    names = set(list_mixers()) - {"identity", "uniform", "softmax"}  # common words with other meanings, too
    assert names
    faults = []
    for path in python_files(*ROOMS):
        if {"zoo", "grids"} & set(path.parts):
            continue
        allowed, _ = NAMES_ALLOWED.get(path.as_posix(), (set(), ""))
        skipped = docstrings(parsed(path))
        for node in ast.walk(parsed(path)):
            if not isinstance(node, ast.Constant) or id(node) in skipped or not isinstance(node.value, str):
                continue
            if node.value in names - allowed:
                faults.append(f"{path}:{node.lineno} names the mixer {node.value!r}: ask its traits instead")
    fail_with(faults)


def _is_overload(node: ast.AST) -> bool:
    """Whether it is one signature of a function; the docstring is that of the implementation."""
    return any(ast.unparse(decorator) == "overload" for decorator in getattr(node, "decorator_list", []))


def test_everything_public_has_a_docstring() -> None:
    faults = []
    for path in python_files(*ROOMS):
        module = parsed(path)
        if module.body and not ast.get_docstring(module):
            faults.append(f"{path}:1 the module")
        defined = (n for n in module.body if isinstance(n, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef))
        public = (node for node in defined if not node.name.startswith("_") and not _is_overload(node))
        faults += [f"{path}:{node.lineno} {node.name}" for node in public if not ast.get_docstring(node)]
    fail_with(faults)


@pytest.mark.parametrize("page", [path for path in tree() if path.suffix == ".md"], ids=str)
def test_relative_links_resolve(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    faults = []
    for target in re.findall(r"\]\(\s*<?([^)\s>]+)", text) + re.findall(r'(?:src|href)="([^"]+)"', text):
        if re.match(r"[a-z][a-z0-9+.-]*:|#|//", target):
            continue
        if not (ROOT / page.parent / target.split("#")[0].split("?")[0]).exists():
            faults.append(f"{page}: {target}")
    fail_with(faults)


def test_the_readme_credits_twemoji() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "Twemoji" in text and re.search(r"CC[- ]BY[- ]4\.0", text)
