"""Error messages about unknown names, with the nearest valid one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def hint(name: str, known: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the known name closest to `name`, or an empty string if none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Return the message `Unknown <kind> '<name>': expected one of …. Did you mean …?`.

    Args:
        kind: what the name is a name of, such as "mixer" or "feature map".
        name: the name received.
        known: the valid names, in the order in which to list them.
    """
    known = list(known)
    return f"Unknown {kind} {name!r}: expected one of {', '.join(known)}.{hint(name, known)}"
