"""The delta rule divided by its row sums, and without an order: formulas written out once more, signs of row sums."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mixers.operators.delta import delta_rule, delta_rule_matrix
from mixers.operators.linear import linear_attention
from mixers.testing.tolerances import assert_close
from mixers.traits import CAUSALITIES

BACKENDS = ("dense", "recurrent", "chunked")
DECAYS = {"none": None, "fixed": "h", "token": "blh", "channel": "blhk"}
BATCH = 2
HEADS = 2
KEY = 5


def signed_inputs(length: int, decay: str = "none", value: int = 3, seed: int = 0) -> list[Tensor]:
    """q and k of norm 1, v, beta in [0, 1] and, with decay, log decays between −3 and 0."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.float64).uniform_(-1, 1, generator=generator)

    tokens = (BATCH, length, HEADS)
    tensors = [F.normalize(draw(*tokens, KEY), dim=-1), F.normalize(draw(*tokens, KEY), dim=-1)]
    tensors += [draw(*tokens, value), draw(*tokens).abs()]
    if axes := DECAYS[decay]:
        sizes = {"b": BATCH, "l": length, "h": HEADS, "k": KEY}
        tensors.append(-3 * draw(*(sizes[axis] for axis in axes)).abs())
    return tensors


def positive_inputs(length: int, decay: str = "none", value: int = 3, seed: int = 0) -> list[Tensor]:
    """The same with q and k > 0."""
    q, k, *others = signed_inputs(length, decay, value, seed)
    return [F.normalize(q.exp(), dim=-1), F.normalize(k.exp(), dim=-1), *others]


def delta(*tensors: Tensor, **settings: Any) -> Tensor:
    """`delta_rule` without a state."""
    y = delta_rule(*tensors, **settings)
    assert isinstance(y, Tensor)
    return y


@pytest.mark.parametrize("causality", CAUSALITIES)
@pytest.mark.parametrize("decay", DECAYS)
def test_the_denominator_is_the_same_rule_on_a_target_of_ones(decay: str, causality: str) -> None:
    q, k, v, beta, *gates = positive_inputs(40, decay)
    read = delta(q, k, v, beta, *gates, causality=causality)
    ones = delta(q, k, torch.ones_like(v[..., :1]), beta, *gates, causality=causality)
    for backend in BACKENDS:
        y = delta(q, k, v, beta, *gates, causality=causality, normalize=True, eps=1e-3, backend=backend)
        assert_close(y, read / (ones + 1e-3), what=backend)
    matrix = delta_rule_matrix(q, k, beta, *gates, causality=causality, normalize=True, eps=1e-200, scale=1.0)
    assert_close(matrix.sum(-1), torch.ones_like(matrix[..., 0]))


@pytest.mark.parametrize("decay", DECAYS)
def test_without_an_order_the_formula_is_written_out_once_more(decay: str) -> None:
    """One step from the state that all tokens write, in loops over tokens with k × v matrices."""
    length = 7
    q, k, v, beta, *gates = signed_inputs(length, decay)
    log_decay = gates[0] if gates else torch.zeros(HEADS, dtype=q.dtype)
    a = (log_decay if log_decay.ndim == 4 else log_decay.expand(BATCH, length, HEADS)[..., None]).exp()
    expected = torch.zeros_like(v)
    for b, h in ((b, h) for b in range(BATCH) for h in range(HEADS)):
        written = [beta[b, j, h] * a[b, j, h] * k[b, j, h] for j in range(length)]
        start = sum(torch.outer(written[j], v[b, j, h]) for j in range(length)) / length
        step = sum(torch.outer(written[j], v[b, j, h] - start.T @ k[b, j, h]) for j in range(length)) / length
        expected[b, :, h] = 0.3 * q[b, :, h] @ (start + step)
    for backend in BACKENDS:
        y = delta(q, k, v, beta, *gates, causality="noncausal", scale=0.3, backend=backend)
        assert_close(y, expected, what=backend)


