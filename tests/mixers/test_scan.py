"""Formulations of selective_scan agree: dense, recurrent, chunked; forward and gradient."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from mixers.operators.scan import chunked, selective_scan, selective_scan_matrix
from mixers.testing import inputs as inputs_module
from mixers.testing import strategies
from mixers.testing.tolerances import assert_close
from mixers.traits import CAUSALITIES

NAMES = ("u", "dt", "A", "B", "C", "D")
HEADS = 2
VALUE = 3
STATES = 4


def inputs(length: int, value: int = VALUE, states: int = STATES, batch: int = 2) -> list[Tensor]:
    """u, dt, A, B, C, D with dt·A between −1e-6 and −50 a step, and B, C ≥ 0, as normalization needs."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, low: float = -1.0, high: float = 1.0) -> Tensor:
        return torch.empty(*shape, dtype=torch.float64).uniform_(low, high, generator=generator)

    tokens = (batch, length, HEADS)
    drawn_tensors = (
        draw(*tokens, value),
        draw(*tokens, value, low=-13.1, high=3.2).exp(),
        -draw(HEADS, value, states, low=-0.7, high=0.7).exp(),
        draw(*tokens, states).exp(),
        draw(*tokens, states).exp(),
        draw(HEADS, value),
    )
    return [t.requires_grad_() for t in drawn_tensors]


def scan(*tensors: Tensor, **settings: Any) -> Any:
    """`selective_scan`, whose result is a tensor or a pair."""
    return selective_scan(*tensors, **settings)


def outcome(backend: str, length: int, **settings: Any) -> tuple[Tensor, ...]:
    """The result and every gradient."""
    tensors = inputs(length)
    y = scan(*tensors, **settings, backend=backend)
    weighting = torch.sin(torch.arange(y.numel(), dtype=y.dtype)).view_as(y)
    return (y, *torch.autograd.grad((y * weighting).sum(), tensors))


@pytest.fixture
def small_blocks() -> Iterator[None]:
    """Blocks of 16 tokens, so that short sequences have several."""
    with inputs_module.small_blocks():
        yield


