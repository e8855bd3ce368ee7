"""Checks of arguments that all operators take."""

from __future__ import annotations

import torch

from mixers.operators.recurrent_state import RecurrentState
from mixers.suggest import hint
from mixers.traits import CAUSALITIES


def check_causality(causality: str, initial_state: RecurrentState | None, output_final_state: bool) -> None:
    """Check the name of the causality, and that only causal passes have a state.

    Raises:
        ValueError: The causality is unknown, or a pass that is not causal is given a state or asked for one.
    """
    if causality not in CAUSALITIES:
        raise ValueError(
            f"Unknown causality {causality!r}: expected one of {', '.join(CAUSALITIES)}.{hint(causality, CAUSALITIES)}"
        )
    if causality != "causal" and (initial_state is not None or output_final_state):
        raise ValueError(
            f"initial_state and output_final_state are for causal passes only, got causality={causality!r}."
        )


def check_initial_state(initial_state: RecurrentState | None, expected: tuple[int, ...], axes: str) -> None:
    """Check the shape of an initial state.

    Args:
        initial_state: the state, or None.
        expected: shape of its memory.
        axes: the names of these axes, for the message.

    Raises:
        ValueError: The memory has another shape.
    """
    if initial_state is not None and initial_state.memory.shape != expected:
        raise ValueError(
            f"Expected initial_state.memory {axes} = {expected}, got {tuple(initial_state.memory.shape)}. "
            "Pass a state of a call with the same batch size, heads, widths and `normalize`."
        )


def check_eps(eps: float, normalize: bool, dtype: torch.dtype) -> None:
    """Check that `eps` keeps a row without any weight from becoming 0 / 0.

    Args:
        eps: added to the denominator.
        normalize: whether there is one.
        dtype: of the sums.

    Raises:
        ValueError: `normalize` is set, and `eps` is negative or zero in that dtype.
    """
    if normalize and not eps >= torch.finfo(dtype).tiny:
        raise ValueError(
            f"normalize=True needs eps > 0, got eps={eps} for sums in {dtype}: a query whose features are all zero "
            "would give 0 / 0. Pass a small eps, such as 1e-12."
        )
