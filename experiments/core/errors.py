"""The wording of error messages that many rooms share."""

from __future__ import annotations

from collections.abc import Iterable

from mixers.suggest import hint


def unknown_name(kind: str, name: object, known: Iterable[str], alternative: str = "") -> str:
    """Return the message for a name that does not exist, with the nearest existing one.

    Args:
        kind: what the name was expected to be, such as "objective".
        name: what was received.
        known: the names that exist.
        alternative: what else is accepted, such as "the path of a .yaml file".

    Example:
        `unknown_name("split", "tain", ["train", "held_out"])` is
        "Unknown split 'tain': expected one of train, held_out. Did you mean 'train'?".
    """
    names = list(known)
    expected = f"one of {', '.join(names)}" if names else "none"
    return (
        f"Unknown {kind} {name!r}: expected {expected}{alternative and f', or {alternative}'}.{hint(str(name), names)}"
    )


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or of its cause's; the name of its type if it has no message."""
    origin = error.__cause__ or error
    return next((line for line in str(origin).splitlines() if line.strip()), type(origin).__name__)
