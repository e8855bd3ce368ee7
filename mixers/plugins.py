"""Plug-ins of installed packages, which name their modules under entry-point groups."""

from __future__ import annotations

import warnings
from importlib.metadata import entry_points


def load_installed_plugins(group: str, items: str) -> None:
    """Import the modules that installed packages name under an entry-point group.

    A module that cannot be imported is a warning with the first line of its error, so that it does not hide the others.

    Args:
        group: of entry points, such as `"mixers"`.
        items: what the modules register, in the plural, for the warning.
    """
    for plugin in entry_points(group=group):
        try:
            plugin.load()
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            warnings.warn(
                f"Cannot load the installed plug-in {plugin.name!r} ({plugin.value}), so its {items} are missing: "
                f"{type(error).__name__}: {reason}",
                stacklevel=3,
            )
