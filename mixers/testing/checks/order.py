"""Promises about the order and the number of tokens; tried on few tokens first, so that a failure can be read."""

from __future__ import annotations

import torch

from mixers import structure
from mixers.mixer import TokenMixer
from mixers.testing.inputs import Inputs, grid_of, run
from mixers.testing.tolerances import assert_close


def check_never_looks_ahead(mixer: TokenMixer, inputs: Inputs) -> None:
    """Causal: changing later tokens changes no earlier output; the smallest failing case is shown."""
    for length in inputs.at_least(2):
        x = inputs.tokens(mixer, length, batch=1)
        y = run(mixer, x)
        for place in range(1, length):
            changed = x.clone()
            changed[:, place:] += 1
            try:
                assert_close(run(mixer, changed)[:, :place], y[:, :place], what="earlier outputs")
            except AssertionError as error:
                raise AssertionError(
                    f"claims to be causal, but with {length} tokens a change of tokens from {place} on shows in "
                    f"{error}{_shown(mixer, x)}"
                ) from None


def check_sees_every_token(mixer: TokenMixer, inputs: Inputs) -> None:
    """Not causal: the first output depends on the last token."""
    length = inputs.at_least(2)[0]
    x = inputs.tokens(mixer, length, batch=8)  # one may see too little where a feature map can be zero
    changed = x.clone()
    changed[:, -1] += 1
    apart = (run(mixer, changed)[:, 0] - run(mixer, x)[:, 0]).abs().max()
    assert apart > 1e-12, (
        f"claims not to be causal, but with {length} tokens the first output does not depend on the last"
        f"{_shown(mixer, x[:1])}"
    )


def check_permutation_equivariance(mixer: TokenMixer, inputs: Inputs) -> None:
    """Order-free: permuting the tokens permutes the output."""
    for length in inputs.at_least(2):
        x = inputs.tokens(mixer, length, batch=1)
        order = torch.randperm(length, generator=torch.Generator().manual_seed(2))
        order = order if length > 2 else torch.tensor([1, 0])
        try:
            assert_close(run(mixer, x[:, order]), run(mixer, x)[:, order], what="the output of permuted tokens")
        except AssertionError as error:
            raise AssertionError(
                f"claims to be permutation-equivariant, but with {length} tokens in the order {order.tolist()}: {error}"
                f"{_shown(mixer, x)}"
            ) from None


def check_repeating_every_token_changes_nothing(mixer: TokenMixer, inputs: Inputs) -> None:
    """Twice the tokens, the same output: why a mixer carries over to other resolutions."""
    for length in inputs.lengths:
        x = inputs.tokens(mixer, length)
        twice = run(mixer, x.repeat_interleave(2, dim=1))
        assert_close(twice[:, ::2], run(mixer, x), what=f"output with each of {length} tokens repeated")


def check_weights_do_not_depend_on_the_number_of_tokens(mixer: TokenMixer, inputs: Inputs) -> None:
    """Unnormalized and order-free: two tokens' weight is theirs alone; dividing by l would be a normalization."""
    for length in inputs.lengths:
        x = inputs.tokens(mixer, 2 * length)
        few = structure.mixing_matrix(mixer, x[:, :length], grid=grid_of(mixer, length))
        many = structure.mixing_matrix(mixer, x, grid=grid_of(mixer, 2 * length))
        assert_close(many[..., :length, :length], few, what=f"weights of the first {length} among {2 * length} tokens")


def check_batch_items_are_independent(mixer: TokenMixer, inputs: Inputs) -> None:
    """An item's output does not depend on its neighbors in the batch."""
    for length in inputs.lengths:
        x = inputs.tokens(mixer, length, batch=3)
        assert_close(run(mixer, x)[1:2], run(mixer, x[1:2]), what=f"item alone against in a batch, l = {length}")


def _shown(mixer: TokenMixer, x: torch.Tensor) -> str:
    if x.shape[1] > 5:
        return ""
    matrix = structure.mixing_matrix(mixer, x, grid=grid_of(mixer, x.shape[1]))[0, 0]
    matrix = matrix if matrix.ndim == 2 else matrix[0]
    rows = "\n".join("  " + " ".join(f"{w:9.4f}" for w in row) for row in matrix.tolist())
    return f"\nThe mixing matrix of its first head (row: the token that sees, column: the token seen):\n{rows}"
