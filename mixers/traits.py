"""What a configured mixer promises; the conformance suite tests for each promise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Causality = Literal["causal", "bidirectional", "noncausal"]
CAUSALITIES: tuple[Causality, ...] = get_args(Causality)


@dataclass(frozen=True)
class Traits:
    """Promises of a mixer as configured.

    Attributes:
        causality: which tokens a token sees, in the order of the scan.
        normalized: the weights of a row sum to one (up to `eps`).
        positive: every weight is ≥ 0.
        permutation_equivariant: permuting the tokens permutes the output.
        linear: time and memory grow linearly in the number of tokens.
        repetition_invariant: repeating every token changes nothing, so it carries over to other resolutions.
        needs_grid: the forward must be told (height, width).
    """

    causality: Causality
    normalized: bool
    positive: bool
    permutation_equivariant: bool
    linear: bool
    repetition_invariant: bool = False
    needs_grid: bool = False
