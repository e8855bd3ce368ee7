"""RALA and PolaFormer against their papers' formulas, written out in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixers import TokenMixer, create_mixer, registry, structure
from mixers.operators import linear_attention
from mixers.testing.tolerances import assert_close
from tests.mixers.builders import disturbed, float64

GRID = (4, 5)
LENGTH = GRID[0] * GRID[1]
DIM = 16
HEADS = 2
WIDTH = DIM // HEADS


def built(name: str, **options: Any) -> TokenMixer:
    """A small mixer in float64, with noise added to every parameter."""
    torch.manual_seed(0)
    return disturbed(create_mixer(name, DIM, HEADS, **options), 0.3)


def drop_in(name: str, **options: Any) -> TokenMixer:
    return built(name, **(dict(registry.get_mixer_entry(name).mixer.drop_in_options) | options))


def convolve(v: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A zero-padded depthwise convolution of (b, l, c) over the image."""
    image = v.transpose(1, 2).unflatten(-1, GRID)
    return F.conv2d(image, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight)).flatten(2).mT


def rala_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """RALA of one head and image, (l, k) and (l, v), token by token: rotations as complex numbers."""
    features_q = F.elu(q) + 1
    features_k = F.elu(k) + 1
    query = features_q.mean(0)
    logits = torch.stack([query @ key / math.sqrt(WIDTH) for key in features_k])
    alpha = LENGTH * logits.exp() / logits.exp().sum()
    frequencies = 10000.0 ** -torch.linspace(0, 1, WIDTH // 4).double()
    angles = torch.tensor([[i // GRID[1], i % GRID[1]] for i in range(LENGTH)]).double()
    turns = torch.exp(1j * (angles[:, :, None] * frequencies).flatten(1))

    def rotate(x: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turns).flatten(-2)

    rotated_q = rotate(features_q)
    rotated_k = rotate(features_k)
    rows = []
    for i in range(LENGTH):
        total = sum(alpha[j] * (rotated_q[i] @ rotated_k[j]) * v[j] for j in range(LENGTH))
        norm = sum(alpha[j] * (features_q[i] @ features_k[j]) for j in range(LENGTH))
        rows.append(total / (norm + 1e-6 * LENGTH))
    return torch.stack(rows)


def test_rala_is_its_published_formula() -> None:
    mixer = built("rala")
    x = float64(1, LENGTH, DIM)
    own = mixer.projections
    q, k, v = (layer(x) for layer in (own.to_q, own.to_k, own.to_v))
    heads = [rala_head(*(t[0].unflatten(-1, (HEADS, -1))[:, h] for t in (q, k, v))) for h in range(HEADS)]
    conv = mixer.output.local_conv
    y = torch.cat(heads, dim=-1) + convolve(v, conv.weight, conv.bias)[0]
    assert_close(mixer(x, grid=GRID), own.to_out(y * mixer.output.to_gate(x)))


@pytest.mark.parametrize("normalize", [True, False])
def test_rala_without_its_parts_is_linear_attention(normalize: bool) -> None:
    rala = drop_in("rala", rotary=False, reweight_keys=False, qkv_bias=False, normalize=normalize)
    linear = built("linear_attention", normalize=normalize)
    linear.load_state_dict(rala.state_dict())
    x = float64(2, LENGTH, DIM)
    assert_close(rala(x), linear(x))
    assert rala.traits == linear.traits


def test_rala_weighs_keys_by_the_mean_query() -> None:
    """Weights average 1, favor the keys nearest to the mean query, and change the state."""
    mixer = drop_in("rala", rotary=False)
    assert not mixer.traits.pairwise
    streams = mixer.compute_streams(3 * float64(1, 200, DIM), mixer.resolve_projections(None))
    q, k = type(mixer).__mro__[1].features(mixer, streams)  # linear attention's, which are not reweighted
    weights = mixer.key_weights(q, k)
    assert_close(weights.mean(1), torch.ones(1, HEADS, 1, dtype=torch.float64))
    similarity = (k * q.mean(1, keepdim=True)).sum(-1)
    assert (similarity.argmax(1) == weights.squeeze(-1).argmax(1)).all()
    state = torch.einsum("blhk,blhv->bhkv", k, streams.v)
    reweighted = torch.einsum("blhk,blhv->bhkv", k * weights, streams.v)
    assert not torch.allclose(state, reweighted)


def test_rala_repeats_and_permutes_without_rotation() -> None:
    mixer = drop_in("rala", rotary=False)
    assert mixer.traits.repetition_invariant and mixer.traits.permutation_equivariant and mixer.traits.normalized
    x = float64(2, LENGTH, DIM)
    assert_close(mixer(x.repeat_interleave(3, dim=1))[:, ::3], mixer(x))
    order = torch.randperm(LENGTH)
    assert_close(mixer(x[:, order]), mixer(x)[:, order])


def test_rala_refuses_orders() -> None:
    with pytest.raises(ValueError, match="mean query"):
        create_mixer("rala", DIM, HEADS, causality="causal")
    with pytest.raises(ValueError, match="use scan='raster'"):
        create_mixer("rala", DIM, HEADS, scan="column", local_conv_size=0)


def polaformer_half(q: Tensor, k: Tensor, v: Tensor, powers: Tensor, opposite: bool) -> Tensor:
    """One half of the value channels of one head: products of equal or of opposite signs, pair by pair."""
    rows = []
    for i in range(LENGTH):
        weights = []
        for j in range(LENGTH):
            total = q.new_zeros(())
            for c in range(WIDTH):
                a = -q[i, c] if opposite else q[i, c]
                b = k[j, c]
                if a * b > 0:  # the parts of equal sign meet
                    total = total + (a.abs() * b.abs()) ** powers[c]
            weights.append(total)
        row = torch.stack(weights)
        rows.append(row @ v / (row.sum() + 1e-6 * LENGTH))
    return torch.stack(rows)


def test_polaformer_is_its_published_formula() -> None:
    mixer = built("polaformer")
    x = float64(1, LENGTH, DIM)
    own = mixer.projections
    table = F.interpolate(mixer.positions.weight, size=GRID, mode="bilinear").flatten(2).mT
    scale = F.softplus(mixer.scale_logit).flatten()
    powers = 1 + 4 * mixer.power_logit.sigmoid()
    v = own.to_v(x)
    q, k, values = (t[0].unflatten(-1, (HEADS, -1)) for t in (own.to_q(x) / scale, (own.to_k(x) + table) / scale, v))
    heads = []
    for h in range(HEADS):
        first, second = values[:, h].chunk(2, dim=-1)
        heads += [polaformer_half(q[:, h], k[:, h], first, powers[h], opposite=False)]
        heads += [polaformer_half(q[:, h], k[:, h], second, powers[h], opposite=True)]
    conv = mixer.output.local_conv
    local = convolve(v, conv.weight.repeat(HEADS, 1, 1, 1), conv.bias.repeat(HEADS))
    y = torch.cat(heads, dim=-1) + local[0]
    assert_close(mixer(x, grid=GRID), own.to_out(y * mixer.output.to_gate(x)))


@pytest.mark.parametrize("causality", ["causal", "noncausal"])
def test_polaformer_with_exponent_one_splits_the_dot_product_by_sign(causality: str) -> None:
    """At p = 1 and scale 1, the two halves' weights differ by q·k, and add up to |q|·|k|."""
    mixer = drop_in("polaformer", causality=causality, alpha=0.0, normalize=False)
    torch.nn.init.constant_(mixer.scale_logit, math.log(math.e - 1))
    streams = mixer.compute_streams(float64(1, LENGTH, DIM), mixer.resolve_projections(None))
    matrix = mixer.mixing_matrix(streams) / mixer.scale
    equal = matrix[:, :, 0]
    opposite = matrix[:, :, -1]
    dots = torch.einsum("bihk,bjhk->bhij", streams.q, streams.k)
    absolute = torch.einsum("bihk,bjhk->bhij", streams.q.abs(), streams.k.abs())
    if causality == "causal":
        dots = dots.tril()
        absolute = absolute.tril()
    assert_close(equal - opposite, dots)
    assert_close(equal + opposite, absolute)


def test_polaformer_sees_what_relu_attention_forgets() -> None:
    """A query of negative channels only has a row of zeros under relu; here it sees negative keys."""
    mixer = drop_in("polaformer")
    streams = mixer.compute_streams(float64(1, LENGTH, DIM), mixer.resolve_projections(None))
    negative = -streams.q.abs()
    relu = linear_attention(negative, streams.k, streams.v, feature_map="relu")
    assert not relu.any()
    y = mixer.mix(type(streams)(streams.x, negative, streams.k, streams.v))
    assert (y != 0).all()
    sums = structure.row_sums(mixer.mixing_matrix(streams))
    assert_close(sums, torch.ones_like(sums), torch.float32)


def test_polaformer_with_an_odd_number_of_value_channels() -> None:
    mixer = create_mixer("polaformer", 10, 2, local_conv_size=0, position_table_size=0).double()
    assert mixer.half_widths == [3, 2]
    x = float64(1, 7, 10)
    matrix = structure.mixing_matrix(mixer, x)
    assert matrix.shape == (1, 2, 5, 7, 7)
    streams = mixer.compute_streams(x, mixer.resolve_projections(None))
    assert_close(torch.einsum("bhvij,bjhv->bihv", matrix, streams.v), mixer.mix(streams))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -1.0}, "alpha ≥ 0"),
        ({"position_table_size": -1}, "position_table_size ≥ 0"),
        ({"feature_map": "relu"}, "polarity-aware"),
        ({"scan": "column", "position_table_size": 4, "local_conv_size": 0}, "needs scan='raster'"),
    ],
)
def test_polaformer_refuses_what_has_no_meaning(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer("polaformer", DIM, HEADS, **options)
