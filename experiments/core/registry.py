"""Registries: names for classes that one decorator adds, discovered in a package, in plug-ins and installed packages.

    OBJECTIVES = Registry("objective", package="experiments.distill.objectives")

    @OBJECTIVES.register("noise")
    @dataclass(frozen=True)
    class NoiseObjective(Objective): ...

Adding an item is one file: in the package, in a file given with `--plugin`, or in an installed package that names its
module under the entry-point group `mixlab.objective`.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from typing import Any, Generic, TypeVar

from mixers.plugins import load_installed_plugins
from mixers.suggest import unknown_name

Item = TypeVar("Item")
Registered = TypeVar("Registered")


class Registry(Generic[Item]):
    """Items by name.

    Args:
        kind: what an item is, in the singular, for messages and for the entry-point group.
        package: every module of it is imported before the first look-up, except those whose name begins with `_`.
    """

    def __init__(self, kind: str, package: str | None = None) -> None:
        self.kind = kind
        self._package = package
        self._items: dict[str, Item] = {}
        self._origins: dict[str, Any] = {}
        self._discovered = False

    def register(self, name: str) -> Callable[[Registered], Registered]:
        """Return a decorator that adds a class or a function under `name`.

        Raises:
            ValueError: another item has that name.
        """

        def decorate(item: Registered) -> Registered:
            self.add(name, item)  # type: ignore[arg-type]  # the decorator keeps the class's own type
            return item

        return decorate

    def add(self, name: str, item: Item, origin: Any = None) -> None:
        """Add an item.

        Args:
            name: of the item.
            item: what `get` returns.
            origin: the class or function that the item was made from, if it is neither itself; the same origin may add
                its name again, as happens when a module is reloaded.

        Raises:
            ValueError: an item of another origin has that name.
        """
        existing = self._items.get(name)
        origin = item if origin is None else origin
        if existing is not None and _location(self._origins[name]) != _location(origin):
            raise ValueError(
                f"Cannot register {_location(origin)} as the {self.kind} {name!r}: {_location(self._origins[name])} "
                "has that name. Choose another one."
            )
        self._items[name] = item
        self._origins[name] = origin

    def get(self, name: str) -> Item:
        """Look an item up.

        Raises:
            ValueError: no such item; the message names the nearest one.
        """
        self.discover()
        if name not in self._items:
            raise ValueError(unknown_name(self.kind, name, self.names()))
        return self._items[name]

    def names(self, pattern: str = "*") -> list[str]:
        """Return the names that match a wildcard pattern, in alphabetical order."""
        self.discover()
        return sorted(name for name in self._items if fnmatchcase(name, pattern))

    def items(self) -> Iterator[tuple[str, Item]]:
        """Iterate over (name, item) in alphabetical order."""
        return ((name, self.get(name)) for name in self.names())

    def create(self, name: str, **options: Any) -> Any:
        """Create an instance of an item that is a dataclass; `options` are its fields.

        Raises:
            ValueError: no such item, or it has no such option; the message names the nearest one.
        """
        item: Any = self.get(name)
        fields = [field.name for field in dataclasses.fields(item)] if dataclasses.is_dataclass(item) else []
        for option in options:
            if option not in fields:
                raise ValueError(unknown_name(f"option of the {self.kind} {name}", option, fields))
        return item(**options)

    def names_from(self, module: str) -> list[str]:
        """Return the names of the items that the named module defines."""
        return sorted(name for name, origin in self._origins.items() if getattr(origin, "__module__", None) == module)

    def discover(self) -> None:
        """Import the package's modules and the installed packages' entry points, once."""
        if self._discovered:
            return
        self._discovered = True  # before the imports, which may look items up
        if self._package is not None:
            package = importlib.import_module(self._package)
            for module in pkgutil.iter_modules(package.__path__):
                if not module.name.startswith("_"):
                    importlib.import_module(f"{self._package}.{module.name}")
        load_installed_plugins(f"mixlab.{self.kind}", f"{self.kind}s")


def _location(origin: Any) -> str:
    named = origin if hasattr(origin, "__qualname__") else type(origin)
    return f"{named.__module__}.{named.__qualname__}"
