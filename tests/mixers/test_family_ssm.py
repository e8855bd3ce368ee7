"""State-space mixers that are equal on paper are equal here, in float64."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixers import TokenMixer, create_mixer, structure
from mixers.operators import linear_attention
from mixers.operators.scan import selective_scan
from mixers.state_space_mixer import StateSpaceConfig
from mixers.streams import Streams
from mixers.testing import CheckInputs
from mixers.testing.checks.matrix import check_forward_equals_its_matrix
from mixers.testing.tolerances import assert_close
from mixers.traits import CAUSALITIES
from mixers.zoo.mamba2 import Mamba2
from tests.mixers.builders import disturbed, float64

LENGTH = 20
GRID = (4, 5)
FAMILY = ("mamba", "mamba2", "vssd", "hydra")
OFF = {"expand": 1, "conv_size": 0, "skip": False, "norm": False, "gate": False}


def built(name: str, **options: Any) -> TokenMixer:
    """Small, in float64, away from its start."""
    return disturbed(create_mixer(name, 12, 2, **({"d_state": 4} | options)))


def drop_in(name: str, **options: Any) -> TokenMixer:
    """The drop-in form, with projections of its own."""
    return built(name, **(dict(_class(name).drop_in_options) | options))


def _class(name: str) -> type[TokenMixer]:
    return type(create_mixer(name, 4, 2))


def streams_of(mixer: TokenMixer, x: Tensor) -> Any:
    return mixer.compute_streams(x, mixer.resolve_projections(None), GRID)


@pytest.mark.parametrize("causality", CAUSALITIES)
@pytest.mark.parametrize("normalize", [True, False])
def test_mamba2_without_decay_is_linear_attention_on_weighted_keys(causality: str, normalize: bool) -> None:
    settings = {"causality": causality, "normalize": normalize, "eps": 1e-200}  # eps means another thing with decay
    mixer = drop_in("mamba2", **settings)
    torch.nn.init.constant_(mixer.decay.A_log, -torch.inf)  # A = 0
    s = streams_of(mixer, float64(2, LENGTH, 12))
    assert (s.log_decay == 0).all()
    q, k = mixer.features(dataclasses.replace(s, dt=None))
    scale = 1 / 256 if causality == "noncausal" else 1.0  # without decay, sums grow with the number of tokens
    assert_close(mixer.mix(s), linear_attention(q, k * s.dt[..., None], s.v, scale=scale, **settings))


@pytest.mark.parametrize("causality", CAUSALITIES)
@pytest.mark.parametrize("normalize", [True, False])
def test_s6_with_one_a_and_one_step_a_head_is_ssd(causality: str, normalize: bool) -> None:
    dt = float64(2, LENGTH, 3).exp()
    A = -float64(3).exp()
    B = float64(2, LENGTH, 3, 4).exp()
    C = float64(2, LENGTH, 3, 4).exp()
    u = float64(2, LENGTH, 3, 5)
    settings = {"causality": causality, "normalize": normalize}
    wide = selective_scan(u, dt[..., None].expand_as(u), A[:, None, None].expand(3, 5, 4), B, C, **settings)
    assert_close(wide, linear_attention(C, B * dt[..., None], u, dt * A, **settings))


@pytest.mark.parametrize("causality", CAUSALITIES)
def test_mamba_with_one_a_and_one_step_a_head_is_mamba2(causality: str) -> None:
    """The two mixers, not their operators alone: the same projections, and Δ and A spread over channels."""
    wide = drop_in("mamba", causality=causality, dt_rank=2)
    narrow = drop_in("mamba2", causality=causality)
    wide.projections.load_state_dict(narrow.projections.state_dict())
    with torch.no_grad():
        wide.A_log.copy_(narrow.decay.A_log.repeat_interleave(6)[:, None].expand(12, 6))
        wide.step.down.weight.copy_(narrow.decay.to_dt.weight)
        wide.step.up.weight.copy_(torch.eye(2).repeat_interleave(6, dim=0))
        wide.step.up.bias.copy_(narrow.decay.dt_bias.repeat_interleave(6))
    x = float64(2, LENGTH, 12)
    assert_close(wide(x), narrow(x))
    matrix = structure.mixing_matrix(wide, x)
    assert_close(matrix, structure.mixing_matrix(narrow, x)[:, :, None].expand_as(matrix))


@pytest.mark.parametrize("causality", CAUSALITIES)
@pytest.mark.parametrize("normalize", [True, False])
def test_a_vector_of_equal_gates_is_one_gate(causality: str, normalize: bool) -> None:
    q = float64(2, LENGTH, 2, 4).exp()
    k = float64(2, LENGTH, 2, 4).exp()
    v = float64(2, LENGTH, 2, 3)
    gate = -float64(2, LENGTH, 2).exp()
    settings = {"causality": causality, "normalize": normalize}
    vector = linear_attention(q, k, v, gate[..., None].expand_as(q), **settings)
    assert_close(vector, linear_attention(q, k, v, gate, **settings))


def test_mamba2_is_its_published_formula() -> None:
    """Every published part on: the block written out token by token."""
    mixer = built("mamba2", n_groups=2)
    x = float64(2, LENGTH, 12)
    own = mixer.projections
    conv = mixer.short_conv
    xBC = torch.cat([own.to_v(x), own.to_k(x), own.to_q(x)], dim=-1).transpose(1, 2)
    xBC = F.silu(F.conv1d(F.pad(xBC, (3, 0)), conv.weight, conv.bias, groups=xBC.shape[1])).transpose(1, 2)
    inner, B, C = xBC.split([24, 8, 8], dim=-1)
    u, B, C = (t.unflatten(-1, (2, -1)) for t in (inner, B, C))
    dt = F.softplus(mixer.decay.to_dt(x) + mixer.decay.dt_bias)
    a = (-dt * mixer.decay.A_log.exp()).exp()
    state = torch.zeros(2, 2, 12, 4, dtype=torch.float64)
    rows = []
    for t in range(LENGTH):
        added = (dt[:, t, :, None] * u[:, t])[..., None] * B[:, t, :, None]
        state = a[:, t, :, None, None] * state + added
        rows.append((state * C[:, t, :, None]).sum(-1) + mixer.output.D[:, None] * u[:, t])
    y = (torch.stack(rows, dim=1).flatten(2) * F.silu(mixer.output.to_gate(x))).unflatten(-1, (2, -1))
    y = (y * (y.square().mean(-1, keepdim=True) + 1e-5).rsqrt()).flatten(2) * mixer.output.norm.weight
    assert_close(mixer(x), own.to_out(y))


@pytest.mark.parametrize("name", FAMILY)
def test_the_published_form_with_every_part_off_is_the_drop_in_form(name: str) -> None:
    own = {"mamba": {"selection": "input"}, "hydra": {"shared_keys": True, "own_query": True}}.get(name, {})
    switched = built(name, **OFF, **own, d_state=6, n_groups=2)
    simple = drop_in(name)
    expected = {**simple.config.to_dict(), "d_state": 6, "n_groups": 2}
    assert switched.config.to_dict() == expected
    switched.load_state_dict(simple.state_dict())
    x = float64(2, LENGTH, 12)
    assert torch.equal(switched(x), simple(x))


@pytest.mark.parametrize("name", FAMILY)
def test_every_part_is_a_switch(name: str) -> None:
    """Each of the published parts can be taken away alone, and makes a difference."""
    x = float64(1, LENGTH, 12)
    full = built(name)
    parts = [part for part in ("conv_size", "skip", "norm", "gate") if getattr(full.config, part)]
    assert parts
    for part in parts:
        off = {part: type(getattr(full.config, part))(0)}
        less = built(name, **off)
        missing = less.load_state_dict(full.state_dict(), strict=False)
        assert not missing.missing_keys and missing.unexpected_keys
        assert (less(x, grid=GRID) - full(x, grid=GRID)).abs().max() > 1e-6, part


@pytest.mark.parametrize("name", FAMILY)
def test_the_drop_in_form_starts_from_a_hosts_projections(name: str) -> None:
    mounted = create_mixer(name, 12, 2, own_projections=False).double()
    own = drop_in(name)
    mounted.load_state_dict({n: p for n, p in own.state_dict().items() if not n.startswith("projections.")})
    x = float64(1, LENGTH, 12)
    assert torch.equal(mounted(x, projections=own.projections), own(x))
    with pytest.raises(ValueError, match="drop-in form"):
        create_mixer(name, 12, 2, own_projections=False, expand=2)


@pytest.mark.parametrize("normalize", [True, False])
def test_gates_without_an_order_are_weights_of_tokens(normalize: bool) -> None:
    mixer = drop_in("mamba2", causality="noncausal", normalize=normalize)
    s = streams_of(mixer, float64(2, LENGTH, 12))
    q, k = mixer.features(s)
    settings = {"causality": "noncausal", "normalize": normalize, "eps": mixer.config.eps, "scale": 1 / 256}
    assert_close(mixer.mix(s), linear_attention(q, k * s.log_decay.exp()[..., None], s.v, **settings))


@pytest.mark.parametrize("normalize", [True, False])
def test_s6_without_an_order_has_weighted_tokens(normalize: bool) -> None:
    mixer = drop_in("mamba", causality="noncausal", normalize=normalize, eps=1e-200)
    s = streams_of(mixer, float64(2, LENGTH, 12))
    C, B = mixer.features(s)
    gates = (s.dt[..., None] * mixer.A).exp()  # (b, l, h, v, n)
    weights = torch.einsum("bihn,bjhn,bjhvn,bjhv->bhvij", C, B, gates, s.dt)
    weights = weights / weights.sum(-1, keepdim=True) if normalize else weights / 256
    assert_close(mixer.mix(s), torch.einsum("bhvij,bjhv->bihv", weights, s.v))


@pytest.mark.parametrize("causality", CAUSALITIES)
@pytest.mark.parametrize("normalize", [True, False])
def test_vssd_with_unit_weights_is_linear_attention(causality: str, normalize: bool) -> None:
    settings = {"causality": causality, "normalize": normalize, "eps": 1e-6}
    mixer = drop_in("vssd", **settings)
    with torch.no_grad():  # Δ = softplus(log(e − 1)) = 1 and |A| = 1
        mixer.decay.to_dt.weight.zero_()
        mixer.decay.dt_bias.fill_(math.log(math.expm1(1)))
        mixer.decay.A_log.zero_()
    s = streams_of(mixer, float64(2, LENGTH, 12))
    assert_close(s.dt, torch.ones_like(s.dt))
    q, k = mixer.features(s)
    assert_close(mixer.mix(s), linear_attention(q, k, s.v, **settings))


def test_vssd_is_its_published_formula() -> None:
    """SiLU(conv(x, B, C)) over the image, C (Bᵀ (V ⊙ Δ|A|)) + D V, LayerNorm over the inner width, times z itself."""
    mixer = built("vssd")
    x = float64(2, LENGTH, 12)
    own = mixer.projections
    conv = mixer.short_conv
    image = torch.cat([own.to_v(x), own.to_k(x), own.to_q(x)], dim=-1).mT.unflatten(-1, GRID)
    image = F.silu(F.conv2d(image, conv.weight, conv.bias, padding=1, groups=32))
    v, B, C = image.flatten(2).mT.split([24, 4, 4], dim=-1)
    v = v.unflatten(-1, (2, -1))
    weight = F.softplus(mixer.decay.to_dt(x) + mixer.decay.dt_bias) * mixer.decay.A_log.exp()
    state = torch.einsum("bln,blhv->bhnv", B, v * weight[..., None])
    y = torch.einsum("bln,bhnv->blhv", C, state) + mixer.output.D[:, None] * v
    normed = F.layer_norm(y.flatten(2), (24,), mixer.output.norm.weight, mixer.output.norm.bias)
    assert_close(mixer(x, grid=GRID), own.to_out(normed * mixer.output.to_gate(x)))


def test_hydra_is_two_moved_scans_and_a_diagonal() -> None:
    """As published: y = shift(SS(x)) + flip(shift(SS(flip x))) + (fc(x) + D) ⊙ x, then RMSNorm(y)·SiLU(z)."""
    mixer = built("hydra")
    x = float64(2, LENGTH, 12)
    own = mixer.projections
    conv = mixer.short_conv
    parts = [own.to_v(x), own.to_k(x), own.to_q(x)]
    mixed = F.silu(F.conv1d(torch.cat(parts, dim=-1).transpose(1, 2), conv.weight, conv.bias, padding=3, groups=40))
    inner, B, C = mixed.transpose(1, 2).split([24, 8, 8], dim=-1)
    u = inner.unflatten(-1, (2, -1))
    steps = F.softplus(mixer.decay.to_dt(x).unflatten(-1, (2, 2)) + mixer.decay.dt_bias)  # (b, l, direction, h)
    y = (mixer.diagonal(inner))[..., None] * u
    for direction in (0, 1):
        dt = steps[:, :, direction]
        streams = [dt, u, B[..., 4 * direction :][..., :4], C[..., 4 * direction :][..., :4]]
        dt, v, b, c = streams if direction == 0 else [t.flip(1) for t in streams]
        b, c = (t[:, :, None].expand(2, LENGTH, 2, 4) for t in (b, c))
        log_decay = -dt * mixer.decay.A_log.exp()
        scan = linear_attention(c, b * dt[..., None], v, log_decay, causality="causal", normalize=False)
        shifted = torch.cat([torch.zeros_like(scan[:, :1]), scan[:, :-1]], dim=1)
        y = y + (shifted if direction == 0 else shifted.flip(1))
    y = y.flatten(2)
    normed = y * (y.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * mixer.output.norm.weight
    assert_close(mixer(x), own.to_out(normed * F.silu(mixer.output.to_gate(x))))


@pytest.mark.parametrize("own_query", [True, False])
def test_hydras_matrix_is_quasiseparable(own_query: bool) -> None:
    mixer = drop_in("hydra", own_query=own_query, d_state=3)
    x = float64(1, LENGTH, 12)
    s = streams_of(mixer, x)
    matrix = structure.mixing_matrix(mixer, x)
    assert_close(matrix.diagonal(dim1=-2, dim2=-1), s.diagonal.transpose(1, 2))
    for cut in range(1, LENGTH):  # blocks off the diagonal: all that crosses a cut, both ways
        for block in (matrix[..., cut:, :cut], matrix[..., :cut, cut:]):
            ranks = structure.numerical_rank(block, 1e-10)
            assert (ranks <= 3).all()
    assert (structure.numerical_rank(matrix[..., 9:, :9], 1e-10) == 3).all()  # and as rich as that
    causal = {"causality": "causal", "own_query": own_query}
    past = create_mixer("hydra", 12, 2, **(dict(_class("hydra").drop_in_options) | causal))
    assert structure.is_causal(structure.mixing_matrix(past.double(), x))


def test_hydra_decays_between_two_tokens_alone() -> None:
    """W_{i+1,i} has no gate in it and W_{i+2,i} has that of token i + 1, in both directions."""
    mixer = drop_in("hydra")
    x = float64(1, LENGTH, 12)
    s = streams_of(mixer, x)
    W = structure.mixing_matrix(mixer, x)
    gates = s.log_decay.exp()
    dt = s.dt
    pairs = torch.einsum("bihn,bjhn->bhij", s.q, s.k)
    for i in range(LENGTH - 2):
        assert_close(W[:, :, i + 1, i], pairs[:, :, i + 1, i] * dt[:, i, :2])
        assert_close(W[:, :, i + 2, i], pairs[:, :, i + 2, i] * dt[:, i, :2] * gates[:, i + 1, :2])
        assert_close(W[:, :, i, i + 2], pairs[:, :, i, i + 2] * dt[:, i + 2, 2:] * gates[:, i + 1, 2:])


def test_refusals_give_the_reason() -> None:
    with pytest.raises(ValueError, match="use vssd"):
        create_mixer("hydra", 12, 2, causality="noncausal")
    with pytest.raises(ValueError, match="does not divide the 2 heads"):
        create_mixer("mamba2", 12, 2, n_groups=3)
    with pytest.raises(ValueError, match="Did you mean 'input'"):
        create_mixer("mamba", 12, 2, selection="inptu")
    with pytest.raises(ValueError, match="dt_rank > 0"):
        create_mixer("mamba", 12, 2, dt_rank=0)
    with pytest.raises(ValueError, match="d_state and n_groups > 0"):
        create_mixer("vssd", 12, 2, d_state=0)


class OwnFeatures(Mamba2):
    """Keys times a factor that differs between heads, although all heads share B."""

    def features(self, streams: Streams) -> tuple[Tensor, Tensor]:
        q, k = super().features(streams)
        return q, k * torch.arange(1, 1 + self.heads, dtype=k.dtype)[:, None]


def test_features_of_a_subclass_are_those_of_every_head() -> None:
    mixer = disturbed(OwnFeatures(StateSpaceConfig(d_state=4), 12, 2))
    check_forward_equals_its_matrix(mixer, CheckInputs((1, 9)))
