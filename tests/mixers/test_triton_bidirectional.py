"""The Triton kernels of bidirectional decayed attention: on a GPU, or in Triton's interpreter where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="needs triton (the extra test, on Linux)")

from mixers.operators import linear_attention
from mixers.operators.linear.kernels import chunks
from mixers.operators.linear.kernels.bidirectional import bidirectional_attention
from mixers.testing.tolerances import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SETTINGS = {"normalize": True, "eps": 1e-3, "scale": 0.3}
HALF = (torch.bfloat16, torch.float16)
GATES = ("scalar", "vector")
NAMES = ("y", "dq", "dk", "dv", "dg")
Tensors = tuple[Tensor, ...]


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Chunks of 16 tokens: few tokens fill many. Tests that ask for `real_chunks` keep those of 64 and 32."""
    if "real_chunks" not in request.fixturenames:
        monkeypatch.setattr(chunks, "LEVELS", 4)
        monkeypatch.setattr(chunks, "FEW_LEVELS", 4)


@pytest.fixture
def real_chunks() -> None:
    """Nothing is changed."""


def tensors(
    batch: int, length: int, heads: int, key: int, value: int, gates: str, dtype: torch.dtype = torch.float64
) -> Tensors:
    """q, k > 0, v, log decays of all magnitudes between −1e-6 and −50, and the gradient of the result."""

    def normal(width: int) -> Tensor:
        return torch.randn(batch, length, heads, width, dtype=torch.float64)

    log_decay = -torch.empty_like(normal(key if gates == "vector" else 1)).uniform_(-13.8, 3.9).exp()
    inputs = (normal(key).exp(), normal(key).exp(), normal(value), log_decay, normal(value))
    return tuple(t.to(DEVICE, dtype) for t in inputs)


