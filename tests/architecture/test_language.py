"""The language of names and prose: plain, conventional technical English.

    python tests/architecture/test_language.py mixers docs     # list what these folders still contain

The lists hold habits that made the project hard to read. Each entry names what to write instead.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("mixers", "unet_adapters", "experiments")
SUFFIXES = {".py", ".md", ".j2", ".sh", ".yaml", ".toml"}

# Phrases that appear nowhere: {pattern: what to write instead}.
PHRASES = {
    r"told": "reported, passed, printed",
    r"foresee\w*|foresaw|foresight": "estimate",
    r"reckon\w*": "compute, estimate",
    r"nobody asked": "None if not given",
    r"by another road": "computed independently",
    r"gone through|going through": "iterate over, inspect",
    r"at hand": "available",
    r"whose truth": "the ground truth can be rendered",
    r"(to|until) the (last )?bit": "bit-identical",
    r"no business of": "does not apply to",
    r"knows no": "has no",
    r"anew": "again",
    r"mended|mend": "fixed, fix",
    r"pictures?|pictured": "image, figure",
    r"taken up|take up": "resumed, resume",
    r"distil|distils": "distill",
    r"(normal|general|optim|random|summar|recogn|quant|initial|minim|maxim)is(e|es|ed|ing|ation|ations)": "-ize",
    r"colours?|coloured|greys?|centres?|centred|neighbours?|behaviours?|licences?": "American spelling",
}

# Names of variables, arguments, functions and attributes: a participle alone does not say what the thing is.
NAMES = {
    *("told", "found", "shown", "chosen", "kept", "seen", "wanted", "asked", "made", "picked", "taken", "noted"),
    *("given", "drawn", "gone", "judged", "taught", "said", "turned", "moved", "looked", "settled", "claimed"),
    *("known", "tell", "in_turn", "forget", "mine", "pen"),
}

# Public names that two modules may define, with the reason.
SHARED_NAMES: dict[str, str] = {}


@cache
def tracked_files() -> tuple[Path, ...]:
    """Every text file of the project that people read, relative to its root."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = sorted({Path(name) for name in listing.split("\0") if name})
    own = Path(__file__).resolve().relative_to(ROOT)
    return tuple(p for p in paths if p.suffix in SUFFIXES and p != own and (ROOT / p).is_file())


def phrases_in(path: Path) -> Iterator[str]:
    """Denied phrases of a file, one message per line that has one."""
    pattern = re.compile("|".join(rf"(?<![\w])(?:{p})(?![\w])" for p in PHRASES), re.IGNORECASE)
    for number, line in enumerate((ROOT / path).read_text(encoding="utf-8").splitlines(), 1):
        for match in pattern.finditer(line.replace("_", " ")):
            yield f"{path}:{number} {match.group(0)!r}"


def names_in(path: Path) -> Iterator[str]:
    """Denied names that a Python file binds."""
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        name = _bound_name(node)
        if name is not None and name.lstrip("_") in NAMES:
            yield f"{path}:{node.lineno} the name {name!r}"  # type: ignore[attr-defined]


def _bound_name(node: ast.AST) -> str | None:
    match node:
        case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name) | ast.Attribute(attr=name, ctx=ast.Store()):
            return name
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return name
    return None


def packing_in(path: Path) -> Iterator[str]:
    """Statements that pack unrelated values to save lines: `a, b = x, y`, `f(*(a, b))`, `f(**{"a": 1})`."""
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        match node:
            case ast.Assign(targets=[ast.Tuple(elts=targets)], value=ast.Tuple(elts=values)):
                written = {ast.unparse(target) for target in targets}
                read = {ast.unparse(part) for value in values for part in ast.walk(value) if isinstance(part, ast.expr)}
                if not written & read:  # a swap or a recurrence needs the simultaneous assignment
                    yield f"{path}:{node.lineno} several values assigned in one statement"
            case ast.Call():
                for argument in node.args:
                    if isinstance(argument, ast.Starred) and isinstance(argument.value, ast.Tuple | ast.List):
                        yield f"{path}:{node.lineno} *(…) of a literal"
                for keyword in node.keywords:
                    if keyword.arg is None and isinstance(keyword.value, ast.Dict):
                        yield f"{path}:{node.lineno} **{{…}} of a literal"


def public_names() -> dict[str, set[str]]:
    """CamelCase names that modules of the packages define at their top level, with the modules."""
    modules = defaultdict(set)
    for path in tracked_files():
        if path.suffix != ".py" or path.parts[0] not in ROOMS:
            continue
        for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
            names = [node.name] if isinstance(node, ast.ClassDef) else []
            if isinstance(node, ast.Assign):
                names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            for name in names:
                if re.match(r"[A-Z]\w*[a-z]", name):
                    modules[name].add(path.as_posix())
    return modules


def _python(paths: tuple[Path, ...]) -> list[Path]:
    return [path for path in paths if path.suffix == ".py"]


@pytest.mark.parametrize("path", tracked_files(), ids=str)
def test_phrases(path: Path) -> None:
    faults = list(phrases_in(path))
    assert not faults, "\n" + "\n".join(faults)


@pytest.mark.parametrize("path", _python(tracked_files()), ids=str)
def test_names_and_statements(path: Path) -> None:
    faults = [*names_in(path), *packing_in(path)]
    assert not faults, "\n" + "\n".join(faults)


def test_one_name_has_one_meaning() -> None:
    repeated = {name: modules for name, modules in public_names().items() if len(modules) > 1}
    faults = [f"{name}: {', '.join(sorted(m))}" for name, m in sorted(repeated.items()) if name not in SHARED_NAMES]
    assert not faults, "\n" + "\n".join(faults)


def main(folders: list[str]) -> None:
    """Print what the named files and folders still contain."""
    paths = [p for p in tracked_files() if not folders or any(p.is_relative_to(folder) for folder in folders)]
    faults = [fault for path in paths for fault in phrases_in(path)]
    faults += [fault for path in _python(tuple(paths)) for fault in [*names_in(path), *packing_in(path)]]
    repeated = {name: m for name, m in public_names().items() if len(m) > 1 and name not in SHARED_NAMES}
    faults += [f"{name} is defined in {', '.join(sorted(modules))}" for name, modules in sorted(repeated.items())]
    print("\n".join([*faults, f"{len(faults)} faults"]))


if __name__ == "__main__":
    main(sys.argv[1:])
