"""Every registered mixer keeps its promises, and the suite catches one that does not."""

import pytest
import torch
import torch.nn.functional as F

from mixers import TokenMixer, create_mixer, list_mixers, registry, structure
from mixers.testing import check_mixer, configurations, parametrize_with_checks
from mixers.testing.tolerances import assert_close
from mixers.traits import Traits
from mixers.zoo.linear_attention import LinearAttention


@parametrize_with_checks(list_mixers())
def test_conformance(mixer: TokenMixer, check) -> None:  # type: ignore[no-untyped-def]
    check(mixer)


def test_the_suite_covers_every_mixer_and_configuration() -> None:
    assert len(list_mixers()) >= 3
    assert len(configurations(list_mixers())) == 2 + 6 + 6
    assert len(check_mixer("linfusion")) >= 10


class LooksAhead(LinearAttention):
    """Claims to be causal."""

    @property
    def traits(self) -> Traits:
        return Traits("causal", normalized=True, positive=True, order_free=False, linear=True)


class ForgetsToNormalise(LinearAttention):
    """Claims to be normalised."""

    @property
    def traits(self) -> Traits:
        return Traits("noncausal", normalized=True, positive=True, order_free=True, linear=True)


@pytest.mark.parametrize(
    ("liar", "normalize", "check"),
    [(LooksAhead, True, "never_looks_ahead.*tokens from"), (ForgetsToNormalise, False, "rows_sum_to_one")],
)
def test_a_wrong_trait_is_caught(liar: type[LinearAttention], normalize: bool, check: str) -> None:
    config = liar.Config(causality="noncausal", normalize=normalize)
    with pytest.raises(AssertionError, match=check):
        check_mixer(lambda: liar(config, 12, 2))


def test_linfusion_starts_as_normalised_linear_attention() -> None:
    linfusion = create_mixer("linfusion", 12, 2).double()
    linear = create_mixer("linear_attention", 12, 2, eps=1e-4).double()
    linear.projections.load_state_dict(linfusion.projections.state_dict())
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    assert_close(linfusion(x), linear(x))


@pytest.mark.parametrize("causality", ["causal", "noncausal"])
def test_softmax_is_attention_as_written(causality: str) -> None:
    mixer = create_mixer("softmax", 12, 2, causality=causality).double()
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    q, k, v = (
        mixer.split(p(x)).transpose(1, 2)
        for p in (mixer.projections.to_q, mixer.projections.to_k, mixer.projections.to_v)
    )
    truth = F.scaled_dot_product_attention(q, k, v, is_causal=causality == "causal").transpose(1, 2).flatten(2)
    assert_close(mixer(x), mixer.projections.to_out(truth))


def test_bidirectional_without_decay_is_noncausal() -> None:
    x = torch.randn(2, 9, 12)
    both = [create_mixer("linear_attention", 12, 2, causality=c) for c in ("bidirectional", "noncausal")]
    both[1].load_state_dict(both[0].state_dict())
    assert torch.equal(both[0](x), both[1](x))


def test_rank_is_at_most_the_number_of_features() -> None:
    matrix = structure.mixing_matrix(
        create_mixer("linear_attention", 12, 2).double(), torch.randn(1, 40, 12, dtype=torch.float64)
    )
    assert (structure.numerical_rank(matrix) <= 6).all()
    assert not structure.is_causal(matrix)


def test_unnormalised_weights_do_not_depend_on_the_number_of_tokens() -> None:
    mixer = create_mixer("linear_attention", 12, 2, normalize=False)
    x = torch.randn(1, 8, 12)
    small, large = structure.mixing_matrix(mixer, x), structure.mixing_matrix(mixer, x.repeat(1, 4, 1))
    assert torch.allclose(small, large[..., :8, :8])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("linfusoin", {}, "Did you mean 'linfusion'"),
        ("linfusion", {"mid_dimm": 3}, "Did you mean 'mid_dim'"),
        ("linfusion", {"mid_dim": 0}, "must be positive"),
        ("softmax", {"normalize": False}, "unbounded"),
        ("softmax", {"causality": "bidirectional"}, "refuses causality"),
        ("linear_attention", {"feature_map": "identity"}, "signed"),
        ("linear_attention", {"feature_map": "elu"}, "Did you mean"),
    ],
)
def test_what_has_no_meaning_is_refused(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer(name, 12, 2, **options)


def test_heads_must_divide_and_tokens_must_fit() -> None:
    with pytest.raises(ValueError, match="does not divide"):
        create_mixer("linear_attention", 12, 5)
    mixer = create_mixer("linear_attention", 12, 2, own_projections=False)
    with pytest.raises(ValueError, match="own_projections=False"):
        mixer(torch.randn(1, 3, 12))
    with pytest.raises(ValueError, match="Expected tokens"):
        create_mixer("linear_attention", 12, 2)(torch.randn(1, 3, 8))
    with pytest.raises(ValueError, match="places for"):
        create_mixer("linear_attention", 12, 2)(torch.randn(1, 6, 12), grid=(2, 2))


def test_listing_by_pattern_and_trait() -> None:
    assert list_mixers("lin*") == ["linear_attention", "linfusion"]
    assert list_mixers(linear=False) == ["softmax"]
    assert registry.entry("linfusion").default_normalize is True
