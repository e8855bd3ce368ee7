"""Normalizers: the published formulas written out once more, and what each is refused for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mixers import TokenMixer, create_mixer, structure
from mixers.stages.rotary import rotary_2d
from mixers.testing.tolerances import assert_close
from mixers.traits import CAUSALITIES
from tests.mixers.builders import disturbed, float64

LENGTH = 12
GRID = (3, 4)


def drop_in(name: str, **options: Any) -> TokenMixer:
    """The drop-in form in float64, with projections of its own, away from its start."""
    torch.manual_seed(0)
    options = dict(type(create_mixer(name, 12, 2)).drop_in_options) | options
    return disturbed(create_mixer(name, 12, 2, **options))


def streams_of(mixer: TokenMixer, x: Tensor) -> Any:
    return mixer.compute_streams(x, mixer.resolve_projections(None), GRID)


def visible(causality: str) -> Tensor:
    everything = torch.ones(LENGTH, LENGTH, dtype=torch.float64)
    return everything.tril() if causality == "causal" else everything


@pytest.mark.parametrize("causality", CAUSALITIES)
def test_subtraction_on_linear_attention_is_inline(causality: str) -> None:
    inline = drop_in("inline", causality=causality)
    linear = drop_in("linear_attention", causality=causality, normalizer="subtract", feature_map="identity")
    streams = streams_of(inline, float64(2, LENGTH, 12))
    assert_close(linear.mix(streams), inline.mix(streams))
    scores = torch.einsum("bihk,bjhk->bhij", streams.q, streams.k) / 6**0.5 * visible(causality)
    counts = visible(causality).sum(-1, keepdim=True)
    expected = visible(causality) * (scores + 1 - scores.sum(-1, keepdim=True) / counts) / counts
    assert_close(inline.mixing_matrix(streams), expected)


@pytest.mark.parametrize("normalizer", ["subtract", "decoupled"])
def test_decayed_scores_in_loops_over_tokens(normalizer: str) -> None:
    """GLA: the state, the positive state and the mean of the values, token by token."""
    mixer = drop_in("gla", normalize=True, normalizer=normalizer)
    streams = streams_of(mixer, float64(1, LENGTH, 12))
    state = torch.zeros(1, 2, 6, 6, dtype=torch.float64)
    sums = torch.zeros(1, 2, 6, dtype=torch.float64)
    rows = []
    for t in range(LENGTH):
        q, k, v, a = (s[:, t] for s in (streams.q, streams.k, streams.v, streams.log_decay.exp()))
        state = a[..., None] * state + k[..., None] * v[..., None, :]
        mixed = (q[..., None] * state).sum(-2)
        if normalizer == "decoupled":
            sums = a * sums + k.relu()
            rows.append(mixed / ((q.relu() * sums).sum(-1, keepdim=True) + 1e-6))
        else:
            sums = a * sums + k
            mean = streams.v[:, : t + 1].mean(1)
            rows.append((mixed - (q * sums).sum(-1, keepdim=True) * mean) / 6**0.5 + mean)
    assert_close(mixer.mix(streams), torch.stack(rows, dim=1))


def test_decoupled_mila_is_sana_video_2() -> None:
    """Rotated q and k without a map over relu(q)·mean relu(k), which are not rotated (2607.21553, without key gate)."""
    mixer = drop_in("mila", normalizer="decoupled", eps=1e-8)
    streams = streams_of(mixer, float64(2, LENGTH, 12))
    q, k = (rotary_2d(t.flatten(2)[:, :, None], GRID).view_as(t) for t in (streams.q, streams.k))
    numerator = torch.einsum("bihk,bjhk->bhij", q, k) / LENGTH
    sums = torch.einsum("bihk,bhk->bhi", streams.q.relu(), streams.k.relu().mean(1)) + 1e-8
    assert_close(mixer.mixing_matrix(streams), numerator / sums[..., None])


@pytest.mark.parametrize("causality", CAUSALITIES)
@pytest.mark.parametrize("name", ["kda", "gated_deltanet"])
def test_the_delta_rule_is_divided_by_the_same_rule_on_relu(name: str, causality: str) -> None:
    mixer = drop_in(name, causality=causality, normalize=True, normalizer="decoupled")
    streams = streams_of(mixer, float64(2, LENGTH, 12))
    signed = drop_in(name, causality=causality, normalize=False).mixing_matrix(streams) * 6**0.5
    positive = drop_in(name, causality=causality, feature_map="relu", eps=1e-200, normalize=True)
    ones = torch.ones_like(streams.v[..., :1])
    sums = positive.apply_unnormalized(streams, ones).transpose(1, 2)
    assert_close(mixer.mixing_matrix(streams), signed / (sums + 1e-6))


def test_rows_sum_to_one_only_if_the_trait_says_so() -> None:
    x = float64(2, LENGTH, 12)
    for name in ("linear_attention", "gla", "mamba", "rwkv6", "hydra", "kda"):
        for normalizer, expected in (("row_sum", True), ("subtract", True), ("decoupled", False)):
            mixer = drop_in(name, normalize=True, normalizer=normalizer, eps=1e-200)
            assert mixer.traits.normalized == expected
            sums = structure.row_sums(structure.mixing_matrix(mixer, x))
            assert ((sums - 1).abs().max() < 1e-8) == expected, (name, normalizer)


def test_the_paper_decides_if_no_normalizer_is_named() -> None:
    assert create_mixer("inline", 12, 2).config.row_normalizer == "subtract"
    assert create_mixer("linear_attention", 12, 2).config.row_normalizer == "row_sum"
    assert create_mixer("gla", 12, 2).config.row_normalizer is None
    divided = create_mixer("inline", 12, 2, normalizer="row_sum")
    assert divided.traits.positive and divided.feature_map_name(divided.config) == "elu_plus_one"
    assert create_mixer("linear_attention", 12, 2, normalizer="decoupled").traits.positive is False


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("linear_attention", {"normalizer": "softmax"}, "Unknown normalizer 'softmax'"),
        ("linear_attention", {"normalizer": "subtract", "normalize": False}, "needs normalize=True"),
        ("softmax", {"normalizer": "subtract"}, "does not support normalizer='subtract'"),
        ("uniform", {"normalizer": "decoupled"}, "does not support normalizer='decoupled'"),
        ("focused", {"normalizer": "decoupled"}, "positive by construction"),
        ("kda", {"normalizer": "decoupled", "normalize": True, "allow_neg_eigval": True}, "row sums of ordinary"),
    ],
)
def test_what_has_no_meaning_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer(name, 12, 2, **options)
