"""Test-time training against autograd: the step of an inner model, its derivative, and the matrix of a linear one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixers import TokenMixer, create_mixer, structure
from mixers.operators import linear_attention
from mixers.testing import ConformanceCase, MixerCheck, parametrize_with_checks
from mixers.testing.tolerances import assert_close
from tests.mixers.builders import disturbed, float64

GRID = (4, 5)
LENGTH = GRID[0] * GRID[1]
DIM = 12
HEADS = 2
WIDTH = DIM // HEADS

VARIANTS = [
    ConformanceCase("ttt", "noncausal", False, options=options)
    for options in (
        {"inner": "linear"},
        {"inner": "linear", "inner_loss": "dot", "conv_branch": True},
        {"inner": "linear", "clip_gradient": True, "normalize_keys": True},
        {"inner": "mlp"},
        {"inner": "mlp", "inner_loss": "dot", "clip_gradient": True, "qk_conv_size": 0},
        {"inner_loss": "mse", "clip_gradient": False, "conv_branch": True},
        {"inner": "linear", "expand": 2},
    )
]


@parametrize_with_checks(VARIANTS)
def test_conformance_of_variants(mixer: TokenMixer, check: MixerCheck) -> None:
    check(mixer)


def built(**options: Any) -> TokenMixer:
    """A small mixer in float64, with noise added to every parameter."""
    torch.manual_seed(0)
    return disturbed(create_mixer("ttt", DIM, HEADS, **options), 0.3)


MODELS = {
    "linear": lambda w, k: k @ w[0],
    "swiglu": lambda w, k: (k @ w[0]) * F.silu(k @ w[1]),
    "mlp": lambda w, k: F.silu(k @ w[0]) @ w[1],
}


def train(model: Any, weights: list[Tensor], k: Tensor, v: Tensor, loss: str, scale: float, clip: bool) -> list[Tensor]:
    """One step at rate 1 by autograd: k and v are the tokens of one head, (l, ·)."""

    def inner_loss(weights: list[Tensor]) -> Tensor:
        predicted = model(weights, k)
        terms = (predicted - v).square() / 2 if loss == "mse" else -predicted * v
        return scale * terms.sum(-1).mean()

    gradients = torch.func.grad(inner_loss)(weights)
    if clip:
        gradients = [g / (g.norm(dim=0) + 1) for g in gradients]
    return [w - g for w, g in zip(weights, gradients, strict=True)]


def heads_of(x: Tensor, count: int) -> list[Tensor]:
    """(1, l, count · c) -> one (l, c) per head."""
    return list(x[0].unflatten(-1, (count, -1)).unbind(1))


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("loss", ["dot", "mse"])
@pytest.mark.parametrize("inner", MODELS)
def test_the_step_is_that_of_autograd(inner: str, loss: str, clip: bool) -> None:
    parts = {"conv_branch": False, "qk_conv_size": 0, "normalize_keys": False}
    mixer = built(inner=inner, inner_loss=loss, clip_gradient=clip, loss_scale=0.7, **parts)
    x = float64(1, LENGTH, DIM)
    own = mixer.projections
    rows = []
    for h, (q, k, v) in enumerate(zip(*(heads_of(p(x), HEADS) for p in (own.to_q, own.to_k, own.to_v)), strict=True)):
        weights = [w[h] for w in mixer.inner.parameters()]
        rows.append(MODELS[inner](train(MODELS[inner], weights, k, v, loss, 0.7, clip), q))
    assert_close(mixer(x)[0], own.to_out(torch.cat(rows, dim=-1)))


def test_the_published_block_of_vittt() -> None:
    """Three heads of queries, keys and values for two heads: the last is trained as a convolution of the image."""
    mixer = built()
    x = float64(1, LENGTH, DIM)
    own = mixer.projections
    q, k, v = (heads_of(p(x), HEADS + 1) for p in (own.to_q, own.to_k, own.to_v))
    rows = []
    for h in range(HEADS):
        weights = [mixer.inner.w1[h], mixer.inner.w2[h]]
        rows.append(MODELS["swiglu"](train(MODELS["swiglu"], weights, k[h], v[h], "dot", 1 / 3, clip=True), q[h]))

    def convolve(weight: Tensor, tokens: Tensor) -> Tensor:
        image = tokens.T.unflatten(-1, GRID)[None]
        return F.conv2d(image, weight.view(WIDTH, 1, 3, 3), padding=1, groups=WIDTH)[0].flatten(1).T

    def inner_loss(weight: Tensor) -> Tensor:
        return -(convolve(weight, k[HEADS]) * v[HEADS]).mean(0).sum() / 3

    start = mixer.conv_inner.w3
    gradient = torch.func.grad(inner_loss)(start)
    weight = start - gradient / (gradient.norm(dim=-1, keepdim=True) + 1)
    rows.append(convolve(weight, q[HEADS]))
    assert_close(mixer(x, grid=GRID)[0], own.to_out(torch.cat(rows, dim=-1)))


def test_the_published_block_of_t5() -> None:
    """Keys normalized over the tokens with eps 1, then convolutions added to q and k, then the MLP's step."""
    mixer = built(inner="mlp")
    x = float64(1, LENGTH, DIM)
    own = mixer.projections
    keys = F.instance_norm(own.to_k(x).mT[..., None], eps=1.0).squeeze(-1).mT

    def convolved(t: Tensor, conv: torch.nn.Conv2d) -> Tensor:
        image = t.mT.unflatten(-1, GRID)
        return (image + F.conv2d(image, conv.weight, conv.bias, padding=1, groups=DIM)).flatten(2).mT

    q = heads_of(convolved(own.to_q(x), mixer.q_conv), HEADS)
    k = heads_of(convolved(keys, mixer.k_conv), HEADS)
    v = heads_of(own.to_v(x), HEADS)
    rows = []
    for h in range(HEADS):
        weights = [mixer.inner.w1[h], mixer.inner.w2[h]]
        trained = train(MODELS["mlp"], weights, k[h], v[h], "mse", WIDTH**-0.5, clip=False)
        rows.append(MODELS["mlp"](trained, q[h]))
    assert_close(mixer(x, grid=GRID)[0], own.to_out(torch.cat(rows, dim=-1)))


