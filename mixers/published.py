"""State dicts of other libraries: what a loader reads from one, and what it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Published:
    """What a peer's state dict says: how to build our mixer, and its parameters under our names."""

    dim: int
    heads: int
    options: dict[str, Any]
    state: dict[str, Tensor]


def require(state: Mapping[str, Tensor], names: str) -> None:
    """Refuse a state dict that lacks one of these tensors.

    Raises:
        ValueError: it does; the message names them.
    """
    missing = [name for name in names.split() if name not in state]
    if missing:
        raise ValueError(
            f"Not the state dict of such a block: {', '.join(missing)} missing. It has {', '.join(state)}."
        )


def split_rows(state: Mapping[str, Tensor], name: str, rows: list[int]) -> tuple[Tensor, ...]:
    """The tensor of that name cut into blocks of rows.

    Raises:
        ValueError: it has another number of rows.
    """
    if len(state[name]) != sum(rows):
        raise ValueError(f"Expected {name} with {' + '.join(map(str, rows))} rows, got {len(state[name])}.")
    return state[name].split(rows)
