"""Mamba-3 is its published recurrence, in both directions, and Mamba-2's where its new parts are switched off."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixers import TokenMixer, create_mixer, mixer_from_state_dict
from mixers.operators import linear_attention
from mixers.stages.trapezoid import heavy_tail, rotate_cumulatively
from mixers.testing.inputs import flip_tokens
from mixers.testing.tolerances import assert_close
from mixers.zoo.mamba3 import Mamba3Streams
from tests.mixers.builders import disturbed, float64

LENGTH = 11
DIM = 12
HEADS = 2
STATE = 6
PAIRS = 1
INNER = 24
WIDTH = INNER // HEADS


def published_state(norm: bool = False) -> dict[str, Tensor]:
    """A state dict of mamba_ssm's Mamba3 with one group: in_proj is [z, x, B, C, Δ, A, λ, angles]."""
    torch.manual_seed(0)
    state = {
        "in_proj.weight": float64(2 * INNER + 2 * STATE + 3 * HEADS + PAIRS, DIM) / DIM**0.5,
        "dt_bias": float64(HEADS),
        "B_bias": 1 + 0.2 * float64(HEADS, 1, STATE),
        "C_bias": 1 + 0.2 * float64(HEADS, 1, STATE),
        "B_norm.weight": 1 + 0.2 * float64(STATE),
        "C_norm.weight": 1 + 0.2 * float64(STATE),
        "D": float64(HEADS),
        "out_proj.weight": float64(DIM, INNER) / INNER**0.5,
    }
    return state | ({"norm.weight": 1 + 0.2 * float64(INNER)} if norm else {})


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate the first pairs of (b, h, n), as complex numbers."""
    pairs = torch.view_as_complex(x[..., : 2 * PAIRS].unflatten(-1, (PAIRS, 2)).contiguous())
    rotation = torch.view_as_real(pairs * torch.exp(1j * angles)).flatten(-2)
    return torch.cat([rotation, x[..., 2 * PAIRS :]], dim=-1)


def published_block(state: dict[str, Tensor], x: Tensor, rate: Any) -> Tensor:
    """The paper's recurrence with a state that rotates, token by token: no cumulative angles, no matrices."""
    rows = x @ state["in_proj.weight"].T
    z, v, B, C, dt, A, trapezoid, angle = rows.split([INNER, INNER, STATE, STATE, HEADS, HEADS, HEADS, PAIRS], dim=-1)
    B, C = (F.rms_norm(t, (STATE,), state[f"{name}_norm.weight"], 1e-5) for t, name in ((B, "B"), (C, "C")))
    B, C = (t[:, :, None] + state[f"{name}_bias"][:, 0] for t, name in ((B, "B"), (C, "C")))
    v = v.unflatten(-1, (HEADS, WIDTH))
    dt = F.softplus(dt + state["dt_bias"])
    alpha = (-dt * rate(A).clamp(min=1e-4)).exp()
    trapezoid = trapezoid.sigmoid()
    turn = math.pi * angle.tanh()[:, :, None] * dt[..., None]
    memory = torch.zeros(len(x), HEADS, STATE, WIDTH, dtype=x.dtype)
    before = torch.zeros_like(memory)
    outputs = []
    for t in range(x.shape[1]):

        def step(m: Tensor, t: int = t) -> Tensor:
            return alpha[:, t, :, None, None] * rotated(m.mT, -turn[:, t, :, None]).mT

        written = B[:, t, :, :, None] * v[:, t, :, None, :]
        share = (trapezoid[:, t] * dt[:, t])[..., None, None]
        carried = ((1 - trapezoid[:, t]) * dt[:, t])[..., None, None]
        memory = step(memory) + carried * step(before) + share * written
        before = written
        y = (C[:, t, :, :, None] * memory).sum(-2) + state["D"][:, None] * v[:, t]
        outputs.append(y)
    y = torch.stack(outputs, dim=1)
    if "norm.weight" in state:
        y = F.rms_norm(y, (WIDTH,), None, 1e-5) * state["norm.weight"].view(HEADS, WIDTH)
    return (y.flatten(2) * F.silu(z)) @ state["out_proj.weight"].T


@pytest.mark.parametrize(("rate", "function"), [("heavy_tail", heavy_tail), ("softplus", F.softplus)])
@pytest.mark.parametrize("norm", [False, True])
def test_it_is_the_published_block(norm: bool, rate: str, function: Any) -> None:
    state = published_state(norm)
    mixer = mixer_from_state_dict("mamba3", state, rate=rate)
    assert mixer.rotated_pairs == PAIRS
    x = float64(2, LENGTH, DIM)
    assert_close(mixer(x), published_block(state, x, function))


