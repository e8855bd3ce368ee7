"""What `create_mixer(name, dim, heads)` builds, against the code that the papers' authors published.

SOURCES names the file and the commit that each entry was compared with. Where a model draws or scales the weights of
its layers after building them, the mixer's docstring says so under "Deviations from the published block".
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixers import TokenMixer, create_mixer, list_mixers, registry

DIM = 128
HEADS = 4
CONTROLS = {"identity", "softmax", "uniform", "linear_attention", "linfusion_low_rank"}  # no code was published

# The published code: repository, commit, file.
SOURCES: dict[str, tuple[str, str, str]] = {
    "mamba": ("state-spaces/mamba", "e9594ce", "mamba_ssm/modules/mamba_simple.py"),
    "mamba2": ("state-spaces/mamba", "e9594ce", "mamba_ssm/modules/mamba2.py"),
    "mamba3": ("state-spaces/mamba", "e9594ce", "mamba_ssm/modules/mamba3.py"),
    "hydra": ("goombalab/hydra", "55bef74", "hydra/modules/hydra.py"),
    "vssd": ("YuHengsss/VSSD", "87b753b", "classification/models/mamba2.py, classification/config.py"),
    "gla": ("fla-org/flash-linear-attention", "bc3b101", "fla/layers/gla.py"),
    "gated_deltanet": ("fla-org/flash-linear-attention", "bc3b101", "fla/layers/gated_deltanet.py"),
    "kda": ("fla-org/flash-linear-attention", "bc3b101", "fla/layers/kda.py"),
    "retnet": (
        "microsoft/torchscale",
        "4d1e0e8",
        "torchscale/architecture/retnet.py, torchscale/component/multiscale_retention.py",
    ),
    "rwkv6": ("BlinkDL/RWKV-LM", "524481d", "RWKV-v5/src/model.py, RWKV_Tmix_x060"),
    "mila": ("LeapLabTHU/MLLA", "66b6d29", "models/mlla.py"),
    "focused": ("LeapLabTHU/FLatten-Transformer", "abdb115", "models/flatten_pvt.py, config.py"),
    "inline": ("LeapLabTHU/InLine", "e463a6f", "models/inline_deit.py"),
    "rala": ("qhfan/RALA", "a86314f", "classfication/RALA.py, GateLinearAttentionNoSilu"),
    "polaformer": ("ZacharyMeng/PolaFormer", "44cdd39", "models/pola_pvt.py, PolaLinearAttention"),
    "sparse_linear": ("thu-ml/SLA", "d973e55", "sparse_linear_attention/core.py; over the rest: kernel.py at 325cc75"),
    "softmax_window": ("Huage001/CLEAR", "98e9fed", "attention_processor.py, distill.sh"),
    "ttt": (
        "LeapLabTHU/ViTTT",
        "e347758",
        "ttt_block.py; inner='mlp': LeapLabTHU/Transformer-to-TTT 06493e4, DiT5/models.py",
    ),
    "linfusion": ("Huage001/LinFusion", "62ef289", "src/linfusion/attention.py"),
    "sana_relu": ("NVlabs/Sana", "2cfb4f7", "diffusion/model/nets/sana_blocks.py, LiteLA"),
}

# Options of the published block, by the names of ours.
DEFAULTS: dict[str, dict[str, Any]] = {
    "mamba": {  # mamba_simple.py: d_state=16, d_conv=4, expand=2, conv_bias=True, bias=False
        **{"causality": "causal", "normalize": False, "expand": 2, "d_state": 16, "conv_size": 4, "conv_bias": True},
        **{"bias": False, "skip": True, "norm": False, "gate": True, "dt_rank": None, "n_groups": 1},
    },
    "mamba2": {  # mamba2.py: d_state=128, d_conv=4, expand=2, ngroups=1, conv_bias=True, bias=False
        **{"causality": "causal", "normalize": False, "expand": 2, "d_state": 128, "conv_size": 4, "conv_bias": True},
        **{"bias": False, "skip": True, "norm": True, "gate": True, "n_groups": 1},
    },
    "mamba3": {  # mamba3.py: d_state=128, expand=2, ngroups=1, rope_fraction=0.5, no convolution, no norm
        **{"causality": "causal", "normalize": False, "expand": 2, "d_state": 128, "conv_size": 0, "n_groups": 1},
        **{"bias": False, "skip": True, "norm": False, "gate": True, "bc_norm": True, "bc_bias": True},
        **{"rope_fraction": 0.5, "rotate_state": None, "rate": "heavy_tail"},
    },
    "hydra": {  # hydra.py: d_state=64, d_conv=7, expand=2, ngroups=1; the diagonal is its skip
        **{"causality": "bidirectional", "normalize": False, "expand": 2, "d_state": 64, "conv_size": 7},
        **{"conv_bias": True, "bias": False, "skip": False, "norm": True, "gate": True, "n_groups": 1},
    },
    "vssd": {  # d_state=64, d_conv=3 in two dimensions, expand=2, ngroups=1, LayerNorm, a gate without SiLU
        **{"causality": "noncausal", "normalize": False, "expand": 2, "d_state": 64, "conv_size": 3, "conv_2d": True},
        **{"conv_bias": True, "bias": False, "skip": True, "norm": True, "gate": True, "n_groups": 1},
    },
    "gla": {  # gla.py: expand_k=0.5, expand_v=1, no short convolution, low rank 16, normalizer 16
        **{"causality": "causal", "normalize": False, "expand": 1, "expand_k": 0.5, "conv_size": 0, "norm": True},
        **{"gate": True, "gate_low_rank_dim": 16, "gate_logit_normalizer": 16.0},
    },
    "gated_deltanet": {  # gated_deltanet.py: keys 0.75 d, values twice as wide, conv_size=4, conv_bias=False
        **{"causality": "causal", "normalize": False, "expand": 1.5, "expand_k": 0.75, "conv_size": 4},
        **{"conv_bias": False, "norm": True, "gate": True, "allow_neg_eigval": False, "decay": True},
    },
    "kda": {  # kda.py: expand_v=1, keys as wide, conv_size=4, conv_bias=False, low ranks as wide as a head
        **{"causality": "causal", "normalize": False, "expand": 1, "expand_k": 1, "conv_size": 4},
        **{"conv_bias": False, "norm": True, "gate": True, "allow_neg_eigval": False, "rank": None},
    },
    "retnet": {  # retnet.py: angles over linspace(0, 1), decays 1 − 2^(−5−h); values twice as wide as in fla
        **{"causality": "causal", "normalize": False, "expand": 2, "conv_size": 0, "norm": True, "gate": True},
        **{"inclusive_angles": True, "first_exponent": 5.0},
    },
    "rwkv6": {  # model.py: D_MIX_LORA=32, D_DECAY_LORA=64
        **{"causality": "causal", "normalize": False, "expand": 1, "norm": True, "gate": True, "bonus": True},
        **{"token_shift": True, "shift_rank": 32, "decay_rank": 64},
    },
    "mila": {  # mlla.py: in_proj, 3 × 3 convolution, SiLU; qkv_bias=True; 3 × 3 LePE; eps 1e-6
        **{"causality": "noncausal", "normalize": True, "conv_size": 3, "conv_2d": True, "local_conv_size": 3},
        **{"gate": True, "selection": "inner", "qkv_bias": True, "rotary": True, "eps": 1e-6},
    },
    "focused": {  # flatten_pvt.py: focusing_factor=3, kernel_size=5, qkv_bias=True in every model
        **{"causality": "noncausal", "normalize": True, "power": 3.0, "local_conv_size": 5, "qkv_bias": True},
        **{"position_table_size": 14, "gate": False},
    },
    "inline": {  # inline_deit.py: a 3 × 3 convolution from the mean token, qkv_bias=True in every model
        **{"causality": "noncausal", "normalize": True, "local_conv_size": 3, "dynamic_conv": True, "qkv_bias": True},
        **{"feature_map": None, "gate": False},
    },
    "rala": {  # RALA.py: 1 × 1 convolutions with biases, a 5 × 5 LePE, a gate without SiLU; eps 1e-6
        **{"causality": "noncausal", "normalize": True, "local_conv_size": 5, "gate": True, "qkv_bias": True},
        **{"rotary": True, "reweight_keys": True, "eps": 1e-6, "norm": False},
    },
    "polaformer": {  # pola_pvt.py: alpha=4, kernel_size=5, qkv_bias=True in every model, a gate without SiLU; eps 1e-6
        **{"causality": "noncausal", "normalize": True, "alpha": 4.0, "local_conv_size": 5, "gate": True},
        **{"qkv_bias": True, "position_table_size": 14, "eps": 1e-6, "norm": False},
    },
    "sparse_linear": {  # core.py: BLKQ = BLKK = 64, feature_map="softmax", 1e-5; README.md: topk=0.2
        **{"causality": "noncausal", "normalize": True, "block_size": 64, "topk": 0.2, "kept_blocks": None},
        **{"combine": "project", "linear_over": "rest", "feature_map": "softmax", "eps": 1e-5},
    },
    "softmax_window": {  # distill.sh: window_size=16; attention_processor.py: a distance below window_size
        **{"causality": "noncausal", "normalize": True, "radius": 16},
    },
    "ttt": {  # ttt_block.py: simplified SwiGLU, lr 1, scale 9^-0.5, clipped, a branch of one head with a convolution
        **{"causality": "noncausal", "normalize": False, "inner": "swiglu", "inner_loss": "dot", "inner_lr": 1.0},
        **{"loss_scale": 9**-0.5, "clip_gradient": True, "conv_branch": True, "qkv_bias": True, "qk_conv_size": 0},
    },
    "linfusion": {"causality": "noncausal", "normalize": True, "eps": 1e-4, "mid_dim": None},
    "sana_relu": {"causality": "noncausal", "normalize": True, "eps": 1e-15},  # LiteLA: eps=1e-15, use_bias=False
}

# Which biases the published block has, of: to_q, to_k, to_v, to_out, to_gate.
BIASES: dict[str, set[str]] = {
    "mamba": set(),
    "mamba2": set(),
    "mamba3": set(),
    "hydra": set(),
    "vssd": set(),
    "gla": set(),
    "gated_deltanet": set(),
    "kda": {"to_gate"},
    "retnet": set(),
    "rwkv6": set(),
    "mila": {"to_q", "to_k", "to_v", "to_out", "to_gate"},
    "focused": {"to_q", "to_k", "to_v", "to_out"},
    "inline": {"to_q", "to_k", "to_v", "to_out"},
    "rala": {"to_q", "to_k", "to_v", "to_out", "to_gate"},
    "polaformer": {"to_q", "to_k", "to_v", "to_out", "to_gate"},
    "sparse_linear": {"to_out"},
    "softmax_window": {"to_out"},
    "ttt": {"to_q", "to_k", "to_v", "to_out"},
    "linfusion": {"to_out"},
    "sana_relu": {"to_out"},
}


def built(name: str) -> TokenMixer:
    torch.manual_seed(0)
    return create_mixer(name, DIM, HEADS)


def test_every_mixer_with_published_code_is_listed() -> None:
    assert set(DEFAULTS) | CONTROLS == set(list_mixers())
    assert set(BIASES) == set(SOURCES) == set(DEFAULTS)


@pytest.mark.parametrize("name", DEFAULTS)
def test_options_are_the_published_ones(name: str) -> None:
    config = built(name).config.to_dict()
    assert {option: config[option] for option in DEFAULTS[name]} == DEFAULTS[name]


@pytest.mark.parametrize("name", DEFAULTS)
def test_biases_are_the_published_ones(name: str) -> None:
    mixer = built(name)
    layers = dict(mixer.projections.named_children())
    if getattr(mixer.output, "to_gate", None) is not None:
        layers["to_gate"] = mixer.output.to_gate
    last = {name: getattr(module, "up", module) for name, module in layers.items()}  # of a layer of low rank
    assert {layer for layer, module in last.items() if module.bias is not None} == BIASES[name]


def between(values: Tensor, low: float, high: float) -> None:
    """The values fill the range: none outside, some in its outer tenths."""
    assert (values >= low * (1 - 1e-4)).all() and (values <= high * (1 + 1e-4)).all(), (values.min(), values.max())
    assert len(values.unique()) > 1


@pytest.mark.parametrize("name", ["mamba2", "mamba3", "hydra", "vssd", "gated_deltanet", "kda"])
def test_step_sizes_start_log_uniform_between_one_thousandth_and_a_tenth(name: str) -> None:
    between(F.softplus(built(name).decay.dt_bias), 1e-3, 1e-1)


def test_mamba_starts_as_published() -> None:
    """mamba_simple.py: A = −1 … −n in every channel, Δ in [0.001, 0.1], dt_proj uniform ± rank^(−1/2), D = 1."""
    mixer = built("mamba")
    states = torch.arange(1.0, 17.0)
    assert torch.allclose(-mixer.A.flatten(0, 1), states.expand(2 * DIM, -1))
    between(F.softplus(mixer.step.up.bias), 1e-3, 1e-1)
    assert mixer.rank == 8
    between(mixer.step.up.weight.abs(), 0.0, 8**-0.5)
    assert mixer.step.up.weight.abs().max() > 0.9 * 8**-0.5
    assert (mixer.output.D == 1).all() and mixer.output.D.numel() == 2 * DIM


def test_decay_rates_start_as_published() -> None:
    """mamba2.py, vssd and kda.py: uniform in [1, 16]; gated_deltanet.py: uniform in (0, 16); hydra.py: 1."""
    torch.manual_seed(0)
    for name, low in (("mamba2", 1.0), ("vssd", 1.0), ("kda", 1.0), ("gated_deltanet", 0.0)):
        rates = create_mixer(name, 128, 128).decay.A_log.exp()
        between(rates, low, 16.0)
        assert rates.min() < 2.0 and rates.max() > 14.0
        assert (rates < 1.0).any() == (name == "gated_deltanet")
    assert (built("hydra").decay.A_log == 0).all()


def test_skips_start_as_published() -> None:
    """D = 1: one per head in Mamba-2, Mamba-3 and VSSD, the bias of the diagonal in Hydra; Mamba-3's biases too."""
    assert (built("mamba3").B_bias == 1).all() and (built("mamba3").C_bias == 1).all()
    for name in ("mamba2", "mamba3", "vssd"):
        assert torch.equal(built(name).output.D, torch.ones(HEADS))
    hydra = built("hydra")
    assert torch.equal(hydra.diagonal.bias, torch.ones(HEADS)) and hydra.diagonal.in_features == 2 * DIM


