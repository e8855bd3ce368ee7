"""Mixers with gates that are equal on paper are equal here, in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixers import TokenMixer, create_mixer, structure
from mixers.operators import linear_attention
from mixers.stages.rotary import rotary
from mixers.stages.token_shift import TokenShift
from mixers.testing.tolerances import assert_close
from mixers.traits import CAUSALITIES
from tests.mixers.builders import disturbed, float64

LENGTH = 19
FAMILY = ("gla", "retnet", "rwkv6", "gated_deltanet", "kda")


def built(name: str, **options: Any) -> TokenMixer:
    """Small, in float64, away from its start."""
    return disturbed(create_mixer(name, 12, 2, **(dict(_class(name).tiny_options) | options)))


def drop_in(name: str, **options: Any) -> TokenMixer:
    """The drop-in form, with projections of its own."""
    return built(name, **(dict(_class(name).drop_in_options) | options))


def _class(name: str) -> type[TokenMixer]:
    return type(create_mixer(name, 4, 2))


def streams_of(mixer: TokenMixer, x: Tensor) -> Any:
    return mixer.compute_streams(x, mixer.resolve_projections(None))


def linear_like(mixer: TokenMixer, **options: Any) -> TokenMixer:
    """Linear attention with the projections, map and scale 1/√k of a mixer of this family."""
    settings = {"causality": mixer.config.causality, "normalize": mixer.config.normalize, "eps": mixer.config.eps}
    settings["feature_map"] = "elu_plus_one" if mixer.config.normalize else "identity"
    settings["reference_length"] = 256 if mixer.config.causality == "noncausal" else 1
    peer = create_mixer("linear_attention", 12, 2, **settings, **options).double()
    peer.projections.load_state_dict({"to_out.bias": torch.zeros(12)} | mixer.projections.state_dict())
    return peer


def without_decay(mixer: TokenMixer) -> None:
    """Gates of 1, by the parameters."""
    with torch.no_grad():
        mixer.decay.up.weight.zero_()
        mixer.decay.up.bias.fill_(-1e4 if type(mixer).__name__ == "RWKV6" else 1e4)


@pytest.mark.parametrize("causality", CAUSALITIES)
@pytest.mark.parametrize("normalize", [True, False])
def test_gla_with_gates_of_one_is_linear_attention(causality: str, normalize: bool) -> None:
    mixer = drop_in("gla", causality=causality, normalize=normalize, eps=1e-200)  # eps means another thing with decay
    without_decay(mixer)
    x = float64(2, LENGTH, 12)
    assert (streams_of(mixer, x).log_decay == 0).all()
    assert_close(mixer(x), linear_like(mixer)(x))


@pytest.mark.parametrize("causality", CAUSALITIES)
@pytest.mark.parametrize("normalize", [True, False])
def test_retnet_with_gates_of_one_is_linear_attention(causality: str, normalize: bool) -> None:
    mixer = drop_in("retnet", causality=causality, normalize=normalize, eps=1e-200, first_exponent=900.0)
    x = float64(2, LENGTH, 12)
    assert_close(mixer(x), linear_like(mixer)(x))


@pytest.mark.parametrize("causality", CAUSALITIES)
def test_rwkv6_with_a_bonus_of_one_and_no_decay_is_linear_attention(causality: str) -> None:
    """Unnormalized, with an order: weights of 1 times the current token's own are the diagonal."""
    mixer = drop_in("rwkv6", causality=causality, normalize=False)
    without_decay(mixer)
    torch.nn.init.constant_(mixer.bonus, 0.0 if causality == "noncausal" else 1.0)
    x = float64(2, LENGTH, 12)
    s = streams_of(mixer, x)
    scale = 1 / 256 if causality == "noncausal" else 1.0  # without decay, sums grow with the number of tokens
    expected = linear_attention(s.q, s.k, s.v, causality=causality, normalize=False, scale=scale)
    assert_close(mixer.mix(s), expected)
    without = drop_in("rwkv6", causality=causality, normalize=False, bonus=False)
    without.load_state_dict({n: t for n, t in mixer.state_dict().items() if n != "bonus"})
    assert_close(without.mix(s), expected)


