"""Bridges to other libraries: the right arguments in the right places, and refusals before anything runs.

Their kernels need a GPU. Here fla's are replaced by its own naive operators where fla is installed, and otherwise, as
mamba_ssm's always, by the documented recurrence, written out.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixers import operators
from mixers.operators import DeltaRuleCall, LinearAttentionCall, OperatorCall, SelectiveScanCall, external, selection
from mixers.operators.backend import find_backend
from mixers.operators.linear import fla as linear_fla

B = 3
H = 2
K = 6
V = 5
LENGTHS = (1, 2, 33)


def gated(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, settings: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What fla documents of (simple_)gla: S ← exp(g) S + k vᵀ, y = scale · q S."""
    assert settings["output_final_state"] and v.shape[-1] % 8 == 0
    memory = settings["initial_state"]
    rows = []
    for i in range(q.shape[1]):
        decayed = (
            memory if g is None else memory * (g[:, i, :, None, None] if g.ndim == 3 else g[:, i, ..., None]).exp()
        )
        memory = decayed + k[:, i, :, :, None] * v[:, i, :, None, :]
        rows.append(settings["scale"] * torch.einsum("bhk,bhkv->bhv", q[:, i].to(memory), memory))
    return torch.stack(rows, 1).to(v.dtype), memory


def delta(q, k, v, g, beta, scale, initial_state, output_final_state):  # type: ignore[no-untyped-def]
    """What fla documents of gated_delta_rule: S ← exp(g) S, S ← S + β k (v − kᵀ S), y = scale · q S."""
    assert output_final_state
    memory = initial_state
    rows = []
    for i in range(q.shape[1]):
        memory = memory * g[:, i, :, None, None].exp()
        new = v[:, i] - torch.einsum("bhk,bhkv->bhv", k[:, i], memory)
        memory = memory + (beta[:, i, :, None] * k[:, i])[..., None] * new[..., None, :]
        rows.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, i], memory))
    return torch.stack(rows, 1), memory


def selective_scan(u, delta, A, B, C, return_last_state):  # type: ignore[no-untyped-def]
    """What mamba_ssm documents of selective_scan_fn: (b, d, l), A (d, n), B and C (b, groups, n, l)."""
    assert return_last_state and u.shape[1] % B.shape[1] == 0
    wide = u.shape[1] // B.shape[1]
    B, C = (t.repeat_interleave(wide, 1) for t in (B, C))
    state = u.new_zeros(*u.shape[:2], A.shape[1])
    rows = []
    for i in range(u.shape[-1]):
        step = delta[..., i, None]
        state = (step * A).exp() * state + step * u[..., i, None] * B[..., i]
        rows.append((state * C[..., i]).sum(-1))
    return torch.stack(rows, -1), state


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels' places, taken by the recurrences above; as if all packages were installed and there were a GPU."""

    def module(name: str, **functions: Any) -> None:
        fake = ModuleType(name)
        vars(fake).update(functions)
        monkeypatch.setitem(sys.modules, name, fake)

    for name in ("fla", "fla.ops", "mamba_ssm", "mamba_ssm.ops", "selective_scan_cuda"):
        module(name)
    module("fla.ops.gla", chunk_gla=lambda q, k, v, g, **s: gated(q, k, v, g, s))
    module("fla.ops.simple_gla", chunk_simple_gla=lambda q, k, v, g, **s: gated(q, k, v, g, s))
    module("fla.ops.gated_delta_rule", chunk_gated_delta_rule=delta)
    module("mamba_ssm.ops.selective_scan_interface", selective_scan_fn=selective_scan)
    monkeypatch.setattr(selection, "unavailable", lambda operator, backend, device: None)
    monkeypatch.setenv("TRITON_F32_DEFAULT", "ieee")


def gates(length: int, decay: str) -> Tensor | None:
    shapes = {"scalar": (B, length, H), "vector": (B, length, H, K)}
    return -torch.rand(shapes[decay]) * 3 if decay in shapes else None


