"""Promises about the matrix that a mixer is."""

from __future__ import annotations

import torch
from torch import Tensor

from mixers import structure
from mixers.mixer import TokenMixer
from mixers.operators.choice import FORMULATIONS
from mixers.streams import with_values
from mixers.testing.inputs import Inputs, grid_of, has_option, run, through_its_matrix, with_option, without_eps
from mixers.testing.tolerances import assert_close


def check_forward_equals_its_matrix(mixer: TokenMixer, inputs: Inputs) -> None:
    """mixer(x) = to_out(W v) with W from the formula, forward and gradient."""
    for length in inputs.lengths:
        x = inputs.tokens(mixer, length).requires_grad_()
        fast, truth = run(mixer, x), through_its_matrix(mixer, x)
        assert_close(fast, truth, what=f"forward at l = {length}")
        weighting = inputs.tokens(mixer, length, stream=1)
        (got,) = torch.autograd.grad((fast * weighting).sum(), x)
        (wanted,) = torch.autograd.grad((truth * weighting).sum(), x)
        assert_close(got, wanted, what=f"gradient at l = {length}")


def check_matrix_by_probing(mixer: TokenMixer, inputs: Inputs) -> None:
    """The matrix from the formula is the one that mixing basis values shows."""
    length = min(max(inputs.lengths), 12)
    x, grid = inputs.tokens(mixer, length), grid_of(mixer, length)
    formula, probed = structure.mixing_matrix(mixer, x, grid=grid), structure.probed_matrix(mixer, x, grid=grid)
    formula = formula if formula.ndim == 5 else formula[:, :, None].expand_as(probed)
    assert_close(probed, formula, what="matrix by probing")


def check_formulations_agree(mixer: TokenMixer, inputs: Inputs) -> None:
    """dense, recurrent and chunked give the same output, and the same gradient of every parameter."""
    names = ["output", *(name for name, _ in mixer.named_parameters())]
    for length in inputs.lengths:
        outcomes = {name: _outcome(with_option(mixer, backend=name), inputs, length) for name in FORMULATIONS}
        for backend in FORMULATIONS[1:]:
            for name, got, wanted in zip(names, outcomes[backend], outcomes[FORMULATIONS[0]], strict=True):
                assert_close(got, wanted, what=f"{backend} against dense, {name}, l = {length}")


def _outcome(mixer: TokenMixer, inputs: Inputs, length: int) -> list[Tensor]:
    y = run(mixer, inputs.tokens(mixer, length))
    loss = (y * inputs.tokens(mixer, length, stream=1)).sum()
    gradients = torch.autograd.grad(loss, list(mixer.parameters()), allow_unused=True, materialize_grads=True)
    return [y, *gradients]


def check_rows_sum_to_one(mixer: TokenMixer, inputs: Inputs) -> None:
    """Normalized: a row sums to one where eps is 0, to at most one where it is not.

    A row may be all zeros where the feature map can be (relu): such a token sees nothing.
    """
    rows = []
    for length in inputs.lengths:
        x, grid = inputs.tokens(mixer, length), grid_of(mixer, length)
        if mixer.traits.positive:
            sums = structure.row_sums(structure.mixing_matrix(mixer, x, grid=grid))
            assert (sums <= 1 + 1e-9).all(), f"a row of {length} sums to {sums.max():.6f}, at most 1 is right"
        weights = structure.mixing_matrix(without_eps(mixer), x, grid=grid)
        seen = (weights != 0).any(-1)
        rows.append(seen.flatten())
        sums = structure.row_sums(weights)[seen]
        assert_close(sums, torch.ones_like(sums), what=f"row sums without eps at l = {length}")
    found = torch.cat(rows)
    assert found.numel() < 64 or found.double().mean() > 0.5, "most rows are all zeros"


def check_constant_values_are_kept(mixer: TokenMixer, inputs: Inputs) -> None:
    """Normalized: values that are the same for every token come out as they went in, where eps is 0."""
    exact = without_eps(mixer)
    for length in inputs.lengths:
        streams = inputs.streams(exact, length)
        constant = streams.v[:, :1].expand_as(streams.v)
        y = exact.mix(with_values(streams, constant))
        seen = (exact.mixing_matrix(streams) != 0).any(-1)
        seen = (seen if seen.ndim == 3 else seen.any(2)).transpose(1, 2)[..., None]
        assert_close(y, constant * seen, what=f"output for constant values at l = {length}")


def check_weights_are_positive(mixer: TokenMixer, inputs: Inputs) -> None:
    """No weight is negative."""
    for length in inputs.lengths:
        x = inputs.tokens(mixer, length)
        smallest = structure.mixing_matrix(mixer, x, grid=grid_of(mixer, length)).min()
        assert smallest >= 0, f"with {length} tokens a weight is {smallest:.3g}"


def check_linear_in_values(mixer: TokenMixer, inputs: Inputs) -> None:
    """mix(2 v + w) = 2 mix(v) + mix(w): the weights do not depend on the values."""
    for length in inputs.lengths:
        streams = inputs.streams(mixer, length)
        other = streams.v.flip(1)
        both = mixer.mix(with_values(streams, 2 * streams.v + other))
        parts = 2 * mixer.mix(streams) + mixer.mix(with_values(streams, other))
        assert_close(both, parts, what=f"output of 2 v + w at l = {length}")


def check_heads_are_independent(mixer: TokenMixer, inputs: Inputs) -> None:
    """A head's result before the output stage depends on its own values alone."""
    for length in inputs.lengths:
        streams = inputs.streams(mixer, length)
        other = streams.v.clone()
        other[:, :, 0] += 1
        before, after = mixer.mix(streams), mixer.mix(with_values(streams, other))
        assert_close(after[:, :, 1:], before[:, :, 1:], what="other heads when the first head's values change")


def check_state_size_is_enough(mixer: TokenMixer, inputs: Inputs) -> None:
    """Causal: what later tokens take from earlier ones fits the state: rank of W's lower-left block · v ≤ state."""
    x = inputs.tokens(mixer, 32, batch=1)
    weights = structure.mixing_matrix(mixer, x)
    ranks = structure.numerical_rank(weights[..., 16:, :16])
    needed = int(ranks.sum()) * (mixer.head_dim if weights.ndim == 4 else 1)
    told = mixer.state_size(16)
    assert needed <= told, f"ranks {ranks.flatten().tolist()} take {needed} numbers, state_size tells {told}"


def has_formulations(mixer: TokenMixer) -> bool:
    """Whether its operator is chosen by an option `backend`."""
    return has_option(mixer, "backend")
