"""Formulations of delta_rule agree: dense, recurrent, chunked; forward and gradient."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from mixers.operators.delta import chunked, delta_rule, delta_rule_matrix
from mixers.operators.linear import linear_attention
from mixers.testing import strategies
from mixers.testing.inputs import small_blocks
from mixers.testing.tolerances import assert_close

NAMES = ("q", "k", "v", "beta", "log_decay")
CAUSALITIES = ("causal", "bidirectional")
BACKENDS = ("dense", "recurrent", "chunked")
DECAYS = {"none": None, "fixed": "h", "token": "blh", "channel": "blhk"}
BATCH = 2
HEADS = 2
KEY = 5
VALUE = 3


def inputs(
    length: int, decay: str = "none", batch: int = BATCH, key: int = KEY, value: int = VALUE, seed: int = 0
) -> list[Tensor]:
    """q, k of length 1, v, beta in [0, 1] and, with decay, log_decay between −1e-6 and −50 a step."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, low: float = -1.0, high: float = 1.0) -> Tensor:
        return torch.empty(*shape, dtype=torch.float64).uniform_(low, high, generator=generator)

    tokens = (batch, length, HEADS)
    drawn_tensors = [
        F.normalize(draw(*tokens, key), dim=-1),
        F.normalize(draw(*tokens, key), dim=-1),
        draw(*tokens, value),
        draw(*tokens, low=0.0),
    ]
    if axes := DECAYS[decay]:
        sizes = {"b": batch, "l": length, "h": HEADS, "k": key}
        drawn_tensors.append(-draw(*(sizes[axis] for axis in axes), low=-13.8, high=3.9).exp())
    return [t.requires_grad_() for t in drawn_tensors]


def mix(*tensors: Tensor, **settings: Any) -> Any:
    """`delta_rule`, whose result is a tensor or a pair."""
    return delta_rule(*tensors, **settings)


