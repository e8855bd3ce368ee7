"""The Triton kernels of non-causal linear attention: on a GPU, or in Triton's interpreter where there is none."""

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

from mixers.feature_maps import FEATURE_MAPS
from mixers.operators import linear_attention
from mixers.operators.linear.kernels import launch, noncausal
from mixers.operators.linear.kernels.noncausal import noncausal_attention
from mixers.testing.tolerances import assert_close

ROOT = Path(__file__).resolve().parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SWITCHES = [(name, normalize) for name, m in FEATURE_MAPS.items() for normalize in {m.positive, False}]
SETTINGS = {"feature_map": "elu_plus_one", "normalize": True, "eps": 1e-3, "scale": 0.3}
HALF = (torch.bfloat16, torch.float16)
Tensors = tuple[Tensor, ...]


def tensors(batch: int, length: int, heads: int, key: int, value: int, dtype: torch.dtype = torch.float64) -> Tensors:
    """q, k, v and the gradient of the result."""
    widths = (key, key, value, value)
    return tuple(torch.randn(batch, length, heads, n, device=DEVICE, dtype=torch.float64).to(dtype) for n in widths)


def outcome(q: Tensor, k: Tensor, v: Tensor, dy: Tensor, backend: str | None = None, **settings) -> dict[str, Tensor]:
    """The result and the gradients, of the kernels or of another backend."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    if backend is None:
        y = noncausal_attention(*leaves, **settings)
    else:
        y = linear_attention(*leaves, causality="noncausal", backend=backend, **settings)
    return dict(zip(("y", "dq", "dk", "dv"), (y, *torch.autograd.grad(y, leaves, dy)), strict=True))


def assert_agree(inputs: Tensors, **settings) -> None:
    """The kernels against both truths, at the tolerance of the tensors."""
    actual = outcome(*inputs, **settings)
    for backend in ("dense", "recurrent"):
        for name, expected in outcome(*inputs, backend=backend, **settings).items():
            assert actual[name].dtype == expected.dtype
            assert_close(actual[name], expected, what=f"{name} against {backend}, {settings}")


def relative_errors(inputs: Tensors, **settings) -> dict[str, float]:
    """The largest error over the largest value, against the dense formulation of the same numbers in float64."""
    actual = outcome(*inputs, **settings)
    truth = outcome(*(t.double() for t in inputs), backend="dense", **settings)
    return {n: ((actual[n].double() - t).abs().max() / t.abs().max()).item() for n, t in truth.items()}


@settings(max_examples=max(1, settings.default.max_examples // 4))
@given(
    st.sampled_from([(1, 1), (1, 2), (2, 1)]),
    st.sampled_from([1, 2, 17, 63, 64, 65]),
    st.sampled_from([1, 3, 16, 40, 80]),
    st.sampled_from([1, 3, 16, 40, 80]),
    st.sampled_from(SWITCHES),
    st.sampled_from([torch.float64, torch.float32]),
    st.integers(0, 2**16),
)
def test_kernels_equal_dense_and_recurrent(groups, length, key, value, switches, dtype, seed) -> None:
    torch.manual_seed(seed)
    batch, heads = groups
    options = {"feature_map": switches[0], "normalize": switches[1], "eps": 0.1, "scale": 0.3}
    assert_agree(tensors(batch, length, heads, key, value, dtype), **options)


@pytest.mark.parametrize(("widths", "normalize"), [((160, 160), True), ((256, 40), True), ((40, 256), False)], ids=str)
def test_large_heads_are_cut_into_tiles(widths: tuple[int, int], normalize: bool) -> None:
    assert launch.tile(160, launch.largest_tile("ieee", torch.float64)) < 160
    assert_agree(tensors(1, 67, 1, *widths), **(SETTINGS | {"normalize": normalize}))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("longest", "splits"), [(2**20, 1), (64, 4), (128, 2), (192, 2)])
def test_the_sequence_is_split_over_programs(monkeypatch, longest: int, splits: int, normalize: bool) -> None:
    inputs = tensors(2, 200, 1, 7, 5)
    monkeypatch.setattr(launch, "PROGRAMS_PER_PROCESSOR", 0)
    monkeypatch.setattr(launch, "LONGEST_SPLIT", longest)
    assert launch.split(200, noncausal.BLOCK, 2, inputs[0].device)[0] == splits
    assert_agree(inputs, **(SETTINGS | {"normalize": normalize}))


@given(st.integers(1, 10**7), st.sampled_from([16, 64, 128]), st.integers(1, 5000))
def test_splits_cover_the_sequence_once(length: int, block: int, others: int) -> None:
    splits, part = launch.split(length, block, others, torch.device(DEVICE))
    assert part % block == 0 and part <= max(block, launch.LONGEST_SPLIT)
    assert (splits - 1) * part < length <= splits * part


@given(st.integers(1, 300), st.sampled_from([32, 64, 128]))
def test_tiles_are_powers_of_two_and_pad_little(width: int, largest: int) -> None:
    size = launch.tile(width, largest)
    assert 16 <= size <= largest and size.bit_count() == 1
    padded = -(-width // size) * size
    assert padded <= max(16, 2 * width)
    assert padded - width <= min(-width % largest, -width % (largest // 2))


def layouts(inputs: Tensors) -> dict[str, Tensors]:
    """The same numbers, stored in other ways."""
    q, k, v, dy = inputs
    packed = torch.cat([q, k, v], dim=-1)
    views = packed.split([q.shape[-1], k.shape[-1], v.shape[-1]], dim=-1)
    by_head = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in inputs]
    columns = [t.transpose(1, 3).contiguous().transpose(1, 3) for t in inputs]
    every_second = [torch.stack([t, t], dim=2).flatten(1, 2)[:, ::2] for t in inputs]
    return {
        "packed": (*views, dy),
        "(b, h, l, ·)": tuple(by_head),
        "every second token": tuple(every_second),
        "channels apart": tuple(columns),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_tensors_are_read_where_they_lie(dtype: torch.dtype) -> None:
    inputs = tensors(2, 66, 2, 40, 24, dtype)
    expected = outcome(*inputs, **SETTINGS)
    for layout, strided in layouts(inputs).items():
        assert not strided[0].is_contiguous()
        copied = [noncausal._with_rows(t) is not t for t in strided]
        assert copied == [layout == "channels apart"] * 4 if layout != "packed" else not any(copied)
        for name, value in outcome(*strided, **SETTINGS).items():
            assert torch.equal(value, expected[name]), f"{name}, {layout}"


def test_an_expanded_gradient_is_accepted() -> None:
    q, k, v, _ = tensors(1, 20, 2, 3, 5)
    ones = torch.ones((), device=DEVICE, dtype=v.dtype).expand(v.shape)
    assert_agree((q, k, v, ones), **SETTINGS)


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_loses_no_more_than_its_rounding(dtype: torch.dtype, switches: tuple[str, bool]) -> None:
    widths = (40, 40) if dtype == torch.bfloat16 else (160, 64)
    inputs = tensors(1, 130, 1, *widths, dtype)
    errors = relative_errors(inputs, feature_map=switches[0], normalize=switches[1], eps=0.1, scale=0.3)
    assert max(errors.values()) <= 2 * torch.finfo(dtype).eps, errors


@pytest.mark.parametrize("dtype", HALF)
def test_gradients_of_queries_survive_values_with_a_large_mean(dtype: torch.dtype) -> None:
    """They are differences between values and their mean, which a result rounded to half precision would bury."""
    q, k, v, dy = tensors(1, 500, 1, 16, 16, dtype)
    errors = relative_errors((q, k, v + 3, dy), **(SETTINGS | {"eps": 1e-6}))
    assert errors["dq"] <= 4 * torch.finfo(dtype).eps, errors


def test_tensors_of_mixed_dtypes_are_summed_in_the_widest() -> None:
    q, k, v, dy = tensors(1, 70, 1, 5, 3)
    for mixed in ((q.bfloat16(), k.bfloat16(), v.float(), dy.float()), (q.float(), k.half(), v.double(), dy)):
        actual = outcome(*mixed, **SETTINGS)
        for name, expected in outcome(*mixed, backend="dense", **SETTINGS).items():
            assert actual[name].dtype == expected.dtype
            assert_close(actual[name], expected, what=name)


def test_means_stay_finite_where_sums_do_not() -> None:
    q, k, v, dy = tensors(1, 1000, 1, 8, 4, torch.float32)
    k = k.abs() * 1e36  # a thousand of them are past the largest float32
    actual = outcome(q.abs(), k, v, dy, feature_map="relu", normalize=True, eps=1e-6, scale=1.0)
    truth = linear_attention(*(t.double() for t in (q.abs(), k, v)), feature_map="relu", backend="dense")
    assert_close(actual["y"], truth.float(), what="y")
    assert all(t.isfinite().all() for t in actual.values())


@pytest.mark.parametrize("size", [1e-4, 30.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_extreme_queries_and_keys_give_finite_results(dtype: torch.dtype, size: float) -> None:
    q, k, v, dy = tensors(1, 70, 1, 16, 8, dtype)
    actual = outcome(q * size, k * size, v, dy, **SETTINGS)
    assert all(t.isfinite().all() for t in actual.values())
    assert actual["y"].abs().max() <= v.abs().max() * (1 + torch.finfo(dtype).eps)


def test_constant_values_come_back() -> None:
    for dtype in (torch.float32, *HALF):
        q, k, v, _ = tensors(1, 70, 1, 40, 8, dtype)
        y = noncausal_attention(q, k, v[:, :1].expand_as(v), **(SETTINGS | {"eps": 0.0}))
        error = (y.double() - v[:, :1].double()).abs().max() / v.abs().max()
        assert error <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_nan_stays_nan(name: str) -> None:
    q, k, v, _ = tensors(1, 5, 1, 3, 2)
    q[0, 2, 0, 1] = torch.nan
    settings = {"feature_map": name, "normalize": False, "eps": 0.0, "scale": 1.0}
    y = noncausal_attention(q, k, v, **settings)
    assert y[0, 2].isnan().all() and y[:, [0, 1, 3, 4]].isfinite().all()
    assert noncausal_attention(k, q, v, **settings).isnan().all()


def test_every_feature_map_has_a_device_function() -> None:
    assert set(launch.FEATURES) == set(FEATURE_MAPS)
    with pytest.raises(KeyError):
        noncausal_attention(*tensors(1, 2, 1, 1, 1)[:3], **(SETTINGS | {"feature_map": "none such"}))


def test_the_same_call_gives_the_same_bits() -> None:
    inputs = tensors(2, 130, 1, 40, 16, torch.bfloat16)
    first = outcome(*inputs, **SETTINGS)
    second = outcome(*inputs, **SETTINGS)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("normalize", [True, False])
def test_operators_are_registered_well(normalize: bool) -> None:
    q, k, v, dy = tensors(1, 9, 2, 3, 5)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    settings = ("elu_plus_one", normalize, 0.1, 0.3)
    torch.library.opcheck(torch.ops.mixers.noncausal_attention.default, (*leaves, *settings))
    _, memory = torch.ops.mixers.noncausal_attention(q.detach(), k.detach(), v.detach(), *settings)
    constants = [t.detach() for t in (dy, q, k, v)]
    torch.library.opcheck(torch.ops.mixers.noncausal_attention_backward.default, (*constants, memory, *settings))


def test_a_second_derivative_is_refused() -> None:
    q, k, v, dy = tensors(1, 4, 1, 3, 2)
    q.requires_grad_()
    (dq,) = torch.autograd.grad(noncausal_attention(q, k, v, **SETTINGS), q, dy, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(dq.sum(), q)


def test_another_length_is_not_compiled_again() -> None:
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda q, k, v: noncausal_attention(q, k, v, **SETTINGS), fullgraph=True, backend=counter)
    for length in (30, 70, 131):
        inputs = tensors(1, length, 2, 3, 5)
        leaves = [t.requires_grad_() for t in inputs[:3]]
        for t in leaves:
            torch._dynamo.mark_dynamic(t, 1)
        y = compiled(*leaves)
        actual = dict(zip(("y", "dq", "dk", "dv"), (y, *torch.autograd.grad(y, leaves, inputs[3])), strict=True))
        for name, expected in outcome(*inputs, **SETTINGS).items():
            assert torch.equal(actual[name], expected), name
    assert counter.frame_count == 1


COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from mixers.operators.linear.kernels import noncausal

class Driver:
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 0
    get_current_target = lambda self: GPUTarget("cuda", {capability}, 32)

class Compiled:
    def __init__(self, kernel):
        self.kernel, self.shared = kernel, 0
    def __getitem__(self, grid):
        return lambda *args, **options: self.compile(*args, grid=grid, **options)
    def compile(self, *args, **options):
        self.shared = max(self.shared, self.kernel.warmup(*args, **options).metadata.shared)

triton.runtime.driver.set_active(Driver())
names = ("_mean", "_read", "_query_gradient", "_gradient_of_sums")
kernels = {{name: Compiled(getattr(noncausal, name)) for name in names}}
vars(noncausal).update(kernels)
counts = []
for length in (4096, 1, 17, 1000):
    for normalize in (True, False):
        q, k, v = (torch.empty(2, length, 3, 40, dtype=torch.{dtype}, requires_grad=True) for _ in range(3))
        y = noncausal.noncausal_attention(q, k, v, feature_map="relu", normalize=normalize, eps=1e-6, scale=0.5)
        y.backward(torch.empty_like(y))
    counts.append(sum(len(kernel.kernel.device_caches[0][0]) for kernel in kernels.values()))
assert len(set(counts)) == 1, f"kernels after each length: {{counts}}"
shared = max(kernel.shared for kernel in kernels.values())
assert shared <= 99 * 1024, f"{{shared}} bytes of shared memory"
"""


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "dtype"), [(90, "float32")])
def test_kernels_compile_without_a_gpu_and_once_for_every_length(tmp_path, capability: int, dtype: str) -> None:
    """Compiled for a GPU that is not there, by triton's own compiler: what the interpreter would let pass."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", COMPILE.format(capability=capability, dtype=dtype)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("switches", [("elu_plus_one", True), ("identity", False)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
@pytest.mark.parametrize("shape", [(2, 1021, 3, 40, 40), (1, 4096, 8, 80, 80), (1, 1024, 8, 160, 160)], ids=str)
def test_real_sizes_on_a_gpu(shape: tuple[int, ...], dtype: torch.dtype, switches: tuple[str, bool]) -> None:
    bound = {torch.float64: 1e-10, torch.float32: 1e-4}.get(dtype, 4 * torch.finfo(dtype).eps)
    inputs = tensors(*shape, dtype)
    for layout, strided in {"(b, l, h, ·)": inputs, **layouts(inputs)}.items():
        errors = relative_errors(strided, feature_map=switches[0], normalize=switches[1], eps=1e-3, scale=0.3)
        assert max(errors.values()) <= bound, f"{layout}: {errors}"


def formula_in_parts(inputs: Tensors, eps: float, last: int, part: int = 2**16) -> dict[str, Tensor]:
    """The result and gradients of the last tokens, normalized elu + 1, in float32 a part of the tokens at a time."""
    phi = FEATURE_MAPS["elu_plus_one"].apply
    length = inputs[0].shape[1]
    parts = [t.split(part, dim=1) for t in inputs]
    memory = 0.0
    z = 0.0
    change = 0.0
    dz = 0.0
    for k, v in zip(parts[1], parts[2], strict=True):
        f = phi(k.float())
        memory = memory + torch.einsum("blhk,blhv->bhkv", f, v.float()).double() / length
        z = z + f.sum(1).double() / length
    memory, z = memory.float(), z.float()
    for q, dy in zip(parts[0], parts[3], strict=True):
        f = phi(q.float())
        a = dy.float() / (torch.einsum("blhk,bhk->blh", f, z) + eps)[..., None]
        delta = torch.einsum("blhk,bhkv,blhv->blh", f, memory, a) / (torch.einsum("blhk,bhk->blh", f, z) + eps)
        change = change + torch.einsum("blhk,blhv->bhkv", f, a).double() / length
        dz = dz - torch.einsum("blhk,blh->bhk", f, delta).double() / length
    change, dz = change.float(), dz.float()
    q, k, v, dy = (t[:, -last:].float() for t in inputs)
    q.requires_grad_(), k.requires_grad_()
    norm = torch.einsum("blhk,bhk->blh", phi(q), z) + eps
    y = torch.einsum("blhk,bhkv->blhv", phi(q), memory) / norm[..., None]
    (dq,) = torch.autograd.grad(y, q, dy)
    df = torch.einsum("bhkv,blhv->blhk", change, v) + dz[:, None]
    (dk,) = torch.autograd.grad(phi(k), k, df)
    return {"y": y, "dq": dq, "dk": dk, "dv": torch.einsum("blhk,bhkv->blhv", phi(k), change)}


def test_the_formula_in_parts_is_the_operator() -> None:
    inputs = tensors(1, 130, 2, 5, 3, torch.float32)
    truth = outcome(*inputs, backend="dense", **SETTINGS)
    for name, value in formula_in_parts(inputs, SETTINGS["eps"], last=40, part=32).items():
        assert_close(value, truth[name][:, -40:], what=name)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["(b, l, h, ·)", "(b, h, l, ·)"])
def test_more_than_two_to_the_31_numbers_on_a_gpu(layout: str) -> None:
    needed = 48 * 2**30
    free = torch.cuda.mem_get_info()[0]
    if free < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free GPU memory, there are {free >> 30}")
    length = 2**22 + 5
    heads = 8
    width = 64
    assert length * heads * width > 2**31
    shape = (1, length, heads, width) if layout == "(b, l, h, ·)" else (1, heads, length, width)
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    if layout != "(b, l, h, ·)":
        inputs = [t.transpose(1, 2) for t in inputs]
    actual = outcome(*inputs, **SETTINGS)
    for name, expected in formula_in_parts(tuple(inputs), SETTINGS["eps"], last=1000).items():
        error = (actual[name][:, -1000:].double() - expected.double()).abs().max() / expected.abs().max()
        assert error <= 4 * torch.finfo(torch.bfloat16).eps, f"{name}: {error:.2g}"
        assert actual[name].isfinite().all(), name