@pytest.mark.parametrize("causality", ["causal", "bidirectional"])
def test_normalized_rwkv6_with_a_bonus_of_one_and_no_decay_is_linear_attention(causality: str) -> None:
    mixer = drop_in("rwkv6", causality=causality, normalize=True, eps=1e-200)
    without_decay(mixer)
    torch.nn.init.zeros_(mixer.bonus)  # exp(0) = 1
    x = float64(2, LENGTH, 12)
    assert_close(mixer(x), linear_like(mixer)(x))


@pytest.mark.parametrize("normalize", [True, False])
def test_rwkv6_without_order_and_bonus_is_gla_without_order(normalize: bool) -> None:
    """Gates are weights of tokens in both, and eps is added to the mean weight in both."""
    settings = {"causality": "noncausal", "normalize": normalize, "eps": 0.1}
    mixer = drop_in("rwkv6", bonus=False, **settings)
    peer = drop_in("gla", **settings)
    s = streams_of(mixer, float64(2, LENGTH, 12))
    assert_close(mixer.mix(s) * (1 if normalize else peer.scale), peer.mix(s))
    assert mixer.traits.permutation_equivariant and mixer.traits.repetition_invariant == normalize


def test_rwkv6_weights_have_the_gates_between_two_tokens() -> None:
    """Neither end's gate counts, in both directions; a token sees itself through the bonus alone."""
    mixer = drop_in("rwkv6", causality="bidirectional", normalize=False)
    x = float64(1, LENGTH, 12)
    s = streams_of(mixer, x)
    matrix = structure.mixing_matrix(mixer, x)
    gates = s.log_decay.exp()
    for i in range(LENGTH):
        assert_close(matrix[:, :, i, i], (s.q[:, i] * mixer.bonus * s.k[:, i]).sum(-1))
        for j in range(LENGTH):
            if i != j:
                between = gates[:, min(i, j) + 1 : max(i, j)].prod(1)
                assert_close(matrix[:, :, i, j], (s.q[:, i] * s.k[:, j] * between).sum(-1))


@pytest.mark.parametrize("causality", CAUSALITIES)
def test_gla_with_one_gate_for_all_channels_is_ssd(causality: str) -> None:
    """The mixer with the same gate in every channel of a head, and the operator with one gate a head."""
    mixer = drop_in("gla", causality=causality)
    with torch.no_grad():
        for parameter in (mixer.decay.up.weight, mixer.decay.up.bias):
            parameter.copy_(parameter.unflatten(0, (2, -1))[:, :1].expand(2, 6, *parameter.shape[1:]).flatten(0, 1))
    s = streams_of(mixer, float64(2, LENGTH, 12))
    scale = 6**-0.5 / (256 if causality == "noncausal" else 1)
    settings = {"causality": causality, "normalize": False, "scale": scale}
    assert_close(mixer.mix(s), linear_attention(s.q, s.k, s.v, s.log_decay[..., 0], **settings))


@pytest.mark.parametrize("normalize", [True, False])
def test_retnet_is_gla_with_its_fixed_gates(normalize: bool) -> None:
    mixer = drop_in("retnet", normalize=normalize)
    peer = drop_in("gla", normalize=normalize, gate_logit_normalizer=1.0)
    s = streams_of(mixer, float64(2, LENGTH, 12))
    gates = torch.tensor([1 - 2**-5, 1 - 2**-6], dtype=torch.float64).log()
    assert_close(s.log_decay, gates)
    with torch.no_grad():
        peer.decay.up.weight.zero_()
        peer.decay.up.bias.copy_((gates - torch.log1p(-gates.exp())).repeat_interleave(6))  # logit of γ
    peer.projections.load_state_dict(mixer.projections.state_dict())
    x = float64(2, LENGTH, 12)
    assert_close(mixer(x), peer(x))


def test_retnet_is_its_published_formula() -> None:
    """Every published part on, as the paper's parallel form: (Q Kᵀ ⊙ D) V with Q, K turned, GroupNorm, swish."""
    mixer = built("retnet")
    x = float64(2, LENGTH, 12)
    own = mixer.projections
    q, k = (rotary(p(x).unflatten(-1, (2, -1)), inclusive=True) for p in (own.to_q, own.to_k))
    v = own.to_v(x).unflatten(-1, (2, -1))
    apart = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    decay = torch.stack([(1 - 2.0 ** (-5 - h)) ** apart.double() for h in range(2)]).tril()
    y = torch.einsum("bihk,bjhk,hij,bjhv->bihv", q, k, decay, v) / math.sqrt(6)
    y = F.rms_norm(y, y.shape[-1:], eps=1e-5).flatten(2)
    assert_close(mixer(x), own.to_out(y * F.silu(mixer.output.to_gate(x))))


