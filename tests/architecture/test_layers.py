"""The order of the rooms inside each package: imports go down only, and no modules import each other in a circle.

python tests/architecture/test_layers.py     # list every import that goes up, and every circle
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# From the ground floor up. A room is a folder or a module; modules that are not named form the room FILES.
FILES = "*"
LAYERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "mixers": (
        (
            "precision",
            "traits",
            "suggest",
            "files",
            "context",
            "feature_maps",
            "function_transforms",
            "image_grid",
            "inplace",
            "normalization",
            "plugins",
            "streams",
            "user_source",
        ),
        ("operators",),
        ("stages",),
        (FILES,),
        ("zoo",),
        ("testing",),
    ),
    "unet_adapters": ((FILES, "hosts"), ("highres",)),
    "experiments": (
        ("core",),
        ("config",),
        ("data",),
        ("training",),
        ("teacher",),
        ("distill",),
        ("metrics",),
        ("evaluate",),
        ("ablation",),
        ("report",),
        ("bench",),
        ("highres",),
        ("grids",),
        ("studies",),
        ("cli",),
    ),
}

# A registry imports the room that it discovers, and nothing from it: (registry, room).
DISCOVERY = {("mixers.registry", "mixers.zoo")}


@cache
def modules() -> dict[str, Path]:
    """Every module of the packages by its dotted name."""
    names = {}
    for package in LAYERS:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


@cache
def imports(name: str) -> tuple[tuple[str, int], ...]:
    """The project's modules that a module imports, anywhere in it, with the line."""
    return tuple(_imports(ast.parse(modules()[name].read_text(encoding="utf-8"))))


def _imports(tree: ast.Module) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            targets = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            for candidate in (target, target.rpartition(".")[0]):
                if candidate in modules():
                    yield candidate, node.lineno
                    break


def level(name: str) -> int | None:
    """The floor of a module inside its package; None for the package itself."""
    package, _, rest = name.partition(".")
    if not rest:
        return None
    room = rest.split(".")[0]
    layers = LAYERS[package]
    for number, layer in enumerate(layers):
        if room in layer:
            return number
    return next((number for number, layer in enumerate(layers) if FILES in layer), None)


def imports_that_go_up() -> list[str]:
    """Imports of a higher room of the same package."""
    faults = []
    for name in modules():
        own = level(name)
        for target, line in imports(name):
            if (name, target) in DISCOVERY:
                continue
            if own is None or target.partition(".")[0] != name.partition(".")[0]:
                continue
            other = level(target)
            if other is None or other > own:
                faults.append(f"{name}:{line} imports {target}")
    return faults


def unplaced() -> list[str]:
    """Modules that no room of LAYERS holds."""
    return [f"{name} is in no room of LAYERS" for name in modules() if "." in name and level(name) is None]


def circle() -> list[str]:
    """The modules of one circle of imports; empty if there is none. Packages' own re-exports do not count."""
    graph = {
        name: {target for target, _ in imports(name) if target != name and not name.startswith(f"{target}.")}
        for name, path in modules().items()
        if path.name != "__init__.py"
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_imports_go_down_inside_each_package() -> None:
    faults = imports_that_go_up() + unplaced()
    assert not faults, "\n" + "\n".join(faults)


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert not circle(), " -> ".join(circle())


if __name__ == "__main__":
    print("\n".join([*imports_that_go_up(), *unplaced(), "circle: " + (" -> ".join(circle()) or "none")]))
