"""The wording of error messages that many rooms share; `mixers.suggest` has the one for unknown names."""

from __future__ import annotations

OUT_OF_MEMORY = ("allocate memory", "out of memory", "Storage size calculation overflowed", "numel: integer")
"""Parts of the messages with which torch refuses a tensor for its size."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a CPU's or a GPU's memory did not suffice, or never could."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in OUT_OF_MEMORY)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or of its cause's; the name of its type if it has no message."""
    origin = error.__cause__ or error
    return next((line for line in str(origin).splitlines() if line.strip()), type(origin).__name__)