def test_rwkv6_starts_as_published_at_half_depth() -> None:
    """model.py with ratio_0_to_1 = 0.5 and ratio_1_to_almost0 = 0.5, written out."""
    mixer = built("rwkv6")
    i = torch.arange(DIM, dtype=torch.float32)
    assert torch.allclose(mixer.decay.up.bias, -6 + 5 * (i / (DIM - 1)) ** (0.7 + 1.3 * 0.5))
    zigzag = torch.tensor([((n + 1) % 3 - 1) * 0.1 for n in range(DIM)])
    assert torch.allclose(mixer.bonus.flatten(), 0.5 * (1 - i / (DIM - 1)) + zigzag, atol=1e-6)
    slow = 1 - (i / DIM) ** 0.5
    fast = 1 - (i / DIM) ** 0.25
    shift = mixer.token_shift
    assert torch.allclose(shift.mu, slow)
    assert torch.allclose(shift.offsets, torch.stack([slow, slow, slow - 0.15, fast, fast]))  # w, k, v, r, g
    assert (shift.down.weight == 0).all() and (mixer.decay.down.weight == 0).all()
    for weight in (shift.up, mixer.decay.up.weight):
        assert 0.009 < weight.abs().max() <= 0.01


def test_retnet_decays_and_angles_are_the_published_ones() -> None:
    """retnet.py: log(1 − 2^(−5−h)), and angles 1 / 10000^linspace(0, 1)."""
    mixer = built("retnet")
    log_decay = mixer.decay(torch.zeros(1, 1, DIM))
    assert torch.allclose(log_decay, torch.log(1 - 2 ** (-5 - torch.arange(HEADS).float())))
    x = torch.randn(1, 3, DIM)
    streams = mixer.compute_streams(x, mixer.projections)
    q, _ = mixer.features(streams)
    angles = 2 / 10000 ** torch.linspace(0, 1, DIM // HEADS // 2)  # of the third token
    rotated = torch.view_as_complex(streams.q[:, 2].unflatten(-1, (-1, 2)).contiguous()) * torch.exp(1j * angles)
    assert torch.allclose(q[:, 2], torch.view_as_real(rotated).flatten(-2), atol=1e-5)


def test_vision_mixers_start_as_published() -> None:
    """flatten_pvt.py: the scale and the positions are zeros, and heads share the 5 × 5 convolution."""
    mixer = built("focused")
    assert (mixer.focus.scale == 0).all() and mixer.focus.scale.numel() == DIM
    assert (mixer.positions.weight == 0).all()
    assert mixer.output.local_conv.weight.shape == (DIM // HEADS, 1, 5, 5)
    assert built("mila").output.local_conv.weight.shape == (DIM, 1, 3, 3)
    assert built("rala").output.local_conv.weight.shape == (DIM, 1, 5, 5)
    polaformer = built("polaformer")  # pola_pvt.py: powers, scales and positions are zeros
    assert not any(t.any() for t in (polaformer.scale_logit, polaformer.power_logit, polaformer.positions.weight))
    assert polaformer.output.local_conv.weight.shape == (DIM // HEADS, 1, 5, 5)
    assert built("rala").output.gate_activation == polaformer.output.gate_activation == "identity"


def test_sparse_linear_starts_as_published() -> None:
    """core.py: one layer of the width of a head, with weights and bias of zero."""
    layer = built("sparse_linear").output.proj_l
    assert layer.weight.shape == (DIM // HEADS, DIM // HEADS)
    assert not layer.weight.any() and not layer.bias.any()


def test_fast_weights_start_as_published() -> None:
    """ttt_block.py: normal with deviation 0.02; q, k, v and the input of the output projection have one head more."""
    mixer = built("ttt")
    width = DIM // HEADS
    assert mixer.inner.w1.shape == (HEADS, width, width) and mixer.conv_inner.w3.shape == (width, 9)
    assert 0.018 < mixer.inner.w1.std() < 0.022
    assert mixer.projections.to_q.out_features == mixer.projections.to_out.in_features == DIM + width


def test_deviations_from_published_blocks_are_in_the_table_of_mixers() -> None:
    names = {"linfusion", "gla", "gated_deltanet", "sana_relu", "focused", "inline", "retnet", "rwkv6"}
    for name in sorted(names | {"kda", "rala", "polaformer", "sparse_linear", "softmax_window", "ttt"}):
        assert registry.get_mixer_entry(name).deviations, name
