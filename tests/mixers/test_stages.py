"""The stages: scan orders, convolutions, decays, the focused map, norms and gates."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from mixers.stages.convolutions import LocalConvolution, ShortConvolution
from mixers.stages.decays import DoubleExponentialDecay, FixedDecay, LowRankDecay, ScalarDecay
from mixers.stages.focused import FocusedMap
from mixers.stages.outputs import HeadGroupNorm, Output, RMSNorm
from mixers.stages.scan_orders import SCANS, inverse_permutation, scan_orders
from mixers.testing.tolerances import assert_close

SIDES = st.integers(1, 19)
HALVES = (torch.float16, torch.bfloat16)


def order_of(scan: str, height: int, width: int) -> Tensor:
    (order,) = scan_orders(scan, (height, width))
    assert order is not None
    return order


def steps(order: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """How far consecutive tokens are apart, (l − 1,) rows and (l − 1,) columns."""
    return (order // width).diff().abs(), (order % width).diff().abs()


@given(scan=st.sampled_from(sorted(SCANS)), height=SIDES, width=SIDES)
def test_every_order_is_a_permutation_and_has_an_inverse(scan: str, height: int, width: int) -> None:
    x = torch.randn(2, height * width, 3)
    for order in scan_orders(scan, (height, width)):
        if order is None:
            continue
        assert order.dtype == torch.int64
        assert torch.equal(order.sort().values, torch.arange(height * width))
        assert torch.equal(x[:, order][:, inverse_permutation(order)], x)
        assert torch.equal(inverse_permutation(inverse_permutation(order)), order)


@given(height=SIDES, width=SIDES)
def test_zigzag_and_hilbert_go_from_neighbor_to_neighbor(height: int, width: int) -> None:
    rows, columns = steps(order_of("zigzag", height, width), width)
    assert (rows + columns == 1).all()
    rows, columns = steps(order_of("hilbert", height, width), width)
    assert (torch.maximum(rows, columns) == 1).all()
    diagonal = int((rows + columns == 2).sum())
    long = max(height, width)
    short = min(height, width)
    assert diagonal <= int(long % 2 == 1 and short % 2 == 0)


@pytest.mark.parametrize("power", range(1, 6))
def test_hilbert_on_powers_of_two_fills_one_quarter_after_the_other(power: int) -> None:
    side = 2**power
    order = order_of("hilbert", side, side)
    for quarter in order.chunk(4):
        rows = quarter // side
        columns = quarter % side
        assert int(rows.max() - rows.min()) == int(columns.max() - columns.min()) == side // 2 - 1


def test_the_orders_of_a_small_image() -> None:
    assert scan_orders("raster") == [None]
    assert order_of("column", 2, 3).tolist() == [0, 3, 1, 4, 2, 5]
    assert order_of("zigzag", 3, 2).tolist() == [0, 1, 3, 2, 4, 5]
    assert order_of("hilbert", 2, 2).tolist() == [0, 2, 3, 1]
    first, second = scan_orders("cross", (2, 3))
    assert first is None and second is not None and torch.equal(second, order_of("column", 2, 3))


def test_orders_cannot_be_spoilt_for_others() -> None:
    with torch.inference_mode():
        order_of("hilbert", 5, 7)
    order_of("hilbert", 5, 7).zero_()
    order = order_of("hilbert", 5, 7)
    assert not order.is_inference() and torch.equal(order.sort().values, torch.arange(35))


@pytest.mark.parametrize("scan", ["column", "hilbert", "cross"])
def test_orders_compile_in_one_graph_at_any_size(scan: str) -> None:
    def there_and_back(x: Tensor, grid: tuple[int, int]) -> Tensor:
        read = [x if order is None else x[:, order] for order in scan_orders(scan, grid, x.device)]
        last = scan_orders(scan, grid, x.device)[-1]
        assert last is not None
        return read[-1].cumsum(1)[:, inverse_permutation(last)]

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(there_and_back, fullgraph=True, backend=counter)
    for grid in ((4, 6), (3, 5), (8, 8), (2, 9), (9, 2)):
        x = torch.randn(1, grid[0] * grid[1], 2, requires_grad=True)
        y = compiled(x, grid)
        assert_close(y, there_and_back(x, grid))
        y.sum().backward()
    assert counter.frame_count <= 3, "compiled again for every size"


@given(length=st.integers(1, 9), size=st.integers(1, 6), causal=st.booleans(), activation=st.booleans())
def test_the_short_convolution_is_the_sum_written_out(length: int, size: int, causal: bool, activation: bool) -> None:
    layer = ShortConvolution(3, size, causal=causal, activation=activation).double()
    x = torch.randn(2, length, 3, dtype=torch.float64)
    weight = layer.weight
    bias = layer.bias
    assert weight.shape == (3, 1, size) and bias is not None
    first = size - 1 if causal else size // 2
    expected = bias.expand(2, length, 3).clone()
    for i, s in product(range(length), range(size)):
        if 0 <= i - first + s < length:
            expected[:, i] += weight[:, 0, s] * x[:, i - first + s]
    assert_close(layer(x), F.silu(expected) if activation else expected)


@given(length=st.integers(1, 12), size=st.integers(2, 5), place=st.integers(0, 11))
def test_the_causal_convolution_never_looks_ahead_and_the_centered_one_sees_both_sides(
    length: int, size: int, place: int
) -> None:
    place %= length
    for causal in (True, False):
        x = torch.randn(1, length, 2, dtype=torch.float64, requires_grad=True)
        ShortConvolution(2, size, causal).double()(x)[:, place].sum().backward()
        assert x.grad is not None
        visible = x.grad[0].abs().sum(-1).nonzero().flatten().tolist()
        first = place - (size - 1 if causal else size // 2)
        assert visible == [i for i in range(first, first + size) if 0 <= i < length]


@given(height=st.integers(1, 6), width=st.integers(1, 6), size=st.sampled_from([1, 3, 5]))
def test_the_local_convolution_is_the_sum_written_out(height: int, width: int, size: int) -> None:
    layer = LocalConvolution(2, size).double()
    x = torch.randn(2, height * width, 2, dtype=torch.float64)
    y = layer(x, (height, width))
    assert layer.bias is not None
    for i, j in ((0, 0), (height - 1, 0), (height // 2, width // 2)):
        expected = layer.bias.expand(2, 2).clone()
        for s, t in product(range(size), repeat=2):
            row = i + s - size // 2
            column = j + t - size // 2
            if 0 <= row < height and 0 <= column < width:
                expected += layer.weight[:, 0, s, t] * x[:, row * width + column]
        assert_close(y[:, i * width + j], expected, what=f"place {(i, j)}")


def test_a_local_convolution_checks_its_grid() -> None:
    x = torch.randn(1, 6, 4)
    layer = LocalConvolution(4, 3, option="local=0")
    with pytest.raises(ValueError, match=r"pass grid=\(height, width\), or use local=0"):
        layer(x, None)
    with pytest.raises(ValueError, match="8 positions, but there are 6 tokens"):
        layer(x, (2, 4))


@given(groups=st.integers(1, 3), width=st.integers(1, 5))
def test_norms_are_those_of_torch(groups: int, width: int) -> None:
    x = torch.randn(2, 4, groups * width, dtype=torch.float64)
    rms = RMSNorm(groups * width, groups=groups).double()
    group = HeadGroupNorm(groups, width).double()
    assert rms.weight is not None and group.weight is not None and group.bias is not None
    for parameter in (rms.weight, group.weight, group.bias):
        nn.init.normal_(parameter)
    plain = F.rms_norm(x.unflatten(-1, (groups, -1)), (width,), eps=1e-5).flatten(-2)
    assert_close(rms(x), plain * rms.weight)
    expected = F.group_norm(x.flatten(0, 1), groups, group.weight, group.bias, eps=1e-5).view_as(x)
    assert_close(group(x), expected)


@pytest.mark.parametrize("dtype", HALVES)
def test_norms_of_large_half_precision_numbers_are_finite(dtype: torch.dtype) -> None:
    x = (1e4 * torch.randn(2, 3, 8)).to(dtype)
    for norm in (RMSNorm(8), HeadGroupNorm(2, 4)):
        assert norm(x).dtype == dtype
        assert_close(norm.to(dtype)(x), norm.float()(x.float()).to(dtype))


def streams(heads: int = 2, value: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, SimpleNamespace]:
    y, v = (torch.randn(2, 6, heads, value, dtype=dtype) for _ in range(2))
    return y, SimpleNamespace(x=torch.randn(2, 6, 5, dtype=dtype), v=v, grid=(2, 3))


def built(dtype: torch.dtype = torch.float64, **options: object) -> Output:
    output = Output(5, 2, 3, **options).to(dtype)  # type: ignore[arg-type]
    for parameter in output.parameters():
        nn.init.normal_(parameter)
    return output


def test_mamba2_gates_before_the_norm_over_the_whole_width() -> None:
    y, given_streams = streams()
    output = built(skip=True, norm=True, gate=True, norm_kind="rms", gate_first=True)
    assert output.to_gate is not None and output.D is not None and output.D.shape == (2,)
    gated = (y + output.D[:, None] * given_streams.v).flatten(-2) * F.silu(output.to_gate(given_streams.x))
    expected = F.rms_norm(gated, (6,), output.norm.weight, eps=1e-5)  # type: ignore[union-attr,arg-type]
    assert_close(output(y, given_streams).flatten(-2), expected)


@pytest.mark.parametrize("affine", [True, False])
def test_gla_norms_each_head_and_then_gates(affine: bool) -> None:
    y, given_streams = streams()
    output = built(norm=True, gate=True, affine=affine)
    assert output.to_gate is not None and output.norm is not None
    assert (output.norm.weight is not None) == affine
    normed = F.rms_norm(y, (3,), output.norm.weight, eps=1e-5)  # type: ignore[arg-type]
    expected = normed.flatten(-2) * F.silu(output.to_gate(given_streams.x))
    assert_close(output(y, given_streams).flatten(-2), expected)


def test_rwkv6_has_a_group_norm_and_mamba_a_skip_for_every_channel() -> None:
    y, given_streams = streams()
    output = built(skip=True, skip_per_channel=True, norm=True, norm_kind="head_group", eps=64e-5)
    assert output.norm is not None and output.D is not None and output.D.shape == (2, 3)
    wide = (y + output.D * given_streams.v).flatten(-2).flatten(0, 1)
    expected = F.group_norm(wide, 2, output.norm.weight, output.norm.bias, eps=64e-5)  # type: ignore[arg-type]
    assert_close(output(y, given_streams), expected.view_as(y))


def test_the_local_convolution_of_the_values_is_added_and_nothing_on_is_the_identity() -> None:
    y, given_streams = streams()
    output = built(local_conv_size=3)
    assert output.local_conv is not None
    assert_close(output(y, given_streams), y + output.local_conv(given_streams.v.flatten(-2), (2, 3)).view_as(y))
    assert built()(y, given_streams) is y and not list(built().parameters())


@pytest.mark.parametrize("dtype", HALVES)
def test_outputs_keep_the_dtype(dtype: torch.dtype) -> None:
    y, given_streams = streams(dtype=dtype)
    result = built(dtype, skip=True, norm=True, gate=True, local_conv_size=3)(y, given_streams)
    assert result.dtype == dtype and result.isfinite().all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: scan_orders("hilbrt", (2, 2)), "Did you mean 'hilbert'"),
        (lambda: scan_orders("cross"), r"pass grid=\(height, width\)"),
        (lambda: scan_orders("hilbert", (0, 3)), "at least 1 × 1"),
        (lambda: built(norm_kind="head_rsm"), "Did you mean 'head_rms'"),
        (lambda: built(groups=2), "groups=2 is an option of"),
        (lambda: built(norm_kind="rms", groups=4), "equal groups"),
        (lambda: FixedDecay(2, first=0), "first > 0"),
        (lambda: LowRankDecay(8, 6, normalizer=0), "normalizer > 0"),
        (lambda: FocusedMap(2, 3, power=0.5), "power ≥ 1"),
        (lambda: LocalConvolution(4, 2), "odd size"),
        (lambda: ShortConvolution(4, 0, causal=True), "size ≥ 1"),
    ],
)
def test_what_stages_refuse(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def made_decays() -> list[nn.Module]:
    return [FixedDecay(4), ScalarDecay(8, 4), LowRankDecay(8, 6), DoubleExponentialDecay(8, 6)]


@given(
    size=st.sampled_from([0.0, 1.0, 1e2, 1e4]),
    dtype=st.sampled_from([torch.float64, torch.float32, *HALVES]),
    spread=st.sampled_from([0.0, 3.0]),
)
def test_log_decays_are_finite_wide_and_never_positive(size: float, dtype: torch.dtype, spread: float) -> None:
    x = (size * (2 * torch.rand(2, 5, 8, dtype=torch.float64) - 1)).to(dtype).requires_grad_()
    for decay in made_decays():
        if spread:
            for parameter in decay.parameters():
                nn.init.normal_(parameter, std=spread)
        decay.to(dtype)
        result = decay(x)
        log_decay = result[1] if isinstance(result, tuple) else result
        assert log_decay.dtype == torch.promote_types(dtype, torch.float32), decay
        assert log_decay.isfinite().all() and (log_decay <= 0).all(), decay
        if isinstance(result, tuple):
            assert result[0].isfinite().all() and (result[0] >= 0).all()
        if log_decay.requires_grad:
            loss = log_decay.mean() / 100  # else the true gradient is beyond float16
            gradients = torch.autograd.grad(loss, [x, *decay.parameters()])
            assert all(g.isfinite().all() for g in gradients), decay


@pytest.mark.parametrize("dtype", HALVES)
def test_decays_of_half_precision_modules_are_computed_wide(dtype: torch.dtype) -> None:
    x = torch.randn(2, 5, 8).to(dtype)
    for decay in made_decays():
        half = decay.to(dtype)(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            autocast = decay(x)
        wide = decay.float()(x.float())
        for got in (half, autocast):
            for a, b in zip(*((t if isinstance(t, tuple) else (t,)) for t in (got, wide)), strict=True):
                assert_close(a, b)


def test_published_decays_at_the_start() -> None:
    assert_close(FixedDecay(3)(torch.zeros(1, 1, 1)).exp(), 1 - 2.0 ** -torch.tensor([5.0, 6.0, 7.0]))
    dt, log_decay = ScalarDecay(8, 64)(torch.zeros(1, 1, 8))
    assert (dt >= 0.999e-3).all() and (dt <= 1.001e-1).all()
    assert (-log_decay / dt >= 0.999).all() and (-log_decay / dt <= 16.01).all()
    slow_to_fast = DoubleExponentialDecay(8, 6)(torch.randn(1, 1, 8)).flatten()
    assert (slow_to_fast.diff() < 0).all()
    assert_close(slow_to_fast[[0, -1]], -torch.tensor([-6.0, -1.0]).exp())
    layer = LowRankDecay(8, 6, rank=2).double()
    x = torch.randn(1, 3, 8, dtype=torch.float64)
    assert_close(layer(x), torch.sigmoid(layer.up(layer.down(x))).log() / 16)


@given(power=st.sampled_from([1.0, 2.0, 3.0, 4.5]), size=st.sampled_from([1e-3, 1.0, 30.0]))
def test_the_focused_map_is_the_published_formula(power: float, size: float) -> None:
    layer = FocusedMap(2, 3, power).double()
    nn.init.normal_(layer.scale)
    x = size * torch.randn(2, 4, 2, 3, dtype=torch.float64)
    u = (x.flatten(-2).relu() + 1e-6) / F.softplus(layer.scale)
    y = layer(x).flatten(-2)
    assert (y > 0).all()
    assert_close(y, u**power / (u**power).norm(dim=-1, keepdim=True) * u.norm(dim=-1, keepdim=True))
    assert_close(y.norm(dim=-1), u.norm(dim=-1))


def test_gradients_of_the_focused_map_are_right() -> None:
    layer = FocusedMap(2, 3).double()
    x = torch.randn(1, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, scale: torch.func.functional_call(layer, {"scale": scale}, x), (x, layer.scale)
    )


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("size", [0.0, 1.0, 30.0, -30.0, 1e3])
def test_the_focused_map_stays_finite(dtype: torch.dtype, size: float) -> None:
    layer = FocusedMap(4, 8).to(dtype)
    x = (size * torch.rand(2, 5, 4, 8)).to(dtype).requires_grad_()
    y = layer(x)
    assert y.dtype == dtype and y.isfinite().all() and (y >= 0).all()
    y.float().sum().backward()
    for gradient in (x.grad, layer.scale.grad):
        assert gradient is not None and gradient.isfinite().all()


@pytest.mark.parametrize("norm", [RMSNorm(8), RMSNorm(8, groups=2), HeadGroupNorm(2, 4), HeadGroupNorm(1, 8)], ids=repr)
def test_norms_have_second_derivatives_at_zero(norm: nn.Module) -> None:
    x = torch.zeros(3, 8, requires_grad=True)
    (first,) = torch.autograd.grad(norm(x).sin().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    assert first.isfinite().all() and second.isfinite().all()
