"""Traits: the properties that a configured mixer promises, and that the conformance suite checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Causality = Literal["causal", "bidirectional", "noncausal"]
CAUSALITIES: tuple[Causality, ...] = get_args(Causality)


@dataclass(frozen=True)
class Traits:
    """The properties of a mixer as configured.

    Attributes:
        causality: which tokens each token sees, in scan order.
        normalized: each row of the mixing matrix sums to one, up to `eps`.
        positive: no entry of the mixing matrix is negative.
        permutation_equivariant: permuting the tokens permutes the output and changes nothing else.
        linear: time and memory grow linearly in the number of tokens.
        repetition_invariant: repeating every token leaves the output unchanged, so that the mixer carries over to
            other resolutions.
        needs_grid: the forward needs grid=(height, width).
        pairwise: an entry of the mixing matrix depends only on its two tokens and on those between them, up to a
            factor per row. Not if all tokens together decide how each is weighted.
        continuous: a small change of the tokens changes the output little. Not if the tokens select what is computed:
            at a tie, the output jumps.
        linear_in_values: the result is W v (plus what does not depend on v), with a matrix W that does not depend on
            the values. Otherwise the mixing matrix is the derivative of the result at these values.
    """

    causality: Causality
    normalized: bool
    positive: bool
    permutation_equivariant: bool
    linear: bool
    repetition_invariant: bool = False
    needs_grid: bool = False
    pairwise: bool = True
    continuous: bool = True
    linear_in_values: bool = True
