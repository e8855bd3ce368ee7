"""Our mixers are those of `fla`: its naive operators, and its layers with the same weights.

The layers' kernels need a GPU; on a CPU they are replaced by fla's own naive operators and by torch's norms and
convolutions. All the rest of a layer's forward is its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixers import create_mixer, mixer_from_state_dict
from mixers.operators import delta_rule, linear_attention
from mixers.stages.decays import FixedDecay
from mixers.streams import Streams

HERE = 'install the extra "parity"'
pytest.importorskip("triton", reason=HERE)
fla = pytest.importorskip("fla", reason=HERE)

pytestmark = pytest.mark.filterwarnings("ignore")

LENGTHS = (1, 2, 7, 64, 65, 131)
B = 2
H = 3
K = 8
V = 5
BACKENDS = ("dense", "recurrent", "chunked")


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max())


def streams(length: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(B, length, H, K), torch.randn(B, length, H, K), torch.randn(B, length, H, V)


def heads_first(*tensors: Tensor) -> list[Tensor]:
    return [t.transpose(1, 2) for t in tensors]


def ours(*args: Tensor, backend: str, **settings: Any) -> tuple[Tensor, Tensor]:
    """A causal pass by our operator with fla's scale: the result and the state."""
    run = delta_rule if len(args) == 5 else linear_attention
    extra = {} if run is delta_rule else {"normalize": False, **settings}
    scale = K**-0.5
    y, state = run(*args, causality="causal", scale=scale, output_final_state=True, backend=backend, **extra)
    return y, state.memory


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gla(length: int, backend: str) -> None:
    from fla.ops.gla.naive import naive_recurrent_gla

    q, k, v = streams(length)
    gates = F.logsigmoid(torch.randn(B, length, H, K))
    expected, state = naive_recurrent_gla(q, k, v, gates, output_final_state=True)
    y, memory = ours(q, k, v, gates, backend=backend)
    assert relative(y, expected) < 1e-5 and relative(memory, state) < 1e-5


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_simple_gla_has_one_gate_a_head(length: int, backend: str) -> None:
    from fla.ops.simple_gla.naive import naive_parallel_simple_gla, naive_recurrent_simple_gla

    q, k, v = streams(length)
    gates = F.logsigmoid(torch.randn(B, length, H))
    expected, state = naive_recurrent_simple_gla(q, k, v, gates)
    y, memory = ours(q, k, v, gates, backend=backend)
    assert relative(y, expected) < 1e-5 and relative(memory, state) < 1e-5
    assert relative(y, naive_parallel_simple_gla(q, k, v, gates)[0]) < 1e-5


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_retention(length: int, backend: str) -> None:
    from fla.ops.retention.naive import naive_retention

    q, k, v = streams(length)
    (expected,) = heads_first(naive_retention(*heads_first(q, k, v)))
    assert relative(ours(q, k, v, FixedDecay(H)(q), backend=backend)[0], expected) < 1e-5


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("length", LENGTHS)
def test_linear_attention(length: int, normalize: bool) -> None:
    from fla.ops.linear_attn.naive import naive_recurrent_linear_attn

    q, k, v = streams(length)
    q, k = (q.exp(), k.exp()) if normalize else (q, k)
    expected, _ = naive_recurrent_linear_attn(q, k, v, normalize=normalize)
    settings: dict[str, Any] = {"causality": "causal", "eps": 1e-30, "scale": K**-0.5}
    assert relative(linear_attention(q, k, v, normalize=normalize, **settings), expected) < 1e-5


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gated_delta_rule(length: int, backend: str) -> None:
    from fla.ops.gated_delta_rule.naive import naive_chunk_gated_delta_rule, naive_recurrent_gated_delta_rule

    q, k, v = streams(length)
    k, beta = F.normalize(k, dim=-1), torch.rand(B, length, H)
    gates = F.logsigmoid(torch.randn(B, length, H))
    expected, state = naive_recurrent_gated_delta_rule(q, k, v, beta, gates, output_final_state=True)
    y, memory = ours(q, k, v, beta, gates, backend=backend)
    assert relative(y, expected) < 1e-5 and relative(memory, state) < 1e-5
    assert relative(y, naive_chunk_gated_delta_rule(q, k, v, gates, beta)[0]) < 1e-5


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_kimi_delta_attention(length: int, backend: str) -> None:
    from fla.ops.kda.naive import naive_chunk_kda, naive_recurrent_kda

    q, k, v = streams(length)
    k, beta = F.normalize(k, dim=-1), torch.rand(B, length, H)
    gates = F.logsigmoid(torch.randn(B, length, H, K))
    expected, state = naive_recurrent_kda(q, k, v, gates, beta, output_final_state=True)
    y, memory = ours(q, k, v, beta, gates, backend=backend)
    assert relative(y, expected) < 1e-5 and relative(memory, state) < 1e-5
    if length % 64 == 0:  # fla's formula in blocks takes whole blocks only
        assert relative(y, naive_chunk_kda(q, k, v, gates, beta)[0]) < 1e-5


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rwkv6(length: int, backend: str) -> None:
    """What our mixer makes of the linear attention operator: past without the own gate, and the bonus."""
    from fla.ops.rwkv6.recurrent_naive import naive_recurrent_rwkv6

    (q, k, v) = streams(length)
    u = torch.randn(H, K)
    gates = -torch.randn(B, length, H, K).exp()
    mixer = create_mixer("rwkv6", H * K, H, backend=backend)
    with torch.no_grad():
        mixer.bonus.copy_(u)
    (expected,) = heads_first(naive_recurrent_rwkv6(*heads_first(q, k, v, gates), u, scale=1.0)[0])
    inputs = Streams(q.flatten(2), q, k, v, log_decay=gates)
    assert relative(mixer.mix(inputs), expected) < 1e-5
    assert relative(torch.einsum("bhij,bjhv->bihv", mixer.mixing_matrix(inputs), v), expected) < 1e-5


