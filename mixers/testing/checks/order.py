"""Promises about the order and the number of tokens; few tokens are tried first, so that a failure can be read."""

from __future__ import annotations

import torch
from torch import Tensor

from mixers import structure
from mixers.mixer import TokenMixer
from mixers.testing.inputs import CheckInputs, grid_of, run_mixer
from mixers.testing.tolerances import assert_close


def check_never_looks_ahead(mixer: TokenMixer, inputs: CheckInputs) -> None:
    """Causal: changing later tokens changes no earlier output; the smallest failing case is printed."""
    for length in inputs.at_least(2):
        x = inputs.tokens(mixer, length, batch=1)
        y = run_mixer(mixer, x)
        for position in _positions(length):
            changed = x.clone()
            changed[:, position:] += 1
            try:
                assert_close(run_mixer(mixer, changed)[:, :position], y[:, :position], what="earlier outputs")
            except AssertionError as error:
                raise AssertionError(
                    f"claims to be causal, but with {length} tokens a change of tokens from {position} on affects "
                    f"{error}{_format_matrix(mixer, x)}"
                ) from None


def _positions(length: int) -> list[int]:
    """Return every position after the first of a short sequence; of a long one, those around the borders of chunks."""
    borders = (around for border in (16, 32, 64, length) for around in (border - 1, border, border + 1))
    near_borders = sorted({1, *(position for position in borders if 1 <= position < length)})
    return list(range(1, length)) if length < 32 else near_borders


def check_sees_every_token(mixer: TokenMixer, inputs: CheckInputs) -> None:
    """Not causal: the first output depends on the last token."""
    length = inputs.at_least(2)[0]
    x = inputs.tokens(mixer, length, batch=8)  # one item may see too little if the feature map can be zero
    changed = x.clone()
    changed[:, -1] += 1
    difference = (run_mixer(mixer, changed)[:, 0] - run_mixer(mixer, x)[:, 0]).abs().max()
    assert difference > 1e-12, (
        f"claims not to be causal, but with {length} tokens the first output does not depend on the last"
        f"{_format_matrix(mixer, x[:1])}"
    )


def check_permutation_equivariance(mixer: TokenMixer, inputs: CheckInputs) -> None:
    """Permuting the tokens permutes the output."""
    for length in inputs.at_least(2):
        x = inputs.tokens(mixer, length, batch=1)
        order = torch.randperm(length, generator=torch.Generator().manual_seed(2))
        order = order if length > 2 else torch.tensor([1, 0])
        try:
            expected = run_mixer(mixer, x)[:, order]
            assert_close(run_mixer(mixer, x[:, order]), expected, what="the output of permuted tokens")
        except AssertionError as error:
            raise AssertionError(
                f"claims to be permutation-equivariant, but with {length} tokens in the order {order.tolist()}: {error}"
                f"{_format_matrix(mixer, x)}"
            ) from None


def check_repeating_every_token_changes_nothing(mixer: TokenMixer, inputs: CheckInputs) -> None:
    """Repeating every token leaves the output unchanged, which is why a mixer carries over to other resolutions."""
    for length in inputs.lengths:
        x = inputs.tokens(mixer, length)
        twice = run_mixer(mixer, x.repeat_interleave(2, dim=1))
        assert_close(twice[:, ::2], run_mixer(mixer, x), what=f"output with each of {length} tokens repeated")


def _format_matrix(mixer: TokenMixer, x: Tensor) -> str:
    """Format the matrix of the first head as lines, if it is small enough to read."""
    if x.shape[1] > 5:
        return ""
    matrix = structure.mixing_matrix(mixer, x, grid=grid_of(mixer, x.shape[1]))[0, 0]
    matrix = matrix if matrix.ndim == 2 else matrix[0]
    rows = "\n".join("  " + " ".join(f"{entry:9.4f}" for entry in row) for row in matrix.tolist())
    return f"\nThe mixing matrix of its first head (row: the token that sees, column: the token seen):\n{rows}"