@pytest.mark.parametrize("diagonal", [True, False])
def test_gradients_are_derivatives_of_the_chunked_scan(diagonal: bool) -> None:
    u, dt, A, B, C, _ = inputs(19, value=2, states=2, batch=1)
    memory = torch.rand(1, HEADS, 2, 2, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        dt.clamp_(0.05, 1)
    assert torch.autograd.gradcheck(
        lambda *tensors: chunked.scan(*tensors, diagonal=diagonal), (dt, A, B, C, u, memory)
    )


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("causality", CAUSALITIES)
def test_the_formula_is_written_out_once_more(causality: str, normalize: bool) -> None:
    """The definition in loops over tokens, independent of every formulation."""
    length = 7
    u, dt, A, B, C, D = (t.detach() for t in inputs(length))
    settings: dict[str, Any] = {"causality": causality, "normalize": normalize, "eps": 0.1, "scale": 0.3}
    y = scan(u, dt, A, B, C, D, **settings)
    matrix = selective_scan_matrix(dt, A, B, C, **settings)
    gate = (dt[..., None] * A).exp()
    for i in range(length):
        row = torch.zeros(2, HEADS, VALUE, length, dtype=torch.float64)
        for j in range(length):
            if causality == "noncausal":
                left = gate[:, j]
            elif j <= i:
                left = gate[:, j + 1 : i + 1].prod(1)
            elif causality == "bidirectional":
                left = gate[:, i:j].prod(1)
            else:
                continue
            row[..., j] = (C[:, i, :, None] * B[:, j, :, None] * left).sum(-1) * dt[:, j]
        if normalize:
            row = row / length if causality == "noncausal" else row
            row = row / (row.sum(-1, keepdim=True) + 0.1)
        else:
            row = row * 0.3
        assert_close(matrix[..., i, :], row, what=f"row {i}")
        assert_close(y[:, i], torch.einsum("bhvj,bjhv->bhv", row, u) + D * u[:, i], what=f"token {i}")


@given(
    edges=strategies.cuts(140),
    normalize=st.booleans(),
    backend=st.sampled_from(["recurrent", "chunked", "dense"]),
)
def test_streaming_in_any_parts_equals_one_pass(edges: list[int], normalize: bool, backend: str) -> None:
    u, dt, A, B, C, D = (t.detach() for t in inputs(140, batch=1))
    settings: dict[str, Any] = {"normalize": normalize, "eps": 1e-3, "output_final_state": True}
    whole, final = scan(u, dt, A, B, C, D, **settings)
    state = None
    parts = []
    for start, stop in pairwise(edges):
        u_part, dt_part, B_part, C_part = (t[:, start:stop] for t in (u, dt, B, C))
        y, state = scan(u_part, dt_part, A, B_part, C_part, D, **settings, initial_state=state, backend=backend)
        parts.append(y)
    assert state is not None
    assert_close(torch.cat(parts, dim=1), whole)
    assert_close(state.memory, final.memory, what="memory")
    assert state.tokens == final.tokens == 140
    assert state.memory.shape == (1, HEADS, VALUE * (2 if normalize else 1), STATES)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("causality", CAUSALITIES)
def test_float32_is_exact_for_any_mix_of_decays(causality: str) -> None:
    u, *others = (t.detach().float() for t in inputs(300, batch=1))
    single = [u.abs(), *others[:-1]]  # all terms positive and no skip, so that every result has its relative error
    truth = scan(*(t.double() for t in single), causality=causality, backend="recurrent")
    for backend in ("dense", "chunked"):
        error = scan(*single, causality=causality, backend=backend).double() / truth - 1
        assert error.abs().max() < 5e-6, backend


def test_slow_decays_next_to_fast_ones_are_not_lost() -> None:
    """Steps of log decay −1e-6 after a reset of −50: every y_t is known in closed form, to float32's last digits."""
    length = 5000
    reset = 2500
    dt = torch.full((1, length, 1, 1), 1e-6)
    dt[:, reset] = 50
    u = torch.zeros_like(dt)
    u[:, 0] = 1e6
    u[:, reset] = 1 / 50
    ones = torch.ones(1, length, 1, 1)
    y = scan(u, dt, -torch.ones(1, 1, 1), ones, ones).flatten().double()
    steps = torch.arange(length, dtype=torch.float64)
    expected = (-1e-6 * (steps % reset)).exp()
    assert ((y - expected).abs() < 1e-6).all()


@pytest.mark.parametrize("backend", ["dense", "recurrent", "chunked"])
def test_one_rate_and_step_a_head_is_the_scalar_recurrence(backend: str) -> None:
    """S_t = a_t S_{t−1} + dt_t B_t u_tᵀ with one gate a head: Mamba-2's recurrence (2405.21060)."""
    u, dt, A, B, C, _ = (t.detach() for t in inputs(70))
    step = dt[..., :1]
    rate = A[:, :1, :1]
    y = scan(u, step.expand_as(dt), rate.expand_as(A), B, C, backend=backend)
    state = torch.zeros(2, HEADS, STATES, VALUE, dtype=torch.float64)
    for t in range(70):
        gate = (step[:, t] * rate[:, :, 0]).exp()
        state = gate[..., None] * state + (step[:, t] * B[:, t])[..., None] * u[:, t, :, None]
        assert_close(y[:, t], (C[:, t, :, None] @ state)[:, :, 0], what=f"token {t}")


@pytest.mark.parametrize("backend", ["dense", "recurrent", "chunked"])
def test_normalized_weights_keep_constants_and_ignore_repetition(backend: str) -> None:
    u, dt, A, B, C, _ = (t.detach() for t in inputs(40))
    for causality in CAUSALITIES:
        settings: dict[str, Any] = {"causality": causality, "normalize": True, "eps": 1e-200, "backend": backend}
        assert_close(scan(torch.ones_like(u), dt, A, B, C, **settings), torch.ones_like(u))
    settings["eps"] = 0.1
    once = scan(u, dt, A, B, C, **settings)
    u, dt, B, C = (t.repeat_interleave(3, dim=1) for t in (u, dt, B, C))
    assert_close(scan(u, dt, A, B, C, **settings)[:, ::3], once)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("causality", CAUSALITIES)
def test_compiled_once_for_any_length(causality: str) -> None:
    compilations = CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()

    def mixed(*tensors: Tensor) -> Tensor:
        return scan(*tensors, causality=causality, normalize=True)

    compiled = torch.compile(mixed, backend=compilations, fullgraph=True, dynamic=True)
    for length in (70, 131):
        tensors = inputs(length)
        outcomes = []
        for function in (compiled, mixed):
            y = function(*tensors)
            outcomes.append((y, *torch.autograd.grad(y.square().sum(), tensors)))
        for what, got, expected in zip(("y", *NAMES), *outcomes, strict=True):
            assert_close(got, expected, what=f"{what}, l = {length}")
    assert compilations.frame_count == 1


@pytest.mark.parametrize("causality", CAUSALITIES)
def test_state_and_sums_are_float32_at_least(causality: str) -> None:
    tensors = [t.detach().float() for t in inputs(100)]
    truth = scan(*tensors, causality=causality)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(scan(*tensors, causality=causality), truth)
    half = [t.bfloat16() for t in tensors]
    y = scan(*half, causality=causality)
    assert y.dtype == torch.bfloat16
    assert_close(y, scan(*(t.float() for t in half), causality=causality))


def test_a_state_is_float32_and_fits_what_it_was_made_with() -> None:
    tensors = [t.detach().half() for t in inputs(3)]
    _, state = scan(*tensors, output_final_state=True)
    assert state.memory.dtype == torch.float32
    with pytest.raises(ValueError, match="the same batch size, heads, widths"):
        scan(*tensors, normalize=True, initial_state=state)
    with pytest.raises(ValueError, match="causal passes only"):
        scan(*tensors, causality="noncausal", initial_state=state)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": "mamba_ssm", "causality": "causal"}, "cannot run"),
        ({"backend": "fastest"}, "no such backend"),
        ({"causality": "acausal"}, "Unknown causality"),
        ({"causality": "bidirectional", "output_final_state": True}, "causal passes only"),
    ],
)
def test_what_cannot_be_done_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scan(*inputs(3), **settings)


@pytest.mark.parametrize(
    ("wrong", "cut", "message"),
    [
        ("u", (slice(None), slice(2)), "Expected u .*got"),
        ("dt", (slice(None), slice(2)), "Expected dt .*got"),
        ("A", (slice(1),), r"A \(h, v, n\).*got"),
        ("A", (0,), r"A \(h, v, n\).*got"),
        ("B", (..., slice(2)), r"B and C \(b, l, h, n\).*got"),
        ("C", (..., 0), r"B and C \(b, l, h, n\).*got"),
        ("D", (..., slice(2)), r"D None or \(h, v\) = \(2, 3\), got \(2, 2\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(wrong: str, cut: tuple, message: str) -> None:
    tensors: dict[str, Any] = dict(zip(NAMES, inputs(3), strict=True))
    tensors[wrong] = tensors[wrong][cut]
    with pytest.raises(ValueError, match=message):
        selective_scan(**tensors)
    with pytest.raises(ValueError, match="at least one token"):
        scan(*inputs(0))
