"""The wording of error messages that many rooms share; `mixers.suggest` has the one for unknown names."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or of its cause's; the name of its type if it has no message."""
    origin = error.__cause__ or error
    return next((line for line in str(origin).splitlines() if line.strip()), type(origin).__name__)
