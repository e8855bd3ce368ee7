"""Types of the callbacks that report progress."""

from __future__ import annotations

from collections.abc import Callable

StepCallback = Callable[[int, int], None]
"""Called as (completed, total)."""

PartCallback = Callable[[str, int, int], None]
"""Called as (part, completed, total); a part is a stage's size such as "512 × 512", or "pixels" for the decoding."""