# Layers: what their kernels compute, in torch


def naive(operator: Callable[..., Any]) -> Callable[..., Any]:
    """fla's naive operator under the keywords of the fused one."""

    def run(**arguments: Any) -> tuple[Tensor, None]:
        for name in ("output_final_state", "state_v_first", "cu_seqlens", "initial_state"):
            arguments.pop(name, None)
        return operator(**arguments), None

    return run


def gla_op(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, gk: Tensor | None = None) -> Tensor:
    from fla.ops.gla.naive import naive_recurrent_gla

    return naive_recurrent_gla(q, k, v, g if gk is None else gk)[0]


def retention_op(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from fla.ops.retention.naive import naive_retention

    return heads_first(naive_retention(*heads_first(q, k, v)))[0]


def rwkv6_op(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, scale: float) -> Tensor:
    from fla.ops.rwkv6.recurrent_naive import naive_recurrent_rwkv6

    return heads_first(naive_recurrent_rwkv6(*heads_first(r, k, v, w), u, scale=scale)[0])[0]


def delta_op(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **arguments: Any) -> Tensor:
    from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule

    fused = ("use_qk_l2norm_in_kernel", "use_beta_sigmoid_in_kernel", "use_gate_in_kernel")
    assert all(arguments[name] for name in fused)
    q, k = (t * (t.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for t in (q, k))
    beta = (2 if arguments["allow_neg_eigval"] else 1) * beta.sigmoid()
    log_decay = -arguments["A_log"].exp() * F.softplus(g + arguments["dt_bias"])
    return naive_recurrent_gated_delta_rule(q, k, v, beta, log_decay)[0]


def kda_op(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **arguments: Any) -> Tensor:
    from fla.ops.kda.gate import naive_kda_gate
    from fla.ops.kda.naive import naive_recurrent_kda

    fused = ("use_qk_l2norm_in_kernel", "use_beta_sigmoid_in_kernel", "use_gate_in_kernel")
    assert all(arguments[name] for name in fused) and arguments["lower_bound"] is None
    q, k = (t * (t.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for t in (q, k))
    beta = (2 if arguments["allow_neg_eigval"] else 1) * beta.sigmoid()
    return naive_recurrent_kda(q, k, v, naive_kda_gate(g, arguments["A_log"], arguments["dt_bias"]), beta)[0]


def rotated(x: Tensor, cos: Tensor, sin: Tensor, **_: Any) -> Tensor:
    from fla.modules.rotary import ops

    return ops.rotary_embedding_ref(x, cos[: x.shape[1]], sin[: x.shape[1]])


def normed_and_gated(self: nn.Module, x: Tensor, gate: Tensor) -> Tensor:
    activation = torch.sigmoid if self.activation == "sigmoid" else F.silu
    return F.rms_norm(x, x.shape[-1:], self.weight, self.eps) * activation(gate)


def normed(self: nn.Module, x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


def group_normed(self: nn.Module, x: Tensor) -> Tensor:
    return F.group_norm(x.flatten(0, 1), self.num_groups, self.weight, self.bias, self.eps).view_as(x)


def convolved(self: nn.Conv1d, x: Tensor, **_: Any) -> tuple[Tensor, None]:
    y = F.conv1d(F.pad(x.mT, (self.kernel_size[0] - 1, 0)), self.weight, self.bias, groups=self.groups)
    return F.silu(y).mT, None


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace every kernel of the layers."""
    from fla import modules
    from fla.layers import gated_deltanet, gla, kda, multiscale_retention, rwkv6
    from fla.modules import rotary, token_shift

    fused: list[tuple[Any, tuple[str, ...], Callable[..., Any]]] = [
        (gla, ("chunk_gla", "fused_recurrent_gla"), gla_op),
        (multiscale_retention, ("chunk_retention", "fused_recurrent_retention"), retention_op),
        (rwkv6, ("chunk_rwkv6", "fused_recurrent_rwkv6"), rwkv6_op),
        (gated_deltanet, ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"), delta_op),
        (kda, ("chunk_kda", "fused_recurrent_kda"), kda_op),
    ]
    for module, names, operator in fused:
        for name in names:
            monkeypatch.setattr(module, name, naive(operator))
    monkeypatch.setattr(rwkv6, "token_shift", token_shift.token_shift_ref)
    monkeypatch.setitem(rotary.RotaryEmbedding.forward.__globals__, "rotary_embedding", rotated)
    monkeypatch.setattr(modules.FusedRMSNormGated, "forward", normed_and_gated)
    monkeypatch.setattr(modules.RMSNorm, "forward", normed)
    monkeypatch.setattr(modules.GroupNorm, "forward", group_normed)
    monkeypatch.setattr(modules.ShortConvolution, "forward", convolved)
    monkeypatch.setattr(gated_deltanet.GatedDeltaNet, "_use_fused_qkv_conv", lambda *_, **__: False)


def layer(name: str, **options: Any) -> nn.Module:
    """fla's layer of 24 channels and 3 heads, away from its start."""
    import fla.layers as layers

    published = {
        "gla": ("GatedLinearAttention", {"gate_low_rank_dim": 4}),
        "retnet": ("MultiScaleRetention", {}),
        "gated_deltanet": ("GatedDeltaNet", {"head_dim": 6}),
        "kda": ("KimiDeltaAttention", {"head_dim": 6}),
        "rwkv6": ("RWKV6Attention", {"expand_k": 1.0, "norm_eps": 64e-5, "proj_low_rank_dim": 4}),
    }
    kind, settings = published[name]
    module = getattr(layers, kind)(hidden_size=24, num_heads=3, **(settings | options))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    if hasattr(module, "gate_fn"):
        module.gate_fn = nn.SiLU()
    return module.eval()


LAYERS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("gla", {}, {}),
    ("gla", {"use_short_conv": True}, {}),
    ("gla", {"use_short_conv": True, "conv_bias": True, "expand_k": 1.0, "expand_v": 2.0}, {}),
    ("gla", {"fuse_norm": False}, {}),
    ("gla", {"use_output_gate": False}, {}),
    ("gla", {"elementwise_affine": False}, {"heads": 3}),
    ("gla", {"gate_logit_normalizer": 4}, {"gate_logit_normalizer": 4.0}),
    ("retnet", {}, {}),
    ("retnet", {"use_short_conv": True, "conv_bias": True}, {}),
    ("retnet", {"use_output_gate": False, "elementwise_affine": False}, {"heads": 3}),
    ("gated_deltanet", {}, {}),
    ("gated_deltanet", {"use_gate": False, "conv_bias": True, "expand_v": 1}, {}),
    ("gated_deltanet", {"allow_neg_eigval": True}, {"allow_neg_eigval": True}),
    ("kda", {}, {}),
    ("kda", {"allow_neg_eigval": True, "expand_v": 2, "conv_bias": True}, {"allow_neg_eigval": True}),
    ("rwkv6", {}, {}),
    ("rwkv6", {"expand_v": 2.0}, {}),
]


@pytest.mark.parametrize("length", [1, 19, 65])
@pytest.mark.parametrize(("name", "settings", "arguments"), LAYERS, ids=lambda value: str(value))
def test_layer(on_cpu: None, name: str, settings: dict[str, Any], arguments: dict[str, Any], length: int) -> None:
    """Output to 1e-5 of the largest, the gradient of the tokens to 1e-4."""
    peer = layer(name, **settings)
    mixer = mixer_from_state_dict(name, peer.state_dict(), **arguments)
    x = torch.randn(2, length, 24)
    x_ours = x.clone().requires_grad_()
    x_theirs = x.clone().requires_grad_()
    y = mixer(x_ours)
    expected = peer(x_theirs)[0]
    assert y.dtype == expected.dtype == torch.float32
    assert relative(y, expected) < 1e-5, f"outputs differ by {relative(y, expected):.1e}"
    weighting = torch.randn_like(y)
    (gradient,) = torch.autograd.grad((y * weighting).sum(), x_ours)
    (truth,) = torch.autograd.grad((expected * weighting).sum(), x_theirs)
    assert relative(gradient, truth) < 1e-4, f"gradients differ by {relative(gradient, truth):.1e}"


@pytest.mark.parametrize("name", ["gla", "retnet", "gated_deltanet", "kda", "rwkv6"])
def test_another_state_dict_is_refused_by_name(name: str) -> None:
    state = layer(name).state_dict()
    first = next(n for n in state if n.endswith("proj.weight") or n.endswith("linear.weight"))
    with pytest.raises(ValueError, match=f"{first}.* missing"):
        mixer_from_state_dict(name, {n: t for n, t in state.items() if n != first})
    with pytest.raises(ValueError, match="stray is unexpected"):
        mixer_from_state_dict(name, {**state, "stray": torch.zeros(1)})


def test_a_norm_without_weight_does_not_tell_the_heads() -> None:
    with pytest.raises(ValueError, match="pass heads"):
        mixer_from_state_dict("gla", layer("gla", elementwise_affine=False).state_dict())


def test_shared_keys_and_values_are_refused() -> None:
    with pytest.raises(ValueError, match=r"projections\.to_k\.weight is \(4, 24\), expected \(12, 24\)"):
        mixer_from_state_dict("gla", layer("gla", num_kv_heads=1).state_dict())