def outcome(function: Any, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """The result and every gradient."""
    y = function(*tensors)
    weighting = torch.sin(torch.arange(y.numel(), dtype=y.dtype)).view_as(y)
    # Decay is no part of W where there is one token: unused is a gradient of zero.
    return (y, *torch.autograd.grad((y * weighting).sum(), tensors, allow_unused=True, materialize_grads=True))


@pytest.fixture
def small_groups() -> Iterator[None]:
    """Groups of two blocks, so that short sequences have several."""
    with small_blocks(4 * BATCH * HEADS * chunked.CHUNK**2):
        yield


@pytest.mark.parametrize("diagonal", [True, False])
def test_gradients_are_derivatives_of_the_chunked_rule(diagonal: bool) -> None:
    q, k, v, beta, log_decay = (t.detach() for t in inputs(9, "token", batch=1, key=3, value=2))
    memory = torch.rand(1, HEADS, 3, 2, dtype=torch.float64)
    tensors = [t.requires_grad_() for t in (q, k, beta, log_decay.clamp(-1, -0.05)[..., None], v, memory)]
    assert torch.autograd.gradcheck(lambda *tensors: chunked.read_causally(*tensors, diagonal=diagonal), tensors)


@pytest.mark.parametrize("causality", CAUSALITIES)
@pytest.mark.parametrize("decay", DECAYS)
def test_the_formula_is_written_out_once_more(decay: str, causality: str) -> None:
    """The definition in loops over b, h, i, j with products of k × k matrices, independent of every formulation."""
    length = 6
    q, k, v, beta, *gates = (t.detach() for t in inputs(length, decay))
    settings: dict[str, Any] = {"causality": causality, "scale": 0.3}
    y = mix(q, k, v, beta, *gates, **settings)
    matrix = delta_rule_matrix(q, k, beta, *gates, **settings)
    log_decay = gates[0] if gates else torch.zeros(HEADS, dtype=q.dtype)
    a = (log_decay if log_decay.ndim == 4 else log_decay.expand(BATCH, length, HEADS)[..., None]).exp()
    expected = torch.zeros_like(matrix)
    for b, h in ((b, h) for b in range(BATCH) for h in range(HEADS)):
        key = k[b, :, h]
        unit = torch.eye(KEY, dtype=q.dtype)
        step = [(unit - beta[b, t, h] * torch.outer(key[t], key[t])) * a[b, t, h] for t in range(length)]
        for i in range(length):
            for j in range(length if causality == "bidirectional" else i + 1):
                between = range(i, j, -1) if j <= i else range(i, j)
                product = unit
                for t in between:
                    product = product @ step[t]
                expected[b, h, i, j] = 0.3 * q[b, i, h] @ product @ key[j] * beta[b, j, h]
    assert_close(matrix, expected)
    assert_close(y, torch.einsum("bhij,bjhv->bihv", expected, v))


@given(
    edges=strategies.cuts(140),
    backend=st.sampled_from(BACKENDS),
    decay=st.sampled_from(sorted(DECAYS)),
)
def test_streaming_in_any_parts_equals_one_pass(edges: list[int], backend: str, decay: str) -> None:
    tensors = [t.detach() for t in inputs(140, decay, batch=1)]
    whole, final = mix(*tensors, output_final_state=True)
    state = None
    parts = []
    for start, stop in pairwise(edges):
        part = (t[:, start:stop] if t.ndim > 1 else t for t in tensors)
        y, state = mix(*part, initial_state=state, output_final_state=True, backend=backend)
        parts.append(y)
    assert state is not None
    assert_close(torch.cat(parts, dim=1), whole)
    assert_close(state.memory, final.memory, what="memory")
    assert state.tokens == final.tokens == 140
    assert state.memory.shape == (1, HEADS, KEY, VALUE)


@given(
    length=st.integers(1, 150),
    key=st.integers(1, 6),
    value=st.integers(1, 6),
    strength=st.sampled_from([1.0, 2.0]),
    seed=st.integers(0, 2**16),
)
def test_chunked_equals_recurrent_at_any_shape(length: int, key: int, value: int, strength: float, seed: int) -> None:
    q, k, v, beta, gates = (t.detach() for t in inputs(length, "token", key=key, value=value, seed=seed))
    fast, after = mix(q, k, v, strength * beta, gates, output_final_state=True)
    truth, expected = mix(q, k, v, strength * beta, gates, output_final_state=True, backend="recurrent")
    assert_close(fast, truth)
    assert_close(after.memory, expected.memory, what="memory")


@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize("causality", CAUSALITIES)
@pytest.mark.parametrize("decay", DECAYS)
def test_float32_is_exact_for_any_mix_of_decays(decay: str, causality: str) -> None:
    single = [t.detach().float() for t in inputs(300, decay, batch=1)]
    truth = mix(*(t.double() for t in single), causality=causality, backend="recurrent")
    for backend in ("dense", "chunked"):
        error = mix(*single, causality=causality, backend=backend).double() - truth
        assert error.abs().max() < 3e-6 * truth.abs().max(), backend


@pytest.mark.parametrize("backend", BACKENDS)
def test_slow_decays_next_to_fast_ones_are_not_lost(backend: str) -> None:
    """Steps of log decay −1e-6 after a reset of −50: every y_t is known in closed form, to float32's last digits."""
    length = 600
    reset = 300
    key = torch.ones(1, length, 1, 1)
    beta = torch.zeros(1, length, 1)
    log_decay = torch.full((1, length, 1), -1e-6)
    log_decay[:, reset] = -50
    beta[:, 0] = beta[:, reset] = 1
    y = mix(key, key, key, beta, log_decay, backend=backend).flatten().double()
    steps = torch.arange(length, dtype=torch.float64)
    assert ((y - (-1e-6 * (steps % reset)).exp()).abs() < 1e-7 * length).all()


@pytest.mark.parametrize("causality", CAUSALITIES)
def test_a_gate_that_forgets_everything_has_finite_gradients(causality: str) -> None:
    tensors = [t.detach() for t in inputs(131, "token")]
    tensors[-1][:, ::7] = -torch.inf
    tensors = [t.requires_grad_() for t in tensors]
    actual = {b: outcome(lambda *t, b=b: mix(*t, causality=causality, backend=b), tensors) for b in BACKENDS}
    for backend in ("recurrent", "chunked"):
        for what, got, expected in zip(("y", *NAMES), actual[backend], actual["dense"], strict=True):
            assert_close(got, expected, what=f"{backend} against dense, {what}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_recalls_what_was_last_written_under_a_key(backend: str) -> None:
    """Associative recall: orthonormal keys, beta = 1, no decay."""
    length = 150
    key = 12
    keys = torch.linalg.qr(torch.randn(key, key, dtype=torch.float64)).Q
    written = torch.randint(key, (length,))
    queried = torch.randint(key, (length,))
    v = torch.randn(1, length, 1, VALUE, dtype=torch.float64)
    q, k = (keys[index][None, :, None] for index in (queried, written))
    y = mix(q, k, v, torch.ones(1, length, 1, dtype=torch.float64), backend=backend)
    held = torch.zeros(key, VALUE, dtype=torch.float64)
    for t in range(length):
        held[written[t]] = v[0, t, 0]
        assert_close(y[0, t, 0], held[queried[t]], what=f"token {t}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causality", CAUSALITIES)
@pytest.mark.parametrize("decay", ["none", "fixed", "token"])  # gates per channel turn keys towards each other
def test_with_orthogonal_keys_it_is_linear_attention(decay: str, causality: str, backend: str) -> None:
    """Nothing is ever erased: linear attention whose keys are scaled by beta."""
    length = 70
    q, _, v, beta, *gates = (t.detach() for t in inputs(length, decay, key=length))
    k = torch.linalg.qr(torch.randn(BATCH, HEADS, length, length, dtype=q.dtype)).Q.transpose(1, 2)
    settings: dict[str, Any] = {"causality": causality, "scale": 0.5}
    expected = linear_attention(q, beta[..., None] * k, v, *gates, normalize=False, **settings)
    assert isinstance(expected, Tensor)
    assert_close(mix(q, k, v, beta, *gates, **settings, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_writing_a_key_again_leaves_only_the_second_value(backend: str) -> None:
    _, k, v, *_ = (t.detach() for t in inputs(2))
    k = k[:, :1].expand_as(k)
    _, state = mix(k, k, v, torch.ones(BATCH, 2, HEADS), output_final_state=True, backend=backend)
    assert_close(state.memory, k[:, 1, :, :, None] * v[:, 1, :, None])


def kept_for_backward(length: int, key: int, causality: str) -> tuple[int, int]:
    """Elements of the largest tensor saved, and of all of them."""
    tensors = [t.detach().float().requires_grad_() for t in inputs(length, "token", batch=1, key=key, value=key)]
    saved: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = mix(*tensors, causality=causality)
    y.sum().backward()
    return max(saved.values()), sum(saved.values())


@pytest.mark.parametrize("causality", CAUSALITIES)
def test_backward_keeps_no_state_for_every_token(causality: str) -> None:
    length = 512
    key = 64
    largest, total = kept_for_backward(length, key, causality)
    assert 0 < largest <= length * HEADS * max(2 * key, chunked.CHUNK), "a tensor of the size l × k × v is kept"
    assert total < length * HEADS * key * key
    assert kept_for_backward(2 * length, key, causality)[1] < 2.1 * total, "not linear in l"


@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize("decay", ["none", "token"])
@pytest.mark.parametrize("causality", CAUSALITIES)
def test_compiled_once_for_any_length(causality: str, decay: str) -> None:
    compilations = CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()

    def mixed(*tensors: Tensor) -> Tensor:
        return mix(*tensors, causality=causality)

    compiled = torch.compile(mixed, backend=compilations, fullgraph=True, dynamic=True)
    for length in (70, 131):
        tensors = inputs(length, decay)
        for what, got, expected in zip(
            ("y", *NAMES), outcome(compiled, tensors), outcome(mixed, tensors), strict=False
        ):
            assert_close(got, expected, what=f"{what}, l = {length}")
    assert compilations.frame_count == 1


@pytest.mark.parametrize("causality", CAUSALITIES)
def test_state_and_sums_are_float32_at_least(causality: str) -> None:
    tensors = [t.detach().float() for t in inputs(100, "token")]
    truth = mix(*tensors, causality=causality)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(mix(*tensors, causality=causality), truth)
    half = [t.bfloat16() for t in tensors]
    y = mix(*half, causality=causality)
    assert y.dtype == torch.bfloat16
    assert_close(y, mix(*(t.float() for t in half), causality=causality))
    assert mix(*half, output_final_state=True)[1].memory.dtype == torch.float32


def test_a_state_fits_what_it_was_made_with() -> None:
    tensors = inputs(3)
    _, state = mix(*tensors, output_final_state=True)
    with pytest.raises(
        ValueError, match=r"initial_state.memory \(b, h, k, v .*\) = \(1, 2, 5, 3\), got \(2, 2, 5, 3\)"
    ):
        mix(*(t[:1] for t in tensors), initial_state=state)
    with pytest.raises(ValueError, match="causal passes only"):
        mix(*tensors, causality="bidirectional", initial_state=state)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": "fla", "causality": "causal"}, "cannot run"),
        ({"backend": "fastest"}, "no such backend"),
        ({"causality": "acausal"}, "Unknown causality"),
        ({"causality": "bidirectional", "output_final_state": True}, "causal passes only"),
        ({"causality": "noncausal", "output_final_state": True}, "causal passes only"),
        ({"normalize": True, "eps": 0.0}, "needs eps > 0"),
        ({"causality": "noncausal", "backend": "fla"}, "cannot run"),
    ],
)
def test_what_cannot_be_done_is_refused(settings: dict[str, Any], message: str) -> None:
    q, k, v, beta = inputs(3)
    with pytest.raises(ValueError, match=message):
        mix(q, k, v, beta, **settings)
    if "causality" in settings and len(settings) == 1:
        with pytest.raises(ValueError, match=message):
            delta_rule_matrix(q, k, beta, **settings, scale=1.0)


@pytest.mark.parametrize(
    ("wrong", "cut", "message"),
    [
        ("q", (..., slice(2)), r"Expected q and k \(b, l, h, k\), got q \(2, 3, 2, 2\)"),
        ("k", (..., 0), r"Expected q and k \(b, l, h, k\), got q"),
        ("v", (slice(None), slice(2)), r"Expected v \(b, l, h, v\).*got \(2, 2, 2, 3\)"),
        ("v", (..., 0), r"Expected v \(b, l, h, v\).*got \(2, 3, 2\)"),
        ("beta", (..., slice(1)), r"Expected beta \(b, l, h\) = \(2, 3, 2\) as q, got \(2, 3, 1\)"),
        ("log_decay", (0,), r"log_decay None, \(h,\) = \(2,\), \(b, l, h\) = \(2, 3, 2\) or .*, got \(3, 2\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(wrong: str, cut: tuple, message: str) -> None:
    tensors: dict[str, Any] = dict(zip(NAMES, inputs(3, "token"), strict=True))
    tensors[wrong] = tensors[wrong][cut]
    with pytest.raises(ValueError, match=message):
        delta_rule(**tensors)
    with pytest.raises(ValueError, match="at least one token"):
        mix(*inputs(0))