def test_retnets_turned_weights_depend_on_differences_of_places() -> None:
    """The same token everywhere: W is a Toeplitz matrix, and no order is free of places."""
    x = float64(1, 1, 12).expand(1, LENGTH, 12)
    matrix = structure.mixing_matrix(built("retnet", causality="bidirectional"), x)
    assert_close(matrix[..., 1:, 1:], matrix[..., :-1, :-1])
    assert not built("retnet", causality="noncausal").traits.permutation_equivariant
    assert built("retnet", causality="noncausal", normalize=True).traits.permutation_equivariant


def test_gla_is_its_published_formula() -> None:
    """Every published part on: the block written out token by token."""
    mixer = built("gla")
    x = float64(2, LENGTH, 12)
    own = mixer.projections
    decay = mixer.decay
    q, k, v = (p(x).unflatten(-1, (2, -1)) for p in (own.to_q, own.to_k, own.to_v))
    a = (x @ decay.down.weight.T @ decay.up.weight.T + decay.up.bias).sigmoid().pow(1 / 16).unflatten(-1, (2, -1))
    state = torch.zeros(2, 2, 3, 6, dtype=torch.float64)
    rows = []
    for t in range(LENGTH):
        state = a[:, t, :, :, None] * state + k[:, t, :, :, None] * v[:, t, :, None]
        rows.append((q[:, t, :, :, None] * state).sum(-2) / math.sqrt(3))
    y = F.rms_norm(torch.stack(rows, dim=1), (6,), mixer.output.norm.weight, eps=1e-5).flatten(2)
    assert_close(mixer(x), own.to_out(y * F.silu(mixer.output.to_gate(x))))


def test_rwkv6_is_its_published_formula() -> None:
    """Every published part on, token by token with the paper's names."""
    mixer = built("rwkv6")
    x = float64(2, LENGTH, 12)
    own = mixer.projections
    shift = mixer.token_shift
    last = torch.zeros(2, 12).double()
    state = torch.zeros(2, 2, 6, 6).double()
    u = mixer.bonus
    rows = []
    for t in range(LENGTH):
        a = x[:, t]
        b = last
        low = torch.tanh((a + (b - a) * shift.mu) @ shift.down.weight.T).unflatten(-1, (5, 3))
        mixed = [a + (b - a) * (shift.offsets[s] + low[:, s] @ shift.up[s]) for s in range(5)]
        for_w, for_k, for_v, for_r, for_g = mixed
        w = mixer.decay.up(torch.tanh(mixer.decay.down(for_w)))
        w = torch.exp(-torch.exp(w)).unflatten(-1, (2, 6))
        r, k, v = (p(s).unflatten(-1, (2, 6)) for p, s in ((own.to_q, for_r), (own.to_k, for_k), (own.to_v, for_v)))
        kv = k[..., None] * v[:, :, None]
        read = (r[..., None] * (state + u[..., None] * kv)).sum(-2).flatten(1)
        state, last = w[..., None] * state + kv, a
        normed = F.group_norm(read, 2, mixer.output.norm.weight, mixer.output.norm.bias, eps=64e-5)
        rows.append(own.to_out(normed * F.silu(mixer.output.to_gate(for_g))))
    assert_close(mixer(x), torch.stack(rows, dim=1))


