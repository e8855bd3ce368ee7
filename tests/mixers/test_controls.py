"""The controls of an ablation: no mixing, uniform mixing, and bounded sums without normalized rows."""

from __future__ import annotations

import pytest
import torch

from mixers import create_mixer, list_mixers, registry, structure
from mixers.linear_mixer import LinearMixer
from mixers.testing.tolerances import assert_close

GRID = (4, 6)
LENGTH = 24

# Mixers that can be unnormalized without an order: those for which scale="mean" has a meaning.
SCALABLE = [
    name
    for name in list_mixers()
    if issubclass(registry.get_mixer_entry(name).mixer, LinearMixer)
    and "noncausal" in registry.get_mixer_entry(name).causalities
]


def tokens(length: int = LENGTH) -> torch.Tensor:
    return torch.randn(2, length, 12, dtype=torch.float64)


def test_identity_mixes_nothing() -> None:
    mixer = create_mixer("identity", 12, 2).double()
    x = tokens()
    assert_close(mixer(x), mixer.projections.to_out(mixer.projections.to_v(x)))
    matrix = structure.mixing_matrix(mixer, x)
    assert torch.equal(matrix, torch.eye(LENGTH, dtype=torch.float64).expand(2, 2, -1, -1))
    assert structure.effective_radius(matrix, GRID).abs().max() == 0


def test_identity_with_a_local_convolution_sees_its_window_only() -> None:
    mixer = create_mixer("identity", 12, 2, local_conv_size=3).double()
    x = tokens().requires_grad_()
    mixer(x, grid=GRID)[:, 2 * GRID[1] + 2].sum().backward()
    assert x.grad is not None
    visible = x.grad[0].abs().sum(-1).nonzero().flatten()
    assert (visible // GRID[1]).unique().tolist() == [1, 2, 3]
    assert (visible % GRID[1]).unique().tolist() == [1, 2, 3]


def test_uniform_is_the_mean_over_visible_tokens() -> None:
    x = tokens()
    mixer = create_mixer("uniform", 12, 2).double()
    v = mixer.projections.to_v(x)
    assert_close(mixer(x), mixer.projections.to_out(v.mean(1, keepdim=True).expand_as(v)))
    causal = create_mixer("uniform", 12, 2, causality="causal").double()
    causal.load_state_dict(mixer.state_dict())
    means = torch.stack([v[:, : i + 1].mean(1) for i in range(LENGTH)], dim=1)
    assert_close(causal(x), mixer.projections.to_out(means))


def test_controls_have_no_projections_that_they_do_not_use() -> None:
    for name in ("identity", "uniform"):
        names = {n.split(".")[1] for n in create_mixer(name, 12, 2).state_dict() if n.startswith("projections.")}
        assert names == {"to_v", "to_out"}


@pytest.mark.parametrize("name", SCALABLE)
@pytest.mark.parametrize("length", [6, 24])
def test_mean_scale_is_the_constant_times_reference_length_over_length(name: str, length: int) -> None:
    entry = registry.get_mixer_entry(name)
    options = {**entry.mixer.tiny_options, **entry.mixer.drop_in_options, "reference_length": 12}
    constant = create_mixer(name, 12, 2, causality="noncausal", normalize=False, **options).double()
    mean = create_mixer(name, 12, 2, causality="noncausal", normalize=False, scale="mean", **options).double()
    mean.load_state_dict(constant.state_dict())
    x = tokens(length)
    grid = (2, length // 2)
    matrix = structure.mixing_matrix(constant, x, grid=grid)
    assert_close(structure.mixing_matrix(mean, x, grid=grid), matrix * 12 / length)
    assert_close(
        structure.probed_matrix(mean, x, grid=grid), structure.probed_matrix(constant, x, grid=grid) * 12 / length
    )


def test_mean_scale_bounds_sums_and_does_not_normalize_rows() -> None:
    """Row sums of a repeated image: constant ones grow with it, mean ones do not, and still differ between rows."""
    x = tokens()
    for scale, growth in (("constant", 4.0), ("mean", 1.0)):
        mixer = create_mixer("linear_attention", 12, 2, normalize=False, scale=scale).double()
        small = structure.row_sums(structure.mixing_matrix(mixer, x))
        large = structure.row_sums(structure.mixing_matrix(mixer, x.repeat(1, 4, 1)))
        assert_close(large[..., :LENGTH], small * growth)
        assert small.std() > 0.01 * small.mean()
        assert mixer.traits.repetition_invariant == (scale == "mean") and not mixer.traits.normalized


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalize": True}, "normalize=False"),
        ({"normalize": False, "causality": "causal"}, "causality='noncausal'"),
        ({"normalize": False, "scale": "maen"}, "Did you mean 'mean'"),
        ({"normalize": False, "reference_length": 0}, "reference_length > 0"),
    ],
)
def test_mean_scale_is_refused_where_it_has_no_meaning(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer("linear_attention", 12, 2, **({"scale": "mean"} | options))


@pytest.mark.parametrize("name", SCALABLE)
def test_unnormalized_sums_over_many_tokens_fit_float16(name: str) -> None:
    """Decay bounds no sum without an order, so the constant of every drop-in form has to."""
    mixer = create_mixer(name, 16, 2, causality="noncausal", normalize=False, own_projections=False).half()
    if mixer.traits.needs_grid:
        pytest.skip("positions in the image")
    own = create_mixer("linear_attention", 16, 2).half()
    x = torch.randn(1, 1, 16, dtype=torch.float16)
    for tokens in (torch.randn(1, 100_000, 16).half(), x.expand(1, 100_000, 16)):
        with torch.no_grad():
            assert mixer(tokens, projections=own.projections).isfinite().all()