def outcome(q: Tensor, k: Tensor, v: Tensor, g: Tensor, dy: Tensor, backend: str | None = None, **switches):
    """The result and the gradients, of the kernels or of another backend."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v, g)]
    if backend is None:
        y = bidirectional_attention(*leaves, **switches)
    else:
        log_decay = leaves[3] if g.shape == q.shape else leaves[3].squeeze(-1)
        y = linear_attention(*leaves[:3], log_decay, causality="bidirectional", backend=backend, **switches)
    return dict(zip(NAMES, (y, *torch.autograd.grad(y, leaves, dy)), strict=True))


def assert_agree(inputs: Tensors, **switches) -> None:
    """The kernels against both truths, at the tolerance of the tensors."""
    actual = outcome(*inputs, **switches)
    for backend in ("dense", "recurrent"):
        for name, expected in outcome(*inputs, backend=backend, **switches).items():
            assert actual[name].dtype == expected.dtype
            assert_close(actual[name], expected, what=f"{name} against {backend}, {switches}")


def relative_errors(inputs: Tensors, **switches) -> dict[str, float]:
    """The largest error over the largest value, against the same numbers in float64, token by token."""
    actual = outcome(*inputs, **switches)
    truth = outcome(*(t.double() for t in inputs), backend="recurrent", **switches)
    return {n: ((actual[n].double() - t).abs().max() / t.abs().max()).item() for n, t in truth.items()}


@settings(max_examples=max(1, settings.default.max_examples // 8))
@given(
    st.integers(1, 2),
    st.sampled_from([1, 2, 15, 16, 17, 35]),
    st.integers(1, 2),
    st.sampled_from([1, 3, 17]),
    st.sampled_from([1, 3, 17]),
    st.sampled_from(GATES),
    st.booleans(),
    st.sampled_from([torch.float64, torch.float32]),
    st.integers(0, 2**16),
)
def test_kernels_equal_dense_and_recurrent(batch, length, heads, key, value, gates, normalize, dtype, seed) -> None:
    torch.manual_seed(seed)
    inputs = tensors(batch, length, heads, key, value, gates, dtype)
    assert_agree(inputs, normalize=normalize, eps=0.1, scale=0.3)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("gates", "length"), [("scalar", 150), ("vector", 70)])
def test_float32_is_exact_for_any_mix_of_decays(gates: str, length: int, normalize: bool, real_chunks) -> None:
    inputs = tensors(1, length, 1, 5, 3, gates, torch.float32)
    errors = relative_errors(inputs, **(SETTINGS | {"normalize": normalize}))
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("gates", GATES)
def test_every_single_number_is_exact(gates: str) -> None:
    """Slow gates next to fast ones: where no term is negative, the smallest result is as exact as the largest."""
    q, k, v, g, _ = tensors(1, 90, 1, 4, 3, gates, torch.float32)
    g[:, 3::7] = -50.0
    g[:, 40:50] = -1e-6
    k[:, ::5] *= 1e-20
    actual = bidirectional_attention(q, k, v.exp(), g, **(SETTINGS | {"normalize": False}))
    gate = g.double() if gates == "vector" else g.double().squeeze(-1)
    truth = linear_attention(
        *(t.double() for t in (q, k, v.exp())), gate, causality="bidirectional", backend="recurrent",
        **(SETTINGS | {"normalize": False}),
    )  # fmt: skip
    assert ((actual.double() - truth) / truth).abs().max() < 1e-5


@pytest.mark.parametrize(("gates", "widths"), [("scalar", (16, 160)), ("vector", (40, 80))])
def test_large_heads_are_cut_into_tiles(gates: str, widths: tuple[int, int]) -> None:
    assert_agree(tensors(1, 17, 1, *widths, gates, torch.float32), **SETTINGS)


@pytest.mark.parametrize("gates", GATES)
def test_gates_of_one_give_attention_without_an_order(gates: str) -> None:
    q, k, v, g, _ = tensors(2, 40, 1, 5, 3, gates)
    y = bidirectional_attention(q, k, v, torch.zeros_like(g), normalize=True, eps=1e-30, scale=1.0)
    assert_close(y, linear_attention(q, k, v, causality="noncausal", eps=1e-200), what="normalized")
    y = bidirectional_attention(q, k, v, torch.zeros_like(g), normalize=False, eps=0.0, scale=0.3)
    assert_close(y, linear_attention(q, k, v, causality="noncausal", normalize=False, scale=0.3), what="not normalized")


@pytest.mark.parametrize("gates", GATES)
def test_gates_of_zero_cut_the_sequence(gates: str) -> None:
    """A log decay of −inf: what it is between does not see each other, and gradients stay finite."""
    q, k, v, g, dy = tensors(1, 40, 1, 5, 3, gates)
    cuts = [0, 16, 21, 39]
    g[:, cuts] = -torch.inf
    actual = outcome(q, k, v, g, dy, **SETTINGS)
    g[:, cuts] = -1e5  # its exponential is 0 as well
    for name, expected in outcome(q, k, v, g, dy, backend="dense", **SETTINGS).items():
        assert_close(actual[name], expected, what=name)


@pytest.mark.parametrize("gates", GATES)
def test_constant_values_come_back(gates: str) -> None:
    q, k, v, g, _ = tensors(1, 40, 2, 5, 3, gates)
    constant = v[:, :1].expand_as(v)
    assert_close(bidirectional_attention(q, k, constant, g, normalize=True, eps=1e-30, scale=1.0), constant)


def layouts(inputs: Tensors) -> dict[str, Tensors]:
    """The same numbers, stored in other ways."""
    packed = torch.cat(inputs, dim=-1).split([t.shape[-1] for t in inputs], dim=-1)
    return {
        "packed": packed,
        "(b, h, l, ·)": tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in inputs),
        "channels apart": tuple(t.transpose(1, 3).contiguous().transpose(1, 3) for t in inputs),
        "every second token": tuple(torch.stack([t, t], dim=2).flatten(1, 2)[:, ::2] for t in inputs),
    }


@pytest.mark.parametrize("gates", GATES)
def test_strided_tensors_are_read_where_they_lie(gates: str) -> None:
    inputs = tensors(1, 14, 2, 4, 3, gates, torch.float32)
    expected = outcome(*inputs, **SETTINGS)
    for layout, strided in layouts(inputs).items():
        assert not strided[0].is_contiguous()
        for name, value in outcome(*strided, **SETTINGS).items():
            assert torch.equal(value, expected[name]), f"{name}, {layout}"


def test_expanded_gates_and_gradients_are_accepted() -> None:
    q, k, v, g, _ = tensors(1, 20, 2, 3, 5, "scalar")
    ones = torch.ones((), device=DEVICE, dtype=v.dtype).expand(v.shape)
    assert_agree((q, k, v, g[:1, :1].expand_as(g), ones), **SETTINGS)


@pytest.mark.parametrize(
    ("dtype", "gates", "normalize"),
    [
        (torch.bfloat16, "scalar", True),
        (torch.bfloat16, "vector", False),
        (torch.float16, "scalar", False),
        (torch.float16, "vector", True),
    ],
    ids=str,
)  # every pair of two of them
def test_half_precision_loses_no_more_than_its_rounding(dtype: torch.dtype, gates: str, normalize: bool) -> None:
    inputs = tensors(1, 35, 1, 20, 6, gates, dtype)
    errors = relative_errors(inputs, **(SETTINGS | {"normalize": normalize}))
    assert max(errors.values()) <= 2 * torch.finfo(dtype).eps, errors


def test_tensors_of_mixed_dtypes_are_summed_in_the_widest() -> None:
    q, k, v, g, dy = tensors(1, 20, 1, 5, 3, "scalar")
    inputs = (q.bfloat16(), k.half(), v.float(), g.float(), dy.float())
    actual = outcome(*inputs, **SETTINGS)
    for name, expected in outcome(*inputs, backend="dense", **SETTINGS).items():
        assert actual[name].dtype == expected.dtype
        assert_close(actual[name], expected, what=name)


def test_the_same_call_gives_the_same_bits() -> None:
    inputs = tensors(1, 20, 1, 20, 3, "scalar", torch.bfloat16)
    first = outcome(*inputs, **SETTINGS)
    second = outcome(*inputs, **SETTINGS)
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


@pytest.mark.parametrize("normalize", [True, False])
def test_operators_are_registered_well(normalize: bool) -> None:
    *inputs, dy = tensors(1, 9, 1, 3, 2, "vector")
    switches = (normalize, 0.1, 0.3)
    operators = torch.ops.mixers
    leaves = [t.clone().requires_grad_() for t in inputs]
    torch.library.opcheck(operators.bidirectional_attention.default, (*leaves, *switches))
    torch.library.opcheck(operators.bidirectional_attention_backward.default, (dy, *inputs, *switches))


def test_a_second_derivative_is_refused() -> None:
    q, k, v, g, dy = tensors(1, 4, 1, 3, 2, "scalar")
    q.requires_grad_()
    (dq,) = torch.autograd.grad(bidirectional_attention(q, k, v, g, **SETTINGS), q, dy, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(dq.sum(), q)


def test_another_length_is_not_compiled_again() -> None:
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *t: bidirectional_attention(*t, **SETTINGS), fullgraph=True, backend=counter)
    for length in (12, 20):
        inputs = tensors(1, length, 1, 3, 5, "scalar")
        leaves = [t.requires_grad_() for t in inputs[:4]]
        for t in leaves:
            torch._dynamo.mark_dynamic(t, 1)
        y = compiled(*leaves)
        actual = dict(zip(NAMES, (y, *torch.autograd.grad(y, leaves, inputs[4])), strict=True))
        for name, expected in outcome(*inputs, **SETTINGS).items():
            assert torch.equal(actual[name], expected), name
    assert counter.frame_count == 1


COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from mixers.operators.linear.kernels import bidirectional, bidirectional_backward, chunks

class Driver:
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 0
    get_current_target = lambda self: GPUTarget("cuda", {capability}, 32)

triton.runtime.driver.set_active(Driver())
shared, kernels = [], []
for module, names in ((chunks, ("_chunk_states", "_carry", "_mix")), (bidirectional_backward, ("_gradients",))):
    for name in names:
        kernels.append(getattr(module, name))
        kernels[-1].run = lambda *args, kernel=kernels[-1], run=kernels[-1].run, **options: shared.append(
            run(*args, **{{**options, "warmup": True}}).metadata.shared
        )
counts = []
for length in (4096, 1, 17, 1000):
    q, k, v = (torch.empty(2, length, 3, 40, dtype=torch.{dtype}, requires_grad=True) for _ in range(3))
    g = torch.empty(2, length, 3, {gates}, requires_grad=True)
    y = bidirectional.bidirectional_attention(q, k, v, g, normalize=True, eps=1e-6, scale=0.5)
    y.backward(torch.empty_like(y))
    counts.append(sum(len(kernel.device_caches[0][0]) for kernel in kernels))
assert len(set(counts)) == 1, f"kernels after each length: {{counts}}"
assert max(shared) <= 99 * 1024, f"{{max(shared)}} bytes of shared memory"
"""


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "dtype", "gates"), [(90, "bfloat16", 40)])
def test_kernels_compile_without_a_gpu_and_once_for_every_length(tmp_path, capability, dtype, gates) -> None:
    """Compiled for a GPU that is not there, by triton's own compiler: what the interpreter would let pass."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", COMPILE.format(capability=capability, dtype=dtype, gates=gates)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("width", [40, 64, 80, 160])
@pytest.mark.parametrize("gates", GATES)
def test_real_sizes_on_a_gpu(gates: str, width: int, dtype: torch.dtype, real_chunks) -> None:
    inputs = tensors(2, 4096 + 33, 4, width, width, gates, dtype)
    actual = outcome(*inputs, **SETTINGS)
    truth = outcome(*(t.double() for t in inputs), backend="chunked", **SETTINGS)
    allowed = 2e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for name, expected in truth.items():
        error = (actual[name].double() - expected).abs().max() / expected.abs().max()
        assert error <= allowed, f"{name}: {error:.2g}"


@pytest.mark.gpu
def test_more_chunks_and_numbers_than_small_integers_count_on_a_gpu(real_chunks) -> None:
    """More than 65,535 chunks, and more than 2³¹ numbers of q and k: the end is that of the last tokens alone."""
    if torch.cuda.get_device_properties(0).total_memory < 60 * 2**30:
        pytest.skip("needs a GPU with 60 GiB: q and k have 2³¹ numbers each")
    length = 2**25 + 5
    q, k = (torch.rand(1, length, 1, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    v = torch.randn(1, length, 1, 16, device=DEVICE, dtype=torch.bfloat16)
    g = torch.full((1, length, 1, 1), -0.5, device=DEVICE)
    y = bidirectional_attention(q, k, v, g, **SETTINGS)[:, -64:]
    last = bidirectional_attention(*(t[:, -512:].contiguous() for t in (q, k, v, g)), **SETTINGS)[:, -64:]
    assert_close(y, last)
