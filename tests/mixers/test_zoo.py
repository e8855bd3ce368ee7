"""Every registered mixer keeps its promises, and the suite catches one that does not."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixers import TokenMixer, list_mixers, structure
from mixers.testing import Configuration, check_mixer, configurations, parametrize_with_checks
from mixers.testing.strategies import registered
from mixers.testing.tolerances import assert_close
from mixers.traits import Traits
from mixers.zoo.linear_attention import LinearAttention


@parametrize_with_checks(list_mixers())
def test_conformance(mixer: TokenMixer, check: Callable[[TokenMixer], None]) -> None:
    check(mixer)


def test_the_suite_covers_every_mixer_and_configuration() -> None:
    assert len(list_mixers()) >= 3
    assert {c.name for c in configurations(list_mixers())} == set(list_mixers())
    assert len(configurations(["softmax", "linear_attention", "linfusion"])) == 2 + 6 + 6
    assert len(check_mixer("linfusion")) >= 12


@given(configuration=registered(), length=st.integers(1, 80))
def test_forward_is_the_matrix_at_any_length(configuration: Configuration, length: int) -> None:
    mixer = configuration()
    x = torch.randn(1, length, mixer.dim, dtype=torch.float64)
    values = mixer.split(mixer.projections.to_v(x))
    mixed = torch.einsum("bhij,bjhv->bihv", structure.mixing_matrix(mixer, x), values).flatten(2)
    assert_close(mixer(x), mixer.projections.to_out(mixed))


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


class ClaimsNoOrder(LinearAttention):
    """Causal, but claims to be order-free."""

    @property
    def traits(self) -> Traits:
        return Traits("causal", normalized=True, positive=True, order_free=True, linear=True)


class KeepsItsOwnValues(LinearAttention):
    """Adds a copy of to_v of its own, which a host's LoRA or quantisation would not reach."""

    def __init__(self, *args, **settings) -> None:  # type: ignore[no-untyped-def]
        super().__init__(*args, **settings)
        self.copied = torch.nn.Linear(self.dim, self.dim, bias=False)

    def host(self, projections):  # type: ignore[no-untyped-def]
        host = super().host(projections)
        if projections is not None:
            host.to_v = self.copied
        return host


LIARS = [
    (LooksAhead, "noncausal", True, "never_looks_ahead.*tokens from"),
    (ForgetsToNormalise, "noncausal", False, "rows_sum_to_one"),
    (ClaimsNoOrder, "causal", True, "permutation_equivariance"),
    (KeepsItsOwnValues, "noncausal", False, "projections_are_called"),
]


@pytest.mark.parametrize(("liar", "causality", "normalize", "check"), LIARS)
def test_a_broken_promise_is_caught(liar: type[LinearAttention], causality: str, normalize: bool, check: str) -> None:
    config = liar.Config(causality=causality, normalize=normalize)
    with pytest.raises(AssertionError, match=check):
        check_mixer(lambda: liar(config, 12, 2))


def test_exceptions_are_data_and_strict() -> None:
    broken = LooksAhead.Config(causality="noncausal")
    known = {"check_never_looks_ahead": "it sees every token"}
    assert "check_never_looks_ahead" not in check_mixer(lambda: LooksAhead(broken, 12, 2), exceptions=known)
    with pytest.raises(AssertionError, match="take it off the exceptions"):
        check_mixer("linear_attention", causality="causal", exceptions=known)
    with pytest.raises(ValueError, match="names no check"):
        check_mixer("linear_attention", exceptions={"check_nothing": "?"})
    with pytest.raises(ValueError, match="No mixer to check"):
        parametrize_with_checks([])