@pytest.mark.parametrize("decay", [True, False])
@pytest.mark.parametrize("negative", [True, False])
def test_gated_deltanet_is_its_published_formula(decay: bool, negative: bool) -> None:
    """Plain loops on the module's own parts: erase under the key, write, read."""
    mixer = built("gated_deltanet", decay=decay, allow_neg_eigval=negative)
    x = float64(2, LENGTH, 12)
    own = mixer.projections
    conv = mixer.short_conv
    streams = torch.cat([own.to_v(x), own.to_k(x), own.to_q(x)], dim=-1).mT
    streams = F.silu(F.conv1d(F.pad(streams, (3, 0)), conv.weight, conv.bias, groups=34)).mT
    v, k, q = (t.unflatten(-1, (2, -1)) for t in streams.split([18, 8, 8], dim=-1))
    q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    beta = (2 if negative else 1) * mixer.to_beta(x).sigmoid()
    a = torch.ones_like(beta)
    if decay:
        a = (-F.softplus(mixer.decay.to_dt(x) + mixer.decay.dt_bias) * mixer.decay.A_log.exp()).exp()
    rows = []
    eye = torch.eye(k.shape[-1], dtype=torch.float64)
    state = torch.zeros(2, 2, k.shape[-1], v.shape[-1], dtype=torch.float64)
    for t in range(LENGTH):
        key = k[:, t, :, :, None]
        b = beta[:, t, :, None, None]
        state = a[:, t, :, None, None] * (eye - b * key @ key.mT) @ state + b * key * v[:, t, :, None]
        rows.append((q[:, t, :, None] @ state)[..., 0, :] / math.sqrt(k.shape[-1]))
    y = F.rms_norm(torch.stack(rows, dim=1), (9,), mixer.output.norm.weight, eps=1e-5).flatten(2)
    assert_close(mixer(x), own.to_out(y * F.silu(mixer.output.to_gate(x))))


@pytest.mark.parametrize("negative", [True, False])
def test_kda_is_its_published_formula(negative: bool) -> None:
    """Plain loops on the module's own parts: decay every key channel, erase under the key, write, read."""
    mixer = built("kda", allow_neg_eigval=negative)
    x = float64(2, LENGTH, 12)
    own = mixer.projections
    conv = mixer.short_conv
    streams = torch.cat([own.to_v(x), own.to_k(x), own.to_q(x)], dim=-1).mT
    streams = F.silu(F.conv1d(F.pad(streams, (3, 0)), conv.weight, conv.bias, groups=36)).mT
    v, k, q = (t.unflatten(-1, (2, -1)) for t in streams.split([12, 12, 12], dim=-1))
    q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    beta = (2 if negative else 1) * mixer.to_beta(x).sigmoid()
    decay = mixer.decay
    low = x @ decay.down.weight.T @ decay.up.weight.T
    a = (-decay.A_log.exp()[:, None] * F.softplus(low + decay.dt_bias).unflatten(-1, (2, 6))).exp()
    state = torch.zeros(2, 2, 6, 6, dtype=torch.float64)
    rows = []
    for t in range(LENGTH):
        key = k[:, t, :, :, None]
        state = a[:, t, :, :, None] * state
        stored = (key * state).sum(-2)
        state = state + beta[:, t, :, None, None] * key * (v[:, t] - stored)[:, :, None]
        rows.append((q[:, t, :, :, None] * state).sum(-2) / 6**0.5)
    y = F.rms_norm(torch.stack(rows, dim=1), (6,), mixer.output.norm.weight, eps=1e-5).flatten(2)
    gate = mixer.output.to_gate
    expected = y * torch.sigmoid(x @ gate.down.weight.T @ gate.up.weight.T + gate.up.bias)
    assert_close(mixer(x), own.to_out(expected))


@pytest.mark.parametrize("causality", CAUSALITIES)
@pytest.mark.parametrize("normalize", [True, False])
def test_kda_with_one_gate_for_all_channels_is_gated_deltanet(causality: str, normalize: bool) -> None:
    switches = {"causality": causality, "normalize": normalize}
    kda = drop_in("kda", **switches)
    gated = drop_in("gated_deltanet", **switches)
    gated.load_state_dict({n: t for n, t in kda.state_dict().items() if "decay" not in n}, strict=False)
    s = streams_of(gated, float64(1, LENGTH, 12))
    shared = replace(s, log_decay=s.log_decay[..., None].expand_as(s.k))
    assert_close(kda.mix(shared), gated.mix(s))
    assert_close(kda.mixing_matrix(shared), gated.mixing_matrix(s))