def test_without_an_order_row_sums_are_never_negative() -> None:
    """(2 I − C) m ≥ m ≥ 0 for m = mean β k, because k·m ≤ 1; with β up to 2, ≥ 0."""
    for seed in range(20):
        q, k, v, beta, gates = positive_inputs(30, "channel", seed=seed)
        for strength in (1.0, 2.0):
            ones = torch.ones_like(v[..., :1])
            sums = delta(q, k, ones, strength * beta, gates, causality="noncausal")
            floor = (2 - strength) * torch.einsum("blhk,bhk->blh", q, (beta[..., None] * gates.exp() * k).mean(1))
            assert (sums[..., 0] >= floor - 1e-12).all()


def test_one_gate_for_all_channels_is_one_gate_per_token() -> None:
    q, k, v, beta, gates = signed_inputs(70, "token")
    for causality in CAUSALITIES:
        expected = delta(q, k, v, beta, gates, causality=causality)
        per_channel = gates[..., None].expand_as(k)
        assert_close(delta(q, k, v, beta, per_channel, causality=causality), expected, what=causality)


@pytest.mark.parametrize("causality", CAUSALITIES)
def test_weak_steps_erase_nothing_to_first_order(causality: str) -> None:
    """β → 0: linear attention; without an order its mean, twice, because the step writes all tokens again."""
    q, k, v, beta, gates = signed_inputs(30, "channel")
    weak = 1e-7 * beta
    y = delta(q, k, v, weak, gates, causality=causality) / 1e-7
    scale = 2 / 30 if causality == "noncausal" else 1.0
    keys = beta[..., None] * k
    expected = linear_attention(q, keys, v, gates, causality=causality, normalize=False, scale=scale)
    assert isinstance(expected, Tensor)
    assert (y - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("causality", CAUSALITIES)
@given(seed=st.integers(0, 2**16), spread=st.floats(0.1, 5.0), key=st.integers(8, 40))
def test_row_sums_of_random_positive_sequences_are_positive(causality: str, seed: int, spread: float, key: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k = (spread * torch.randn(1, 64, 2, key, generator=generator, dtype=torch.float64) for _ in range(2))
    q, k = (F.normalize(F.elu(t) + 1, dim=-1) for t in (q, k))
    beta = torch.rand(1, 64, 2, generator=generator, dtype=torch.float64)
    sums = delta(q, k, torch.ones_like(q[..., :1]), beta, causality=causality)
    assert sums.min() > 0


def test_constructed_positive_sequences_can_have_negative_row_sums() -> None:
    """Two keys write 1 each; a third that overlaps with both is predicted 1.2, so that 0.2 of it is taken away."""
    keys = torch.tensor([[1, 0, 0], [0, 1, 0], [0.6, 0.6, 0.28**0.5]], dtype=torch.float64)[None, :, None]
    query = torch.tensor([0, 0, 1.0], dtype=torch.float64).expand_as(keys)
    ones = torch.ones(1, 3, 1, dtype=torch.float64)
    sums = delta(query, keys, ones[..., None], ones)
    assert_close(sums[0, -1, 0, 0], torch.tensor(-0.2 * 0.28**0.5, dtype=torch.float64))


def test_it_is_the_frame_by_frame_rule_of_sana_wm() -> None:
    """diffusers' own function: with frames of one token, and with two equal frames, which is the step without order."""
    from diffusers.models.transformers.transformer_sana_wm import torch_chunk_sana_gdn

    length = 23
    q, k, v, beta, gates = positive_inputs(length, "token", value=KEY)
    heads_first = [t.permute(0, 2, 3, 1) for t in (q, k, v)]
    query, key, value = heads_first
    steps = beta.transpose(1, 2)
    expected = torch_chunk_sana_gdn(query, key, value, query, key, steps, gates.transpose(1, 2).exp(), eps=1e-6)
    assert_close(delta(q, k, v, beta, gates, normalize=True), expected.permute(0, 3, 1, 2))

    query, key, value = (torch.cat([t, t], dim=-1) for t in (query, key / length**0.5, value))
    steps = torch.stack([steps, steps], dim=2)  # (b, h, frames, tokens)
    undecayed = torch.ones(BATCH, HEADS, 2, dtype=q.dtype)
    frames = torch_chunk_sana_gdn(query, key, value, query, key, steps, undecayed, eps=1e-200)
    second = frames[..., length:].permute(0, 3, 1, 2)
    assert_close(delta(q, k, v, beta, causality="noncausal", normalize=True, eps=1e-200), second)