def run(function: Any, *tensors: Tensor | None, backend: str, **settings: Any) -> list[Tensor]:
    """The result and the gradients of all tensors."""
    leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
    y = function(*leaves, backend=backend, **settings)
    (y * torch.sin(torch.arange(y.numel()).view_as(y))).sum().backward()
    return [y.detach(), *(torch.zeros_like(t) if t.grad is None else t.grad for t in leaves if t is not None)]


def assert_same(function: Any, *tensors: Tensor | None, backend: str, **settings: Any) -> None:
    for truth in ("dense", "recurrent"):
        pairs = zip(
            run(function, *tensors, backend=backend, **settings),
            run(function, *tensors, backend=truth, **settings),
            strict=True,
        )
        for got, expected in pairs:
            torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("decay", "causality"),
    [("none", "causal"), *((d, c) for d in ("scalar", "vector") for c in ("causal", "bidirectional"))],
)
def test_linear_attention(length: int, normalize: bool, decay: str, causality: str) -> None:
    q = torch.rand(B, length, H, K)
    k = torch.rand(B, length, H, K)
    v = torch.randn(B, length, H, V)
    settings = {"causality": causality, "normalize": normalize, "eps": 1e-3, "scale": 0.3}
    assert_same(operators.linear_attention, q, k, v, gates(length, decay), backend="fla", **settings)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("decay", ["none", "scalar"])
@pytest.mark.parametrize("causality", ["causal", "bidirectional"])
def test_the_delta_rule(length: int, decay: str, causality: str) -> None:
    q = torch.randn(B, length, H, K)
    k = F.normalize(torch.randn(B, length, H, K), dim=-1)
    v = torch.randn(B, length, H, V)
    beta = torch.rand(B, length, H)
    settings = {"causality": causality, "scale": 0.3, "backend": "fla"}
    assert_same(operators.delta_rule, q, k, v, beta, gates(length, decay), **settings)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("causality", ["causal", "bidirectional"])
def test_the_selective_scan(length: int, normalize: bool, causality: str) -> None:
    u = torch.randn(B, length, H, V)
    dt = torch.rand(B, length, H, V)
    A = -torch.rand(H, V, K)
    b = torch.rand(B, length, H, K)
    c = torch.rand(B, length, H, K)
    settings = {"causality": causality, "normalize": normalize, "eps": 1e-3, "backend": "mamba_ssm"}
    assert_same(operators.selective_scan, u, dt, A, b, c, torch.randn(H, V), **settings)