def test_gated_deltanet_recalls_what_it_wrote_under_a_key() -> None:
    """β = 1 and no decay: an orthogonal key reads its last value back, the older one is gone."""
    mixer = drop_in("gated_deltanet", decay=False)
    s = streams_of(mixer, float64(1, 3, 12))
    keys = torch.eye(6, dtype=torch.float64)[[0, 1, 0]][None, :, None].expand(1, 3, 2, 6)
    streams = type(s)(s.x, keys * 6**0.5, keys, s.v, beta=torch.ones(1, 3, 2, dtype=torch.float64))
    matrix = mixer.mixing_matrix(streams)
    assert (matrix - torch.eye(3, dtype=torch.float64)).abs().max() < 1  # W_20 = 0: erased
    assert matrix[..., 2, 0].abs().max() < 1e-5


def test_token_shift_sees_itself_and_the_token_before() -> None:
    shift = disturbed(TokenShift(torch.rand(12), torch.rand(2, 12), rank=3), 0.3)
    x = float64(2, LENGTH, 12)
    whole = shift(x)
    assert_close(shift(x[:, 4:7])[1][:, 1:], whole[1][:, 5:7])
    with torch.no_grad():  # amounts of 0 leave x as it is, of 1 give the token before
        shift.up.zero_()
        shift.offsets.copy_(torch.tensor([0.0, 1.0])[:, None].expand(2, 12))
    same, before = shift(x)
    assert torch.equal(same, x)
    assert_close(before, F.pad(x, (0, 0, 1, -1)))
    assert shift.flops(10) == 4 * 10 * 2 * 3 * 12


@pytest.mark.parametrize("name", FAMILY)
def test_every_part_is_a_switch(name: str) -> None:
    """Each of the published parts can be taken away alone, and makes a difference."""
    x = float64(1, LENGTH, 12)
    full = built(name)
    parts = [p for p in ("conv_size", "norm", "gate", "bonus", "token_shift") if getattr(full.config, p, 0)]
    assert parts
    for part in parts:
        off = {part: type(getattr(full.config, part))(0)}
        less = built(name, **off)
        missing = less.load_state_dict(full.state_dict(), strict=False)
        assert not missing.missing_keys
        assert (less(x) - full(x)).abs().max() > 1e-6, part
    more = built(name, skip=True, conv_size=3)
    assert more.output.D is not None and more(x).shape == x.shape


@pytest.mark.parametrize("name", FAMILY)
def test_the_drop_in_form_starts_from_a_hosts_projections(name: str) -> None:
    mounted = create_mixer(name, 12, 2, own_projections=False, **_class(name).tiny_options).double()
    own = drop_in(name)
    mounted.load_state_dict({n: p for n, p in own.state_dict().items() if not n.startswith("projections.")})
    x = float64(1, LENGTH, 12)
    assert torch.equal(mounted(x, projections=own.projections), own(x))
    with pytest.raises(ValueError, match="drop-in form"):
        create_mixer(name, 12, 2, own_projections=False, expand=2)


def test_keys_are_whole_channels_a_head() -> None:
    assert create_mixer("gla", 20, 4).key_width == 8  # half of 20, in 4 heads of 2
    assert create_mixer("gla", 1024, 4).key_width == 512
    assert create_mixer("gated_deltanet", 2048, 4).key_width == 1536


def test_refusals_give_the_reason() -> None:
    with pytest.raises(ValueError, match="use rotary=False"):
        create_mixer("retnet", 12, 2, rotary=True, normalize=True)
    for name in ("gated_deltanet", "kda"):
        with pytest.raises(ValueError, match="needs a positive feature map"):
            create_mixer(name, 12, 2, normalize=True, feature_map="identity")
        with pytest.raises(ValueError, match="row sums of ordinary sequences can be negative"):
            create_mixer(name, 12, 2, normalize=True, allow_neg_eigval=True)
    for name, options in (
        ("gla", {"expand_k": 0}),
        ("gla", {"gate_low_rank_dim": 0}),
        ("gated_deltanet", {"expand_k": -1}),
        ("kda", {"expand_k": 0}),
        ("kda", {"rank": 0}),
        ("rwkv6", {"shift_rank": 0}),
        ("rwkv6", {"decay_rank": 0}),
    ):
        with pytest.raises(ValueError, match=f"Expected .*{next(iter(options))} > 0"):
            create_mixer(name, 12, 2, **options)
    with pytest.raises(ValueError, match="at least one stream"):
        TokenShift(torch.zeros(4), torch.zeros(0, 4))