def drop_in(**options: Any) -> TokenMixer:
    torch.manual_seed(0)
    form = {"expand": 1, "skip": False, "gate": False, "d_state": None, "n_groups": None, "bc_norm": False}
    options = form | {"bc_bias": False} | options
    return disturbed(create_mixer("mamba3", DIM, HEADS, **options))


def streams_of(mixer: TokenMixer, x: Tensor) -> Mamba3Streams:
    streams = mixer.compute_streams(x, mixer.resolve_projections(None))
    assert isinstance(streams, Mamba3Streams)
    return streams


def test_its_matrix_is_the_formula_in_loops() -> None:
    mixer = drop_in(causality="bidirectional")
    streams = streams_of(mixer, float64(1, 6, DIM))
    q = streams.q
    k = streams.k
    dt = streams.dt
    share = streams.trapezoid
    angles = streams.angles
    assert dt is not None and share is not None and angles is not None and streams.log_decay is not None
    alpha = streams.log_decay.exp()
    expected = torch.zeros(1, HEADS, 6, 6, dtype=torch.float64)
    for i in range(6):
        for j in range(6):
            between = range(j + 1, i + 1) if j <= i else range(i, j)
            neighbor = j + 1 if j < i else j - 1
            decay = torch.ones(1, HEADS, dtype=torch.float64)
            angle = torch.zeros(1, HEADS, PAIRS, dtype=torch.float64)
            for t in between:
                decay = decay * alpha[:, t]
                angle = angle + angles[:, t]
            weight = share[:, j] * dt[:, j]
            if i != j:
                weight = weight + (1 - share[:, neighbor]) * dt[:, neighbor]
            expected[:, :, i, j] = (rotated(q[:, i], angle) * k[:, j]).sum(-1) * weight * decay
    assert_close(mixer.mixing_matrix(streams), expected)
    assert_close(mixer.mix(streams), torch.einsum("bhij,bjhv->bihv", expected, streams.v))


def test_the_reverse_pass_is_a_causal_pass_over_reversed_tokens() -> None:
    both = drop_in(causality="bidirectional")
    causal = drop_in(causality="causal")
    causal.load_state_dict(both.state_dict())
    streams = streams_of(both, float64(1, LENGTH, DIM))
    reverse = causal.mixing_matrix(flip_tokens(streams)).flip(-1, -2)
    assert_close(both.mixing_matrix(streams).triu(1), reverse.triu(1))


def test_with_the_whole_step_at_its_own_token_and_no_rotation_it_is_mamba2() -> None:
    mixer = drop_in(rotate_state=False)
    streams = streams_of(mixer, float64(2, LENGTH, DIM))
    assert streams.angles is None and streams.dt is not None and streams.trapezoid is not None
    euler = replace(streams, trapezoid=torch.ones_like(streams.trapezoid))
    keys = streams.k * streams.dt[..., None]
    expected = linear_attention(streams.q, keys, streams.v, streams.log_decay, causality="causal", normalize=False)
    assert isinstance(expected, Tensor)
    assert_close(mixer.mix(euler), expected)


def test_angles_of_a_million_tokens_keep_float32s_digits() -> None:
    angles = torch.full((1, 2**20, 1, 1), 0.3)
    x = torch.tensor([1.0, 0.0]).expand(1, 2**20, 1, 2)
    last = rotate_cumulatively(x, angles)[0, -1, 0]
    exact = (angles[0, 0, 0, 0].double() * 2**20).item()
    assert_close(last.double(), torch.tensor([math.cos(exact), math.sin(exact)]).double(), torch.float32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"causality": "noncausal"}, "joins each token with the one before"),
        ({"normalize": True, "rotate_state": True}, "makes them signed"),
        ({"rope_fraction": 0.0}, "0 < rope_fraction"),
        ({"d_state": 1}, "d_state ≥ 2"),
        ({"rate": "exp"}, "Unknown rate function 'exp'"),
    ],
)
def test_what_has_no_meaning_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer("mamba3", DIM, HEADS, **options)


def test_several_inputs_and_outputs_are_refused() -> None:
    state = published_state()
    state["B_bias"] = state["B_bias"].expand(-1, 4, -1)
    with pytest.raises(ValueError, match="MIMO rank 4"):
        mixer_from_state_dict("mamba3", state)
