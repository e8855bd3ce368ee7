"""Error messages about unknown names, with the nearest valid one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def hint(name: str, names: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the valid name closest to `name`, or an empty string if none is close."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def unknown_name(kind: str, name: object, names: Iterable[str], alternative: str = "") -> str:
    """Return the message `Unknown <kind> '<name>': expected one of …. Did you mean …?`.

    Args:
        kind: what the name is a name of, such as "mixer" or "feature map".
        name: the name received.
        names: the valid names, in the order in which to list them.
        alternative: what else is valid, such as "the path of a .yaml file".
    """
    names = list(names)
    expected = f"one of {', '.join(names)}" if names else "none"
    other = f", or {alternative}" if alternative else ""
    return f"Unknown {kind} {name!r}: expected {expected}{other}.{hint(str(name), names)}"
