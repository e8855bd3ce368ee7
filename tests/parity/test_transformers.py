"""Our mixers are those of `transformers` and torch: same weights, same outputs, same gradients."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixers import create_mixer, mixer_from_state_dict

LENGTHS = (1, 2, 7, 64, 65, 131)


def randomized(module: nn.Module) -> nn.Module:
    """Away from its start, so that a part that starts at zero or one is seen."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module.eval()


def mamba(**options: object) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.models.mamba.modeling_mamba import MambaMixer

    settings = {"hidden_size": 24, "state_size": 5, "conv_kernel": 4, "num_hidden_layers": 1, "vocab_size": 8}
    return randomized(MambaMixer(transformers.MambaConfig(**(settings | options)), layer_idx=0))


def mamba2(**options: object) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    settings = {"hidden_size": 24, "num_heads": 6, "head_dim": 8, "state_size": 5, "n_groups": 1, "chunk_size": 16}
    config = transformers.Mamba2Config(num_hidden_layers=1, vocab_size=8, **(settings | options))
    return randomized(Mamba2Mixer(config, layer_idx=0))


def assert_same(ours: nn.Module, peer: nn.Module, length: int) -> None:
    """Outputs to 1e-5 of the largest, the gradient of the tokens to 1e-4."""
    x = torch.randn(2, length, 24)
    x_ours = x.clone().requires_grad_()
    x_theirs = x.clone().requires_grad_()
    y = ours(x_ours)
    expected = peer(x_theirs)
    assert y.dtype == expected.dtype == torch.float32
    assert relative(y, expected) < 1e-5, f"outputs differ by {relative(y, expected):.1e}"
    weighting = torch.randn_like(y)
    (gradient,) = torch.autograd.grad((y * weighting).sum(), x_ours)
    (truth,) = torch.autograd.grad((expected * weighting).sum(), x_theirs)
    assert relative(gradient, truth) < 1e-4, f"gradients differ by {relative(gradient, truth):.1e}"


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("bias", [False, True])
def test_mamba_is_that_of_transformers(length: int, bias: bool) -> None:
    peer = mamba(use_bias=bias, use_conv_bias=not bias)
    assert_same(mixer_from_state_dict("mamba", peer.state_dict()), peer, length)


def test_heads_of_mamba_are_splits_of_its_channels() -> None:
    peer = mamba()
    assert_same(mixer_from_state_dict("mamba", peer.state_dict(), heads=3), peer, 19)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("groups", [1, 3])
def test_mamba2_is_that_of_transformers(length: int, groups: int) -> None:
    peer = mamba2(n_groups=groups)
    assert_same(mixer_from_state_dict("mamba2", peer.state_dict(), n_groups=groups), peer, length)


def test_mamba2_with_the_biases_of_transformers() -> None:
    peer = mamba2(use_bias=True, use_conv_bias=False)
    assert_same(mixer_from_state_dict("mamba2", peer.state_dict()), peer, 19)


@pytest.mark.parametrize("backend", ["dense", "recurrent"])
def test_every_formulation_is_that_of_transformers(backend: str) -> None:
    for name, peer in (("mamba", mamba()), ("mamba2", mamba2())):
        assert_same(mixer_from_state_dict(name, peer.state_dict(), backend=backend), peer, 33)


MAMBA_SSM = {  # names and shapes as mamba_ssm saves them: d_model 16, d_state 4, d_conv 4, expand 2, headdim 8
    "mamba": {
        **{"A_log": (32, 4), "D": (32,), "in_proj.weight": (64, 16), "conv1d.weight": (32, 1, 4)},
        **{"conv1d.bias": (32,), "x_proj.weight": (1 + 8, 32), "dt_proj.weight": (32, 1), "dt_proj.bias": (32,)},
        "out_proj.weight": (16, 32),
    },
    "mamba2": {
        **{"dt_bias": (4,), "A_log": (4,), "D": (4,), "in_proj.weight": (64 + 8 + 4, 16)},
        **{"conv1d.weight": (40, 1, 4), "conv1d.bias": (40,), "norm.weight": (32,), "out_proj.weight": (16, 32)},
    },
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MAMBA_SSM)
def test_the_names_of_mamba_ssm_load(name: str, dtype: torch.dtype) -> None:
    state = {key: torch.randn(shape, dtype=dtype) for key, shape in MAMBA_SSM[name].items()}
    mixer = mixer_from_state_dict(name, state)
    assert sum(p.numel() for p in mixer.parameters()) == sum(t.numel() for t in state.values())
    assert mixer(torch.randn(1, 5, 16, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("name", MAMBA_SSM)
def test_another_state_dict_is_refused_by_name(name: str) -> None:
    state = {key: torch.randn(shape) for key, shape in MAMBA_SSM[name].items()}
    for key in set(state) - {"norm.weight", "conv1d.bias"}:
        with pytest.raises(ValueError, match=f"{re.escape(key)}.* missing"):
            mixer_from_state_dict(name, {n: t for n, t in state.items() if n != key})
    with pytest.raises(ValueError, match=r"extra\.weight is unexpected"):
        mixer_from_state_dict(name, {**state, "extra.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"in_proj\.weight with .* rows, got 3"):
        mixer_from_state_dict(name, {**state, "in_proj.weight": torch.zeros(3, 16)})


def test_mamba2_without_its_norm_loads() -> None:
    state = {key: torch.randn(shape) for key, shape in MAMBA_SSM["mamba2"].items() if key != "norm.weight"}
    assert not mixer_from_state_dict("mamba2", state).config.norm


@pytest.mark.parametrize("causality", ["causal", "noncausal"])
def test_softmax_is_torchs(causality: str) -> None:
    """torch's MultiheadAttention, another code path than ours, with the same four projections."""
    mixer = create_mixer("softmax", 24, 3, causality=causality)
    own = mixer.projections
    x = torch.randn(2, 19, 24)
    peer = nn.MultiheadAttention(24, 3, batch_first=True)
    with torch.no_grad():
        peer.in_proj_weight.copy_(torch.cat([own.to_q.weight, own.to_k.weight, own.to_v.weight]))
        peer.out_proj.load_state_dict(own.to_out.state_dict())
    ahead = torch.ones(19, 19, dtype=torch.bool).triu(1) if causality == "causal" else None
    expected, weights = peer(x, x, x, attn_mask=ahead, average_attn_weights=False)
    assert relative(mixer(x), expected) < 1e-5
    q, k, v = (mixer.split_heads(p(x)).transpose(1, 2) for p in (own.to_q, own.to_k, own.to_v))
    fused = F.scaled_dot_product_attention(q, k, v, is_causal=causality == "causal")
    assert relative(weights @ v, fused) < 1e-5
    assert relative(mixer.mixing_matrix(mixer.compute_streams(x, own)), weights) < 1e-5