@pytest.mark.parametrize("loss", ["dot", "mse"])
def test_a_linear_inner_model_is_linear_attention(loss: str) -> None:
    """Y = q W₀ + c q Kᵀ(V − K W₀) / l: W is that of linear attention without map and row sums, at the mean scale."""
    mixer = built(inner="linear", inner_loss=loss)
    x = float64(2, LENGTH, DIM)
    streams = mixer.compute_streams(x, mixer.resolve_projections(None))
    start = mixer.inner.w1
    c = WIDTH**-0.5
    target = streams.v
    if loss == "mse":
        target = target - torch.einsum("blhk,hkv->blhv", streams.k, start)
    y = linear_attention(streams.q, streams.k, target, normalize=False, scale=c / LENGTH)
    y = y + torch.einsum("blhk,hkv->blhv", streams.q, start)
    assert_close(mixer(x), mixer.projections.to_out(y.flatten(2)))

    linear = create_mixer(
        "linear_attention", DIM, HEADS, feature_map="identity", normalize=False, scale="mean"
    ).double()
    linear.projections = mixer.projections
    matrix = structure.mixing_matrix(mixer, x)
    assert_close(matrix, structure.mixing_matrix(linear, x))
    assert_close(matrix, structure.probed_matrix(mixer, x)[:, :, 0])
    assert (structure.numerical_rank(matrix) == WIDTH).all()


def test_a_linear_inner_model_that_fits_does_not_move() -> None:
    """Values that the initial weights predict have no error: the step is zero, and y = q W₀."""
    mixer = built(inner="linear")
    streams = mixer.compute_streams(float64(2, LENGTH, DIM), mixer.resolve_projections(None))
    predicted = torch.einsum("blhk,hkv->blhv", streams.k, mixer.inner.w1)
    fitting = type(streams)(streams.x, streams.q, streams.k, predicted)
    y = mixer.finish(mixer.mix(fitting), fitting)
    assert_close(y, torch.einsum("blhk,hkv->blhv", streams.q, mixer.inner.w1))


def test_the_derivative_of_swiglu_has_the_rank_of_two_linear_attentions() -> None:
    mixer = built(conv_branch=False)
    x = float64(1, 40, DIM)
    matrix = structure.mixing_matrix(mixer, x)
    assert matrix.shape == (1, HEADS, WIDTH, 40, 40)
    ranks = structure.numerical_rank(matrix, 1e-10)
    assert (ranks <= 2 * WIDTH).all() and (ranks > WIDTH).all()
    assert not mixer.traits.linear_in_values and built(inner="linear").traits.linear_in_values


@pytest.mark.parametrize("inner", MODELS)
def test_repeating_every_token_changes_nothing(inner: str) -> None:
    """Gradients are means over the tokens, and so is the normalization of keys."""
    mixer = built(inner=inner, conv_branch=False, qk_conv_size=0, normalize_keys=True)
    assert mixer.traits.repetition_invariant and not mixer.traits.normalized
    x = float64(2, LENGTH, DIM)
    assert_close(mixer(x.repeat_interleave(3, dim=1))[:, ::3], mixer(x))


@pytest.mark.parametrize("name", ["ttt", "sparse_linear", "rala", "polaformer"])
def test_autocast_does_not_reach_the_sums(name: str) -> None:
    """Streams in half precision give the same result under autocast, whose products would be in half precision."""
    options = {"ttt": {"conv_branch": False}, "sparse_linear": {"block_size": 4}}.get(name, {})
    mixer = create_mixer(name, 16, HEADS, **options)
    streams = mixer.compute_streams(torch.randn(1, LENGTH, 16), mixer.resolve_projections(None), GRID)
    with torch.no_grad():
        plain = mixer.mix(streams)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(mixer.mix(streams), plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner": "swigul"}, "Did you mean 'swiglu'"),
        ({"inner_loss": "l1"}, "expected one of dot, mse"),
        ({"inner_lr": 0.0}, "inner_lr > 0"),
        ({"loss_scale": -1.0}, "loss_scale > 0"),
        ({"scan": "column"}, "use scan='raster'"),
        ({"expand": 2.0}, "expand=1"),
        ({"causality": "causal"}, "delta rule"),
        ({"normalize": True}, "row sums can vanish"),
    ],
)
def test_what_has_no_meaning_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer("ttt", DIM, HEADS, **options)
    if "expand" in options:
        assert create_mixer("ttt", DIM, HEADS, conv_branch=False, **options).head_dim == 2 * WIDTH


def test_the_branch_does_not_fit_a_host() -> None:
    """Its queries, keys and values are one head more than a host's; the drop-in form has none."""
    with pytest.raises(ValueError, match="drop-in form"):
        create_mixer("ttt", DIM, HEADS, own_projections=False, conv_branch=True)
    assert create_mixer("ttt", DIM, HEADS, own_projections=False).conv_inner is None
