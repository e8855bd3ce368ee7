"""Formulations of linear_attention agree: dense, recurrent, chunked, two products; forward and gradient."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixers import operators
from mixers.operators.backend import FORMULATIONS, kernel_names
from mixers.operators.linear.chunks import CHUNK, WIDE, block_length, chunk_size
from mixers.operators.recurrent_state import RecurrentState
from mixers.testing import OPERATORS, CheckInputs, check_operator, strategies
from mixers.testing.tolerances import assert_close
from mixers.traits import CAUSALITIES

LENGTHS = (1, 2, 63, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5)


DECAYS = {"none": None, "fixed": "h", "scalar": "blh", "vector": "blhk"}


def inputs(length: int, heads: int = 2, key: int = 5, value: int = 3, seed: int = 0) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    shapes = ((key, True), (key, True), (value, False))
    drawn_tensors = [torch.randn(2, length, heads, width, dtype=torch.float64) for width, _ in shapes]
    return [
        (t.exp() if positive else t).requires_grad_() for t, (_, positive) in zip(drawn_tensors, shapes, strict=True)
    ]


def gates(shape: str | None, length: int, heads: int = 2, key: int = 5) -> list[torch.Tensor]:
    """[log decay] between −1e-6 and −50 a step, or nothing."""
    if shape is None:
        return []
    sizes = {"b": 2, "l": length, "h": heads, "k": key}
    spread = torch.empty([sizes[axis] for axis in shape], dtype=torch.float64).uniform_(-13.8, 3.9)
    return [(-spread.exp()).requires_grad_()]


@pytest.mark.parametrize("shared", [("q",), ("k",), ("q", "k")], ids="-".join)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("causality", CAUSALITIES)
@pytest.mark.parametrize("decay", DECAYS)
def test_heads_may_share_queries_and_keys(decay: str, causality: str, normalize: bool, shared: tuple[str, ...]) -> None:
    """Queries and keys of one head, (b, l, 1, k), give what copies of it give, and the sum of their gradients."""
    length = 3 * CHUNK + 5
    outcomes = []
    for copied in (True, False):
        q, k, *others = [*inputs(length, heads=3), *gates(DECAYS[decay], length, heads=3)]
        q = q[:, :, :1].detach().requires_grad_() if "q" in shared else q
        k = k[:, :, :1].detach().requires_grad_() if "k" in shared else k
        streams = [t.expand(-1, -1, 3, -1).contiguous() if copied else t for t in (q, k)]
        settings = {"causality": causality, "normalize": normalize, "feature_map": "elu_plus_one"}
        y = operators.linear_attention(*streams, *others, **settings)
        weighting = torch.sin(torch.arange(y.numel(), dtype=y.dtype)).view_as(y)
        outcomes.append((y, *torch.autograd.grad((y * weighting).sum(), [q, k, *others])))
    for what, actual, expected in zip(("y", "dq", "dk", "dv", "dg"), outcomes[1], outcomes[0], strict=False):
        assert_close(actual, expected, what=what)


@pytest.mark.parametrize("causality", CAUSALITIES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("decay", ["fixed", "scalar", "vector"])
def test_the_formula_with_decay_is_written_out_once_more(decay: str, normalize: bool, causality: str) -> None:
    """The definition in loops, independent of every formulation."""
    q, k, v = (t.detach() for t in inputs(7))
    (log_decay,) = (g.detach() for g in gates(DECAYS[decay], 7))
    settings = {"causality": causality, "normalize": normalize, "eps": 0.1, "scale": 0.3}
    y = operators.linear_attention(q, k, v, log_decay, **settings)
    matrix = operators.linear_attention_matrix(q, k, log_decay, **settings)
    a = (log_decay if decay == "vector" else log_decay.expand(2, 7, 2)[..., None].expand_as(q)).exp()
    for i in range(7):
        row = torch.zeros(2, 2, 7, dtype=torch.float64)
        for j in range(7):
            if causality == "noncausal":
                visible = a[:, j]
            elif j <= i:
                visible = a[:, j + 1 : i + 1].prod(1)
            elif causality == "bidirectional":
                visible = a[:, i:j].prod(1)
            else:
                continue
            row[:, :, j] = (q[:, i] * k[:, j] * visible).sum(-1)
        if normalize:
            row = row / 7 if causality == "noncausal" else row
            row = row / (row.sum(-1, keepdim=True) + 0.1)
        else:
            row = row * 0.3
        assert_close(matrix[:, :, i], row, what=f"row {i}")
        assert_close(y[:, i], torch.einsum("bhj,bjhv->bhv", row, v), what=f"token {i}")


@pytest.mark.parametrize("causality", ["causal", "noncausal"])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_formula_is_written_out_once_more(causality: str, normalize: bool) -> None:
    """The definition in loops, independent of every formulation: eps on the mean visible weight."""
    q, k, v = (t.detach() for t in inputs(7))
    y = operators.linear_attention(q, k, v, causality=causality, normalize=normalize, eps=0.1, scale=0.3)
    for i in range(7):
        visible = range(i + 1) if causality == "causal" else range(7)
        weights = torch.stack([(q[:, i] * k[:, j]).sum(-1) for j in visible])
        total = sum(w[..., None] * v[:, j] for w, j in zip(weights, visible, strict=True))
        mean_weight = weights.mean(0)[..., None] + 0.1
        assert_close(y[:, i], total / len(visible) / mean_weight if normalize else total * 0.3, what=f"token {i}")


@given(
    edges=strategies.cuts(140),
    normalize=st.booleans(),
    backend=st.sampled_from(["recurrent", "chunked", "dense"]),
    decay=st.sampled_from(["none", "scalar", "vector"]),
)
def test_streaming_in_any_parts_equals_one_pass(edges: list[int], normalize: bool, backend: str, decay: str) -> None:
    tensors = [t.detach() for t in (*inputs(140, heads=1), *gates(DECAYS[decay], 140, heads=1))]
    settings = {"causality": "causal", "normalize": normalize, "eps": 1e-3}
    whole = operators.linear_attention(*tensors, **settings)
    state = None
    parts = []
    for start, stop in pairwise(edges):
        part = (t[:, start:stop] for t in tensors)
        y, state = operators.linear_attention(
            *part, **settings, initial_state=state, output_final_state=True, backend=backend
        )
        parts.append(y)
    assert_close(torch.cat(parts, dim=1), whole)
    assert state.tokens == 140


@given(tensors=strategies.linear_inputs(), normalize=st.booleans())
def test_chunked_equals_recurrent_at_any_shape(tensors: tuple[torch.Tensor, ...], normalize: bool) -> None:
    settings = {"causality": "causal", "normalize": normalize, "output_final_state": True}
    fast, after = operators.linear_attention(*tensors, **settings, backend="chunked")
    truth, expected = operators.linear_attention(*tensors, **settings, backend="recurrent")
    assert_close(fast, truth)
    assert_close(after.memory, expected.memory, what="state")


@given(factor=st.floats(0.1, 10), length=st.integers(1, 80))
def test_normalized_weights_do_not_depend_on_the_scale_of_queries(factor: float, length: int) -> None:
    q, k, v = (t.detach() for t in inputs(length))
    settings = {"causality": "causal", "eps": 1e-200}
    assert_close(
        operators.linear_attention(factor * q, k, v, **settings), operators.linear_attention(q, k, v, **settings)
    )


def test_state_and_sums_are_float32_at_least() -> None:
    q, k, v = (t.detach().half() for t in inputs(100))
    y, state = operators.linear_attention(q, k, v, causality="causal", output_final_state=True)
    assert y.dtype == torch.float16
    assert state.memory.dtype == torch.float32
    big = torch.ones(1, 70_000, 1, 2, dtype=torch.float16)  # a float16 sum would overflow at 65,504
    assert_close(operators.linear_attention(big, big, big), big)


@pytest.mark.parametrize("causality", ["causal", "noncausal"])
def test_autocast_does_not_reach_the_sums(causality: str) -> None:
    q, k, v = (t.detach().float() for t in inputs(300))
    truth = operators.linear_attention(q, k, v, causality=causality)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(operators.linear_attention(q, k, v, causality=causality), truth)


def test_a_state_of_another_kind_is_refused() -> None:
    q, k, v = inputs(3)
    _, state = operators.linear_attention(q, k, v, causality="causal", output_final_state=True)
    with pytest.raises(ValueError, match="the same batch size, heads, widths"):
        operators.linear_attention(q, k, v, causality="causal", normalize=False, initial_state=state)
    with pytest.raises(ValueError, match="the same batch size, heads, widths"):
        operators.linear_attention(q[:1], k[:1], v[:1], causality="causal", initial_state=state)
    with pytest.raises(ValueError, match="at least one token"):
        operators.linear_attention(q[:, :0], k[:, :0], v[:, :0])


@pytest.mark.gpu
@pytest.mark.parametrize("case", OPERATORS)
def test_the_contract_holds_on_a_gpu(case: str) -> None:
    check_operator(case, CheckInputs(device="cuda"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": "fla", "causality": "causal"}, "cannot run"),
        ({"backend": "fastest"}, "no such backend"),
        ({"causality": "acausal"}, "Unknown causality"),
        ({"output_final_state": True}, "causal passes only"),
    ],
)
def test_what_cannot_be_done_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        operators.linear_attention(*inputs(3), **settings)
    with pytest.raises(ValueError, match=r"log_decay None, \(h,\)"):
        operators.linear_attention(*inputs(3), torch.zeros(3))
    with pytest.raises(ValueError, match="Expected q and k"):
        q, k, v = inputs(3)
        operators.linear_attention(q, k[:, :2], v)


def test_backends_say_what_can_run_here() -> None:
    actual = operators.backends()
    assert all(actual[name] == "available" for name in FORMULATIONS)
    for name in kernel_names():
        assert actual[name] == "available" or "not installed" in actual[name] or "needs a CUDA device" in actual[name]


@pytest.mark.parametrize("backend", FORMULATIONS)
@pytest.mark.parametrize("name", OPERATORS)
def test_a_state_of_another_dtype_continues_in_that_of_the_call(name: str, backend: str) -> None:
    case = OPERATORS[name]
    tensors = case.inputs(CheckInputs(batch=1), 4)
    for switches in case.switches("causal"):
        single = {n: t.float() for n, t in tensors.items()}
        _, state = case.run(**single, **switches, backend=backend, output_final_state=True)
        wide_state = RecurrentState(state.memory.double(), state.tokens)
        results = [
            case.run(**tensors, **switches, backend=backend, initial_state=start, output_final_state=True)
            for start in (state, wide_state)
        ]
        (y, end), (expected, expected_end) = results
        assert y.dtype == end.memory.dtype == torch.float64
        assert torch.equal(y, expected) and torch.equal(end.memory, expected_end.memory)
        half = {n: t.bfloat16() for n, t in tensors.items()}
        y, end = case.run(**half, **switches, backend=backend, initial_state=state, output_final_state=True)
        assert y.dtype == torch.bfloat16 and end.memory.dtype == torch.float32


def test_blocks_are_whole_chunks_and_hold_all_heads() -> None:
    q = torch.empty(2, 5, 8, 16)
    v = torch.empty(2, 5, 8, WIDE)
    assert block_length(q[:, :, :1], v) == block_length(q, v)
    assert block_length(q, v, more_channels=1) % chunk_size(16, WIDE + 1) == 0
