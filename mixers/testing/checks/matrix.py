"""Promises about the matrix that a mixer applies to its values."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from mixers import structure
from mixers.mixer import TokenMixer
from mixers.operators.backend import FORMULATIONS
from mixers.streams import with_values
from mixers.testing.inputs import (
    CheckInputs,
    apply_through_matrix,
    as_causal,
    flip_tokens,
    grid_of,
    has_option,
    run_mixer,
    slice_tokens,
    with_option,
    without_eps,
)
from mixers.testing.tolerances import assert_close

LONG = 257


def check_forward_equals_its_matrix(mixer: TokenMixer, inputs: CheckInputs) -> None:
    """mixer(x) = to_out(W v) with W from the formula, in output and gradient."""
    for length in inputs.lengths:
        x = inputs.tokens(mixer, length).requires_grad_()
        fast = run_mixer(mixer, x)
        truth = apply_through_matrix(mixer, x)
        assert_close(fast, truth, what=f"output at l = {length}")
        weighting = inputs.tokens(mixer, length, stream=1)
        (actual,) = torch.autograd.grad((fast * weighting).sum(), x)
        (expected,) = torch.autograd.grad((truth * weighting).sum(), x)
        assert_close(actual, expected, what=f"gradient at l = {length}")


def check_matrix_by_probing(mixer: TokenMixer, inputs: CheckInputs) -> None:
    """The matrix from the formula equals the one measured with basis values."""
    length = min(max(inputs.lengths), 12)
    x = inputs.tokens(mixer, length)
    grid = grid_of(mixer, length)
    formula = structure.mixing_matrix(mixer, x, grid=grid)
    probed = structure.probed_matrix(mixer, x, grid=grid)
    formula = formula if formula.ndim == 5 else formula[:, :, None].expand_as(probed)
    assert_close(probed, formula, what="matrix by probing")


def check_matrix_by_differentiating(mixer: TokenMixer, inputs: CheckInputs) -> None:
    """If the result is not linear in the values, the matrix is its derivative by the values."""
    streams = inputs.streams(mixer, min(max(inputs.lengths), 6), batch=1)
    formula = mixer.mixing_matrix(streams)
    jacobian = torch.func.jacrev(lambda v: mixer.mix(with_values(streams, v)))(streams.v)
    derivative = torch.einsum("bihvbjhv->bhvij", jacobian)
    formula = formula if formula.ndim == 5 else formula[:, :, None].expand_as(derivative)
    assert_close(formula, derivative, what="matrix by differentiating")


def check_formulations_agree(mixer: TokenMixer, inputs: CheckInputs) -> None:
    """dense, recurrent and chunked give the same output and the same gradient of every parameter."""
    names = ["output", *(name for name, _ in mixer.named_parameters())]
    for length in inputs.lengths:
        outcomes = {
            name: _output_and_gradients(with_option(mixer, backend=name), inputs, length) for name in FORMULATIONS
        }
        for backend in FORMULATIONS[1:]:
            for name, actual, expected in zip(names, outcomes[backend], outcomes[FORMULATIONS[0]], strict=True):
                assert_close(actual, expected, what=f"{backend} against dense, {name}, l = {length}")


def _output_and_gradients(mixer: TokenMixer, inputs: CheckInputs, length: int) -> list[Tensor]:
    y = run_mixer(mixer, inputs.tokens(mixer, length))
    loss = (y * inputs.tokens(mixer, length, stream=1)).sum()
    gradients = torch.autograd.grad(loss, list(mixer.parameters()), allow_unused=True, materialize_grads=True)
    return [y, *gradients]


def check_every_head_has_its_temperature(mixer: TokenMixer, inputs: CheckInputs) -> None:
    """Learned temperatures that differ between heads act on the output as they do on the matrix."""
    config = dataclasses.replace(mixer.config, temperature=True)  # type: ignore[call-arg]
    warm = type(mixer)(config, mixer.dim, mixer.heads).double()
    warm.load_state_dict(mixer.state_dict(), strict=False)
    temperature = warm.get_parameter("log_temperature")
    torch.nn.init.uniform_(temperature, -0.5, 0.5, generator=torch.Generator().manual_seed(inputs.seed))
    for length in inputs.lengths:
        x = inputs.tokens(warm, length)
        assert_close(run_mixer(warm, x), apply_through_matrix(warm, x), what=f"output at l = {length}")


def supports_temperature(mixer: TokenMixer) -> bool:
    """Return whether the mixer has the option `temperature`, and a matrix to compare with."""
    return _accepts(mixer, temperature=True) and mixer.traits.linear_in_values


def check_mean_scale_is_a_factor(mixer: TokenMixer, inputs: CheckInputs) -> None:
    """Unnormalized: scale="mean" multiplies the weights by reference_length / l."""
    mean = with_option(mixer, scale="mean")
    for length in inputs.lengths:
        streams = inputs.streams(mixer, length)
        factor = mean.config.reference_length / length  # type: ignore[attr-defined]
        assert_close(mean.mix(streams), mixer.mix(streams) * factor, what=f"output at l = {length}")
        matrix = mixer.mixing_matrix(streams) * factor
        assert_close(mean.mixing_matrix(streams), matrix, what=f"matrix at l = {length}")


def supports_mean_scale(mixer: TokenMixer) -> bool:
    """Return whether weights are scaled by a constant, and can be scaled by the number of tokens instead."""
    return getattr(mixer.config, "scale", None) == "constant" and _accepts(mixer, scale="mean")


def _accepts(mixer: TokenMixer, **options: Any) -> bool:
    if not all(has_option(mixer, name) for name in options):
        return False
    try:
        dataclasses.replace(mixer.config, **options)
    except ValueError:
        return False
    return True


def check_rows_sum_to_one(mixer: TokenMixer, inputs: CheckInputs) -> None:
    """Normalized: a row sums to one if eps is negligible, and to at most one otherwise.

    A row may be all zeros if the feature map can be zero (relu): such a token sees nothing.
    """
    nonzero_rows = []
    for length in inputs.lengths:
        x = inputs.tokens(mixer, length)
        grid = grid_of(mixer, length)
        if mixer.traits.positive:
            sums = structure.row_sums(structure.mixing_matrix(mixer, x, grid=grid))
            assert (sums <= 1 + 1e-9).all(), f"a row of {length} entries sums to {sums.max():.6f}, expected at most 1"
        matrix = structure.mixing_matrix(without_eps(mixer), x, grid=grid)
        nonzero = (matrix != 0).any(-1)
        nonzero_rows.append(nonzero.flatten())
        sums = structure.row_sums(matrix)[nonzero]
        assert_close(sums, torch.ones_like(sums), what=f"row sums without eps at l = {length}")
    rows = torch.cat(nonzero_rows)
    assert rows.numel() < 64 or rows.double().mean() >= 0.5, "most rows are all zeros"


def check_constant_values_are_kept(mixer: TokenMixer, inputs: CheckInputs) -> None:
    """Normalized: values that are equal for all tokens come out unchanged if eps is negligible."""
    exact = without_eps(mixer)
    for length in inputs.lengths:
        streams = inputs.streams(exact, length)
        constant = streams.v[:, :1].expand_as(streams.v)
        y = exact.mix(with_values(streams, constant))
        nonzero = (exact.mixing_matrix(streams) != 0).any(-1)
        nonzero = nonzero if nonzero.ndim == 4 else nonzero[:, :, None]  # (b, h, v or 1, l)
        assert_close(y, constant * nonzero.permute(0, 3, 1, 2), what=f"output for constant values at l = {length}")


def check_matrix_is_nonnegative(mixer: TokenMixer, inputs: CheckInputs) -> None:
    """No entry of the matrix is negative."""
    for length in inputs.lengths:
        x = inputs.tokens(mixer, length)
        smallest = structure.mixing_matrix(mixer, x, grid=grid_of(mixer, length)).min()
        assert smallest >= 0, f"with {length} tokens an entry is {smallest:.3g}"


def check_linear_in_values(mixer: TokenMixer, inputs: CheckInputs) -> None:
    """mix(2 v + w) = 2 mix(v) + mix(w): the matrix does not depend on the values."""
    for length in inputs.lengths:
        streams = inputs.streams(mixer, length)
        other = streams.v.flip(1)
        both = mixer.mix(with_values(streams, 2 * streams.v + other))
        parts = 2 * mixer.mix(streams) + mixer.mix(with_values(streams, other))
        assert_close(both, parts, what=f"output of 2 v + w at l = {length}")


def has_state(mixer: TokenMixer) -> bool:
    """Return whether it is causal, and linear in one order of the tokens."""
    return mixer.traits.causality == "causal" and mixer.traits.linear and not mixer.traits.needs_grid


def check_state_size_is_enough(mixer: TokenMixer, inputs: CheckInputs) -> None:
    """Causal: what later tokens receive from earlier ones fits the state: rank of W's lower-left block · v ≤ state."""
    x = inputs.tokens(mixer, 32, batch=1)
    matrix = structure.mixing_matrix(mixer, x)
    ranks = structure.numerical_rank(matrix[..., 16:, :16])
    needed = int(ranks.sum()) * (mixer.head_dim if matrix.ndim == 4 else 1)
    size = mixer.state_size(16)
    assert needed <= size, f"ranks {ranks.flatten().tolist()} need {needed} numbers, state_size is {size}"


