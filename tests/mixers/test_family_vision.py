"""Linear attention made for images: what is equal on paper is equal here, in float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixers import TokenMixer, create_mixer, registry, structure
from mixers.operators import linear_attention
from mixers.stages.rotary import rotary_2d
from mixers.testing.tolerances import assert_close
from mixers.traits import CAUSALITIES
from tests.mixers.builders import disturbed, float64

GRID = (4, 5)
LENGTH = GRID[0] * GRID[1]
FAMILY = ("linfusion_low_rank", "focused", "sana_relu", "mila", "inline")
IMAGES = ("focused", "mila", "inline")  # with a local convolution, as published

every_switch = pytest.mark.parametrize(
    ("causality", "normalize"), [(causality, normalize) for causality in CAUSALITIES for normalize in (True, False)]
)


def built(name: str, **options: Any) -> TokenMixer:
    """Small, in float64, away from its start."""
    return disturbed(create_mixer(name, 12, 2, **options), 0.3)


def drop_in(name: str, **options: Any) -> TokenMixer:
    """The drop-in form, with projections of its own."""
    return built(name, **(dict(registry.get_mixer_entry(name).mixer.drop_in_options) | options))


def streams_of(mixer: TokenMixer, x: Tensor) -> Any:
    return mixer.compute_streams(x, mixer.resolve_projections(None), GRID)


def copy_shared(to: TokenMixer, source: TokenMixer) -> None:
    to.load_state_dict({n: p for n, p in source.state_dict().items() if n in to.state_dict()})


@every_switch
def test_rank_r_is_linear_attention_on_khatri_rao_features(causality: str, normalize: bool) -> None:
    mixer = built("linfusion_low_rank", causality=causality, normalize=normalize, rank=3)
    s = streams_of(mixer, float64(2, LENGTH, 12))
    C = F.elu(s.q) + 1
    B = F.elu(s.k) + 1
    f, g = mixer.factors(s.x)
    pairs = [(a, b) for a in range(6) for b in range(3)]
    c = torch.stack([C[..., i] * f[..., r] for i, r in pairs], dim=-1)
    b = torch.stack([B[..., i] * g[..., r] for i, r in pairs], dim=-1)
    settings = {"causality": causality, "normalize": normalize, "eps": 1e-4, "scale": 1 / (256 * 6**0.5)}
    assert_close(mixer.mix(s), linear_attention(c, b, s.v, **settings))


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_matrix_is_a_product_of_two_of_low_rank(rank: int) -> None:
    """W = (C Bᵀ) ⊙ (F Gᵀ), whose rank is k·r and, where there are tokens enough, no less."""
    mixer = built("linfusion_low_rank", normalize=False, rank=rank)
    x = 2 * float64(1, 40, 12)
    s = mixer.compute_streams(x, mixer.resolve_projections(None))
    C = F.elu(s.q) + 1
    B = F.elu(s.k) + 1
    (f, g) = mixer.factors(x)
    dense, mask = (torch.einsum("bihk,bjhk->bhij", *pair) for pair in ((C, B), (f, g)))
    matrix = structure.mixing_matrix(mixer, x)
    assert_close(matrix, dense * mask / (256 * 6**0.5))
    ranks = structure.numerical_rank(matrix, 1e-12)
    assert (ranks <= 6 * rank).all() and (ranks > 6 * (rank - 1)).all()


@every_switch
def test_low_rank_starts_as_linfusion(causality: str, normalize: bool) -> None:
    settings = {"causality": causality, "normalize": normalize}
    low_rank = create_mixer("linfusion_low_rank", 12, 2, **settings).double()
    linfusion = built("linfusion", **settings)
    missing = low_rank.load_state_dict(linfusion.state_dict(), strict=False).missing_keys
    assert missing == ["to_f.weight", "to_f.bias", "to_g.weight", "to_g.bias"]
    x = float64(2, LENGTH, 12)
    assert_close(low_rank(x), linfusion(x))
    f, g = low_rank.factors(x)
    products = torch.einsum("bihr,bjhr->bhij", f, g)
    assert_close(products, torch.ones_like(products))


def test_low_rank_learns_from_its_start_and_its_components_part() -> None:
    mixer = create_mixer("linfusion_low_rank", 12, 2, rank=3).double()
    x = float64(2, LENGTH, 12)
    target = float64(2, LENGTH, 12)
    optimizer = torch.optim.SGD([*mixer.to_f.parameters(), *mixer.to_g.parameters()], lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        (mixer(x) - target).square().sum().backward()
        optimizer.step()
    components = mixer.to_f.weight.detach().view(2, 3, 12)
    assert mixer.to_g.weight.grad.abs().max() > 0
    assert (structure.numerical_rank(components, 1e-3) == 3).all()


@pytest.mark.parametrize("causality", CAUSALITIES)
def test_rank_one_is_linfusion(causality: str) -> None:
    """With one component G is 1; a constant F changes nothing, and no other does but for eps."""
    one = built("linfusion_low_rank", causality=causality, rank=1, eps=1e-200)
    linfusion = built("linfusion", causality=causality, eps=1e-200)
    copy_shared(linfusion, one)
    x = float64(2, LENGTH, 12)
    assert_close(one(x), linfusion(x))
    bare = built("linfusion_low_rank", causality=causality, rank=1, normalize=False)
    torch.nn.init.zeros_(bare.to_f.weight)
    torch.nn.init.zeros_(bare.to_f.bias)
    linfusion = built("linfusion", causality=causality, normalize=False)
    copy_shared(linfusion, bare)
    assert_close(bare(x), linfusion(x))


def test_focused_is_its_published_formula() -> None:
    mixer = built("focused")
    x = float64(2, LENGTH, 12)
    own = mixer.projections

    def focus(t: Tensor) -> Tensor:
        u = (t.relu() + 1e-6) / F.softplus(mixer.focus.scale)
        return (u**3 / (u**3).norm(dim=-1, keepdim=True) * u.norm(dim=-1, keepdim=True)).unflatten(-1, (2, 6))

    table = F.interpolate(mixer.positions.weight, size=GRID, mode="bilinear").flatten(2).mT
    q = focus(own.to_q(x))
    k = focus(own.to_k(x) + table)
    v = own.to_v(x)
    z = 1 / (torch.einsum("blhk,bhk->blh", q, k.mean(1)) + 1e-6)
    kv = torch.einsum("blhk,blhv->bhkv", k, v.unflatten(-1, (2, 6))) / LENGTH
    y = (torch.einsum("blhk,bhkv->blhv", q, kv) * z[..., None]).flatten(2)
    image = v.transpose(1, 2).unflatten(-1, GRID)
    conv = mixer.output.local_conv  # shared by the two heads
    weight = conv.weight.repeat(2, 1, 1, 1)
    bias = conv.bias.repeat(2)
    local = F.conv2d(image, weight, bias, padding=2, groups=12)
    assert_close(mixer(x, grid=GRID), own.to_out(y + local.flatten(2).transpose(1, 2)))


@pytest.mark.parametrize("causality", CAUSALITIES)
def test_focused_with_power_one_is_relu_attention(causality: str) -> None:
    """It keeps norms, and directions at power 1; a scale that all channels share divides out."""
    mixer = drop_in("focused", causality=causality, power=1.0, eps=1e-200)
    torch.nn.init.constant_(mixer.focus.scale, 0.7)
    s = streams_of(mixer, float64(2, LENGTH, 12))
    q = s.q.relu() + 1e-6
    k = s.k.relu() + 1e-6
    assert_close(mixer.mix(s), linear_attention(q, k, s.v, causality=causality, eps=1e-200))
    focused = drop_in("focused")
    features, _ = focused.features(s)
    u = (s.q.relu() + 1e-6).flatten(2) / F.softplus(focused.focus.scale)
    assert_close(features.flatten(2).norm(dim=-1), u.norm(dim=-1))


@every_switch
def test_sana_is_linear_attention_with_relu(causality: str, normalize: bool) -> None:
    settings = {"causality": causality, "normalize": normalize}
    sana = built("sana_relu", **settings)
    linear = built("linear_attention", feature_map="relu", eps=1e-15, **settings)
    linear.load_state_dict(sana.state_dict())
    x = float64(2, LENGTH, 12)
    assert torch.equal(sana(x), linear(x))


def test_sana_is_its_published_formula() -> None:
    """Values with a row of ones, times keys, times queries; the last row divides the others."""
    mixer = built("sana_relu")
    x = float64(2, LENGTH, 12)
    own = mixer.projections
    q, k, v = (p(x).transpose(1, 2).unflatten(1, (2, 6)) for p in (own.to_q, own.to_k, own.to_v))  # (b, h, k, l)
    y = F.pad(v, (0, 0, 0, 1), value=1.0) @ k.relu().mT @ q.relu()
    y = y[:, :, :-1] / (y[:, :, -1:] + 1e-15)
    assert_close(mixer(x), own.to_out(y.flatten(1, 2).transpose(1, 2)))


def test_mila_is_its_published_formula() -> None:
    """The published block: in-projection, convolution, rotation in the numerator only, LePE and gate."""
    mixer = built("mila")
    x = float64(2, LENGTH, 12)
    own = mixer.projections
    dwc = mixer.short_conv
    inner = F.conv2d(own.to_v(x).mT.unflatten(-1, GRID), dwc.weight, dwc.bias, padding=1, groups=12)
    v = F.silu(inner).flatten(2).mT
    q = F.elu(own.to_q(v)) + 1
    k = F.elu(own.to_k(v)) + 1
    turns = []
    for axis in (0, 1):
        places = torch.stack(torch.meshgrid(*map(torch.arange, GRID), indexing="ij"))[axis].flatten().double()
        turns.append(places[:, None] / 10000 ** (torch.arange(3).double() / 3))
    turn = torch.polar(torch.ones(LENGTH, 6).double(), torch.cat(turns, dim=-1))

    def rotated(t: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (-1, 2))) * turn).flatten(-2)

    heads = [t.unflatten(-1, (2, 6)) for t in (rotated(q), rotated(k), q, k, v)]
    weights = torch.einsum("bihk,bjhk->bhij", *heads[:2]) / LENGTH
    weights = weights / (torch.einsum("bihk,bhk->bhi", heads[2], heads[3].mean(1)) + 1e-6)[..., None]
    y = torch.einsum("bhij,bjhv->bihv", weights, heads[4]).flatten(2)
    conv = mixer.output.local_conv
    local = F.conv2d(v.transpose(1, 2).unflatten(-1, GRID), conv.weight, conv.bias, padding=1, groups=12)
    gated = (y + local.flatten(2).transpose(1, 2)) * F.silu(mixer.output.to_gate(x))
    assert_close(mixer(x, grid=GRID), own.to_out(gated))


@every_switch
def test_mila_without_its_parts_is_linear_attention(causality: str, normalize: bool) -> None:
    settings = {"causality": causality, "normalize": normalize}
    mila = drop_in("mila", rotary=False, qkv_bias=False, **settings)
    linear = built("linear_attention", **settings)
    linear.load_state_dict(mila.state_dict())
    x = float64(2, LENGTH, 12)
    assert torch.equal(mila(x), linear(x))
    assert mila.traits == linear.traits


@pytest.mark.parametrize("causality", CAUSALITIES)
def test_mila_turns_weights_and_not_their_sums(causality: str) -> None:
    """Its matrix over that of linear attention: the turned product over the plain one; its rows sum to less."""
    mila = drop_in("mila", causality=causality)
    x = float64(1, LENGTH, 12)
    still = drop_in("mila", causality=causality, rotary=False)
    still.load_state_dict(mila.state_dict())
    s = streams_of(mila, x)
    q, k = still.features(s)
    rotated = [rotary_2d(t.flatten(2)[:, :, None], GRID).view_as(t) for t in (q, k)]
    ratio = torch.einsum("bihk,bjhk->bhij", *rotated) / torch.einsum("bihk,bjhk->bhij", q, k)
    matrix = structure.mixing_matrix(mila, x, grid=GRID)
    assert_close(matrix, structure.mixing_matrix(still, x) * ratio)
    assert not mila.traits.normalized and not mila.traits.positive and mila.traits.needs_grid
    assert structure.row_sums(matrix)[..., -1].max() < 1 - 1e-3


@pytest.mark.parametrize("feature_map", [None, "relu", "elu_plus_one"])
@pytest.mark.parametrize("causality", CAUSALITIES)
def test_inline_is_its_published_formula_in_plain_loops(causality: str, feature_map: str | None) -> None:
    mixer = drop_in("inline", causality=causality, feature_map=feature_map)
    phi = {None: lambda t: t, "relu": torch.relu, "elu_plus_one": lambda t: F.elu(t) + 1}[feature_map]
    s = streams_of(mixer, float64(1, LENGTH, 12))
    q = phi(s.q) * 6**-0.5
    k = phi(s.k)
    y = mixer.mix(s)
    for i in range(LENGTH):
        visible = range(i + 1) if causality == "causal" else range(LENGTH)
        for h in range(2):
            products = [q[0, i, h] @ k[0, j, h] for j in visible]
            mean = sum(products) / len(products)
            row = sum((p + 1 - mean) / len(products) * s.v[0, j, h] for p, j in zip(products, visible, strict=True))
            assert_close(y[0, i, h], row)


@every_switch
def test_inline_unnormalized_has_no_correction(causality: str, normalize: bool) -> None:
    """It is linear attention on the same kernel; normalized it is not."""
    inline = drop_in("inline", causality=causality, normalize=normalize, feature_map="elu_plus_one", qkv_bias=False)
    linear = built("linear_attention", causality=causality, normalize=normalize)
    linear.load_state_dict(inline.state_dict())
    x = float64(2, LENGTH, 12)
    assert ((inline(x) - linear(x)).abs().max() < 1e-12) == (not normalize)
    assert inline.traits.positive == (not normalize)


def test_inline_rows_sum_to_one_with_signed_weights_whatever_eps_is() -> None:
    mixer = drop_in("inline", eps=0.5)
    x = 3 * float64(1, LENGTH, 12)
    matrix = structure.mixing_matrix(mixer, x)
    assert_close(structure.row_sums(matrix), torch.ones(1, 2, LENGTH, dtype=torch.float64))
    assert (matrix < 0).any() and not mixer.traits.positive and mixer.traits.normalized


def test_inline_does_not_see_what_all_weights_of_a_row_share() -> None:
    """A constant added to every key moves all weights of a row alike, which the subtraction takes away."""
    mixer = drop_in("inline")
    s = streams_of(mixer, float64(2, LENGTH, 12))
    shifted = dataclasses.replace(s, k=s.k + float64(1, 1, 2, 6))
    assert_close(mixer.mixing_matrix(shifted), mixer.mixing_matrix(s))
    assert_close(mixer.mix(shifted), mixer.mix(s))


def test_inline_is_injective_where_division_is_not() -> None:
    """Queries of one direction and two lengths: a division gives both the same weights, a subtraction does not."""
    for name, same, options in (("inline", False, {}), ("linear_attention", True, {"eps": 1e-200})):
        mixer = drop_in(name, feature_map="relu", **options)
        s = streams_of(mixer, float64(1, LENGTH, 12))
        longer = mixer.mixing_matrix(dataclasses.replace(s, q=2 * s.q))
        assert ((longer - mixer.mixing_matrix(s)).abs().max() < 1e-10) == same


def test_inline_chooses_the_weights_of_its_convolution_from_the_mean_token() -> None:
    """As published: one 3 × 3 kernel for every item and channel, from two layers in one block a head."""
    mixer = built("inline")
    x = float64(2, LENGTH, 12)
    stage = mixer.output
    s = streams_of(mixer, x)
    first, _, last = stage.residual
    added = torch.zeros(2, LENGTH, 12, dtype=torch.float64)
    v = s.v.flatten(2)
    for b in range(2):
        mean = x[b].mean(0)
        hidden = [F.gelu(first.weight[6 * h :][:6, :, 0] @ mean[6 * h :][:6] + first.bias[6 * h :][:6]) for h in (0, 1)]
        kernel = torch.cat([last.weight[54 * h :][:54, :, 0] @ hidden[h] for h in (0, 1)]) + last.bias
        image = v[b].T.unflatten(-1, GRID)
        added[b] = F.conv2d(image, kernel.view(12, 1, 3, 3), padding=1, groups=12).flatten(1).T
    own = mixer.projections
    assert_close(mixer(x, grid=GRID), own.to_out(mixer.mix(s).flatten(2) + added))
    learned = built("inline", dynamic_conv=False)
    assert "output.local_conv.weight" in learned.state_dict() and learned(x, grid=GRID).isfinite().all()


@pytest.mark.parametrize("name", IMAGES)
def test_the_local_convolution_is_added_to_the_result(name: str) -> None:
    off = {"gate": False} if name == "mila" else {}
    extra = {"dynamic_conv": False} if name == "inline" else {}
    full = built(name, **off, **extra)
    less = built(name, local_conv_size=0, **off, **extra)
    copy_shared(less, full)
    x = float64(2, LENGTH, 12)
    v = full.compute_streams(x, full.projections, GRID).v.flatten(2)
    added = F.linear(full.output.local_conv(v, GRID), full.projections.to_out.weight)
    assert_close(full(x, grid=GRID), less(x, grid=GRID) + added)


@pytest.mark.parametrize(("name", "size"), [("focused", 5), ("mila", 3), ("inline", 3)])
def test_the_local_convolution_is_published_where_it_can_be(name: str, size: int) -> None:
    assert {c: create_mixer(name, 12, 2, causality=c).config.local_conv_size for c in CAUSALITIES} == {
        "causal": 0,
        "bidirectional": size,
        "noncausal": size,
    }
    assert create_mixer(name, 12, 2).traits.needs_grid and not create_mixer(name, 12, 2).traits.permutation_equivariant
    assert not create_mixer(name, 12, 2, own_projections=False).config.local_conv_size
    with pytest.raises(ValueError, match="neighbors on all sides"):
        create_mixer(name, 12, 2, causality="causal", local_conv_size=size)
    with pytest.raises(ValueError, match="pass grid"):
        create_mixer(name, 12, 2)(torch.randn(1, LENGTH, 12))
    with pytest.raises(ValueError, match="odd size"):
        create_mixer(name, 12, 2, local_conv_size=4)


@pytest.mark.parametrize("name", FAMILY)
def test_the_drop_in_form_starts_from_a_hosts_projections(name: str) -> None:
    mounted = create_mixer(name, 12, 2, own_projections=False).double()
    own = drop_in(name)
    mounted.load_state_dict({n: p for n, p in own.state_dict().items() if not n.startswith("projections.")})
    x = float64(1, LENGTH, 12)
    assert torch.equal(mounted(x, projections=own.projections, grid=GRID), own(x, grid=GRID))


def test_refusals_give_the_reason() -> None:
    with pytest.raises(ValueError, match="rotary=False"):
        create_mixer("mila", 12, 2, causality="causal", scan="hilbert")
    with pytest.raises(ValueError, match="linear_attention"):
        create_mixer("focused", 12, 2, feature_map="relu")
    with pytest.raises(ValueError, match="rank ≥ 1"):
        create_mixer("linfusion_low_rank", 12, 2, rank=0)
    with pytest.raises(ValueError, match="signed"):
        create_mixer("sana_relu", 12, 2, feature_map="identity")
    with pytest.raises(ValueError, match="reference_length > 0"):
        create_mixer("inline", 12, 2, reference_length=0)