class FirstDerivativeKernel(torch.autograd.Function):
    """As the real kernels: its backward pass returns tensors without a graph."""

    @staticmethod
    def forward(ctx: Any, function: Any, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.function = function
        ctx.tensors = tensors
        return function(*tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            leaves = [None if t is None else t.detach().requires_grad_() for t in ctx.tensors]
            inputs = [t for t in leaves if t is not None]
            computed = iter(torch.autograd.grad(ctx.function(*leaves), inputs, gradients, allow_unused=True))
        return None, *(None if t is None else next(computed) for t in leaves)


def linear_call(backend: str) -> tuple[Tensor, list[Tensor]]:
    leaves = [torch.rand(B, 5, H, 8, requires_grad=True) for _ in range(3)]
    return operators.linear_attention(*leaves, causality="causal", backend=backend), leaves


def delta_call(backend: str) -> tuple[Tensor, list[Tensor]]:
    leaves = [torch.rand(B, 5, H, 8, requires_grad=True) for _ in range(3)]
    leaves.append(torch.rand(B, 5, H, requires_grad=True))
    return operators.delta_rule(*leaves, causality="causal", backend=backend), leaves


def scan_call(backend: str) -> tuple[Tensor, list[Tensor]]:
    shapes = ((B, 5, H, V), (B, 5, H, V), (H, V, K), (B, 5, H, K), (B, 5, H, K))
    leaves = [torch.rand(shape, requires_grad=True) for shape in shapes]
    u, dt, A, *states = leaves
    return operators.selective_scan(u, dt, -A, *states, backend=backend), leaves


@pytest.mark.parametrize(("call", "backend"), [(linear_call, "fla"), (delta_call, "fla"), (scan_call, "mamba_ssm")])
def test_second_derivatives_are_refused_instead_of_zero(call, backend, monkeypatch: pytest.MonkeyPatch) -> None:
    apply = FirstDerivativeKernel.apply
    monkeypatch.setattr(
        sys.modules["fla.ops.simple_gla"],
        "chunk_simple_gla",
        lambda q, k, v, g, **s: apply(lambda *t: gated(*t, s), q, k, v, g),
    )
    monkeypatch.setattr(
        sys.modules["fla.ops.gated_delta_rule"],
        "chunk_gated_delta_rule",
        lambda q, k, v, g, beta, **s: apply(lambda *t: delta(*t, **s), q, k, v, g, beta),
    )
    monkeypatch.setattr(
        sys.modules["mamba_ssm.ops.selective_scan_interface"],
        "selective_scan_fn",
        lambda *t, return_last_state: apply(lambda *t: selective_scan(*t, return_last_state=True), *t),
    )
    y, leaves = call(backend)
    first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
    for gradient in first:
        for leaf in leaves:
            with pytest.raises(RuntimeError, match="first derivatives only"):
                torch.autograd.grad(gradient.square().sum(), leaf, retain_graph=True)


def test_the_scan_refuses_the_gradient_of_its_state() -> None:
    tensors = [torch.rand(1, 4, H, V), torch.rand(1, 4, H, V), -torch.rand(H, V, K), *torch.rand(2, 1, 4, H, K)]
    settings: dict[str, Any] = {"backend": "mamba_ssm", "output_final_state": True}
    operators.selective_scan(*tensors, **settings)
    tensors[1].requires_grad_()
    with pytest.raises(ValueError, match="no gradient of the final state"):
        operators.selective_scan(*tensors, **settings)
    with torch.no_grad():
        operators.selective_scan(*tensors, **settings)


def test_rates_of_decay_are_not_rounded_to_half_precision() -> None:
    """exp(dt A) over many tokens: an error of A in bfloat16 would change what is left of the first by percents."""
    half = [torch.rand(1, 200, H, n).bfloat16() for n in (V, K, K)]
    dt = torch.full((1, 200, H, V), 0.5).bfloat16()
    A = -torch.full((H, V, K), 0.0501)
    run = [operators.selective_scan(half[0], dt, A, *half[1:], backend=name) for name in ("mamba_ssm", "recurrent")]
    torch.testing.assert_close(run[0].float(), run[1].float(), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("first", ["fla", "chunked"])
@pytest.mark.parametrize("second", ["fla", "recurrent"])
def test_a_stream_goes_from_one_backend_to_another(first: str, second: str) -> None:
    q = torch.rand(B, 9, H, K)
    k = torch.rand(B, 9, H, K)
    v = torch.randn(B, 9, H, V)
    whole = operators.linear_attention(q, k, v, causality="causal", backend="dense")
    head = [t[:, :4] for t in (q, k, v)]
    tail = [t[:, 4:] for t in (q, k, v)]
    start, state = operators.linear_attention(*head, causality="causal", backend=first, output_final_state=True)
    end = operators.linear_attention(*tail, causality="causal", backend=second, initial_state=state)
    torch.testing.assert_close(torch.cat([start, end], 1), whole, rtol=1e-4, atol=1e-5)


def test_what_passes_32_bit_offsets_is_taken_apart_by_items(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.rand(B, 9, H, K)
    k = torch.rand(B, 9, H, K)
    v = torch.randn(B, 9, H, V)
    calls: list[int] = []
    kernel = linear_fla._run_kernel
    monkeypatch.setattr(linear_fla, "_run_kernel", lambda *t: (calls.append(len(t[0])), kernel(*t))[1])
    monkeypatch.setattr(external, "MOST_ELEMENTS", 9 * H * 8)
    assert_same(operators.linear_attention, q, k, v, backend="fla", causality="causal")
    assert calls and set(calls) == {1}
    monkeypatch.setattr(external, "MOST_ELEMENTS", 9 * H * K - 1)
    with pytest.raises(ValueError, match="32-bit offsets"):
        operators.linear_attention(q, k, v, backend="fla", causality="causal")


def call_of(
    operator: str, causality: str = "causal", dtype: torch.dtype = torch.bfloat16, width: int = K
) -> OperatorCall:
    """A call of zeros."""
    tokens = (1, 4, H)
    shapes = {
        "linear": {"q": (*tokens, width), "k": (*tokens, width), "v": (*tokens, V), "log_decay": (*tokens, 1)},
        "delta": {"q": (*tokens, width), "k": (*tokens, width), "beta": tokens, "log_decay": tokens, "v": (*tokens, V)},
        "scan": {
            "dt": (*tokens, V),
            "A": (H, V, width),
            "B": (*tokens, width),
            "C": (*tokens, width),
            "u": (*tokens, V),
        },
    }
    kinds = {"linear": LinearAttentionCall, "delta": DeltaRuleCall, "scan": SelectiveScanCall}
    tensors: dict[str, Any] = {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes[operator].items()}
    if operator == "delta":
        tensors["decays"] = True
    return kinds[operator](causality=causality, **tensors)


def refusal(backend: str, call: OperatorCall) -> str | None:
    """Why a backend refuses a call."""
    implementation = find_backend(call.operator, backend)
    assert implementation is not None
    return implementation.refuses(call)


@pytest.mark.parametrize(
    ("backend", "call", "reason"),
    [
        ("fla", call_of("linear"), None),
        ("fla", call_of("linear", "noncausal"), "no order"),
        ("fla", call_of("linear", dtype=torch.float64), "no float64"),
        ("fla", call_of("linear", width=300), "wider than its 256"),
        ("fla", call_of("delta"), None),
        ("fla", call_of("delta", dtype=torch.float64), "no float64"),
        ("mamba_ssm", call_of("scan"), None),
        ("mamba_ssm", call_of("scan", "noncausal"), "no order"),
        ("mamba_ssm", call_of("scan", width=300), "larger than its 256"),
        ("mamba_ssm", call_of("scan", dtype=torch.float64), "no float64"),
    ],
)
def test_refusals(backend: str, call: OperatorCall, reason: str | None) -> None:
    message = refusal(backend, call)
    assert message is None if reason is None else message is not None and reason in message


def test_float32_is_not_rounded_to_tf32_unless_requested(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal("fla", call_of("linear", dtype=torch.float32)) is None
    monkeypatch.delenv("TRITON_F32_DEFAULT")
    message = refusal("fla", call_of("linear", dtype=torch.float32))
    assert message is not None and "TF32" in message


def test_a_build_without_the_scan_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", None)
    message = refusal("mamba_ssm", call_of("scan"))
    assert message is not None and "MAMBA_FORCE_BUILD" in message


def test_half_precision_is_passed_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes: list[torch.dtype] = []
    kernel = linear_fla._run_kernel
    monkeypatch.setattr(linear_fla, "_run_kernel", lambda q, *t: (dtypes.append(q.dtype), kernel(q, *t))[1])
    q, k, v = (torch.rand(1, 5, H, 8, dtype=torch.bfloat16) for _ in range(3))
    y = operators.linear_attention(q, k, v, causality="causal", backend="fla", feature_map="elu_plus_one")
    assert dtypes == [torch.bfloat16] and y.dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.parametrize("decay", ["none", "scalar", "vector"])
def test_fla_itself_on_a_gpu(decay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    pytest.importorskip("fla", reason='install the extra "parity"')
    q, k, v = (torch.rand(2, 1000, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    g = {
        "none": None,
        "scalar": -torch.rand(2, 1000, 4, device="cuda"),
        "vector": -torch.rand(2, 1000, 4, 64, device="cuda"),
    }
    y = operators.linear_attention(q, k, v, g[decay], causality="causal", backend="fla")
    expected = operators.linear_attention(
        q.double(), k.double(), v.double(), g[decay], causality="causal", backend="chunked"
    )
    assert (y - expected).abs().max() < 0.03 * expected.abs().max()