def has_fixed_entries(mixer: TokenMixer) -> bool:
    """Return whether a pair's entry of W depends only on these tokens and those between them, up to a row's factor.

    Not if entries depend on positions in the image, or on the number of tokens (`scale="mean"`).
    """
    traits = mixer.traits
    is_local = traits.linear and traits.pairwise and not traits.needs_grid
    scaled_by_length = getattr(mixer.config, "scale", None) == "mean"
    return is_local and not scaled_by_length and (traits.positive or not mixer.config.normalize)


def check_a_token_sees_itself(mixer: TokenMixer, inputs: CheckInputs) -> None:
    """W_ii is zero only where a feature map is zero; unnormalized, it does not depend on the other tokens."""
    nonzero = []
    for length in inputs.lengths:
        streams = inputs.streams(mixer, length)
        diagonal = mixer.mixing_matrix(streams).diagonal(dim1=-2, dim2=-1)
        nonzero.append((diagonal != 0).flatten())
        if not mixer.traits.normalized:
            alone = [mixer.mixing_matrix(slice_tokens(streams, i, i + 1))[..., 0, 0] for i in range(length)]
            assert_close(diagonal, torch.stack(alone, dim=-1), what=f"the diagonal of W at l = {length}, tokens alone")
    share = torch.cat(nonzero).double().mean()
    assert share > 0.5, f"{1 - share:.0%} of the tokens do not see themselves"


def check_part_of_the_matrix_is_the_matrix_of_the_part(mixer: TokenMixer, inputs: CheckInputs) -> None:
    """Consecutive tokens mix as they would without the tokens around them; normalized, up to a factor per row.

    Tried with parts of 257 tokens as well, so that nothing changes after some number of tokens.
    """
    for length in (*inputs.at_least(2), LONG):
        streams = inputs.streams(mixer, length, batch=1)
        whole = mixer.mixing_matrix(streams)
        for start, stop in ((length // 2, length), (length - min(length, 7), length), (0, max(1, length // 3))):
            part = mixer.mixing_matrix(slice_tokens(streams, start, stop))
            what = f"W among tokens {start} … {stop - 1} of {length}"
            _assert_same_rows(whole[..., start:stop, start:stop], part, mixer.traits.normalized, what)


def is_two_causal_passes(mixer: TokenMixer) -> bool:
    """Return whether it is bidirectional, with a causal form that has the same parameters.

    Not if it depends on positions: in the image, or by rotary embeddings, whose angles change sign in reversed order.
    """
    comparable = mixer.traits.positive or not mixer.config.normalize
    positional = mixer.traits.needs_grid or getattr(mixer.config, "rotary", False) is not False
    is_bidirectional = mixer.traits.causality == "bidirectional"
    return is_bidirectional and comparable and not positional and as_causal(mixer) is not None


def check_bidirectional_is_two_causal_passes(mixer: TokenMixer, inputs: CheckInputs) -> None:
    """W is the sum of a causal and a reversed pass, with the diagonal counted once; normalized, up to row factors."""
    causal = as_causal(mixer)
    assert causal is not None
    for length in inputs.lengths:
        streams = inputs.streams(mixer, length)
        matrix = mixer.mixing_matrix(streams)
        forward = causal.mixing_matrix(streams)
        reverse = causal.mixing_matrix(flip_tokens(streams)).flip(-1, -2)
        what = f"of a bidirectional mixer at l = {length}"
        _assert_same_rows(matrix.tril(), forward, mixer.traits.normalized, f"the lower triangle {what}")
        _assert_same_rows(matrix.triu(), reverse, mixer.traits.normalized, f"the upper triangle {what}")


def _assert_same_rows(actual: Tensor, expected: Tensor, normalized: bool, what: str) -> None:
    """Compare matrices (…, l, l), of normalized mixers up to a positive factor for every row."""
    if normalized:
        actual_sums = actual.sum(-1, keepdim=True)
        expected_sums = expected.sum(-1, keepdim=True)
        assert torch.equal(actual_sums != 0, expected_sums != 0), f"{what}: a row is all zeros, where none is expected"
        actual, expected = (actual * expected_sums, expected * actual_sums)
    assert_close(actual, expected, what=what)
