"""Passes block after block: the same result and gradients as the dense form wherever blocks end, and what they keep."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mixers import create_mixer
from mixers.feature_maps import FEATURE_MAPS
from mixers.operators import linear_attention, selective_scan
from mixers.testing import OPERATORS, CheckInputs, OperatorCase
from mixers.testing.inputs import small_blocks
from mixers.testing.operator_checks import check_second_derivatives
from mixers.testing.tolerances import assert_close
from mixers.traits import CAUSALITIES

DECAYS = {"none": None, "fixed": "h", "scalar": "blh", "vector": "blhk"}


@pytest.fixture(autouse=True)
def short_blocks() -> Iterator[None]:
    """Blocks of a few tokens, so that short sequences have several."""
    with small_blocks(40):
        yield


def inputs(decay: str, batch: int, length: int, k: int = 3, v: int = 2, heads: int = 2, seed: int = 0) -> list[Tensor]:
    """q, k, v and the log decay, if there is one, away from where a feature map has a corner."""
    g = torch.Generator().manual_seed(seed)
    sizes = {"b": batch, "l": length, "h": heads, "k": k}
    drawn_tensors = [torch.randn(batch, length, heads, width, generator=g, dtype=torch.float64) for width in (k, k, v)]
    if DECAYS[decay]:
        shape = [sizes[axis] for axis in DECAYS[decay]]
        drawn_tensors.append(-torch.empty(shape, dtype=torch.float64).uniform_(-9, 2, generator=g).exp())
    return [t.requires_grad_() for t in drawn_tensors]


def outcome(tensors: list[Tensor], **switches: Any) -> tuple[Tensor, ...]:
    """The result and every gradient."""
    y = linear_attention(*tensors, **switches)
    weighting = torch.sin(torch.arange(y.numel(), dtype=y.dtype)).view_as(y)
    return (y, *torch.autograd.grad((y * weighting).sum(), tensors))


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_slopes_are_derivatives(feature_map: str) -> None:
    apply = FEATURE_MAPS[feature_map].apply
    slope = FEATURE_MAPS[feature_map].slope
    x = torch.tensor([-800.0, -3.0, -1e-3, 0.0, 1e-3, 3.0, 800.0], dtype=torch.float64, requires_grad=True)
    (truth,) = torch.autograd.grad(apply(x).sum(), x)
    assert_close(slope(apply(x)), truth, torch.float64)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    decay=st.sampled_from(list(DECAYS)),
    causality=st.sampled_from(CAUSALITIES),
    feature_map=st.sampled_from(list(FEATURE_MAPS)),
    normalize=st.booleans(),
    batch=st.integers(1, 3),
    length=st.integers(1, 70),
    widths=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    seed=st.integers(0, 9),
)
def test_any_block_equals_dense(
    decay: str,
    causality: str,
    feature_map: str,
    normalize: bool,
    batch: int,
    length: int,
    widths: tuple[int, int],
    seed: int,
) -> None:
    feature_map = "elu_plus_one" if normalize else feature_map  # the others give no weights, or signed ones
    switches = {"causality": causality, "normalize": normalize, "feature_map": feature_map, "eps": 0.1, "scale": 0.3}
    actual, truth = (
        outcome(inputs(decay, batch, length, *widths, seed=seed), **switches, backend=backend)
        for backend in ("chunked", "dense")
    )
    for what, got, expected in zip(("y", "dq", "dk", "dv", "dg"), actual, truth, strict=False):
        assert_close(got, expected, what=what)


@pytest.mark.parametrize("causality", CAUSALITIES)
@pytest.mark.parametrize("length", [1, 31, 32, 33, 70])
def test_blocks_of_a_scan_equal_dense(length: int, causality: str) -> None:
    g = torch.Generator().manual_seed(0)
    u, dt, B, C = (torch.rand(1, length, 2, n, generator=g, dtype=torch.float64) for n in (3, 3, 4, 4))
    A = -torch.rand(2, 3, 4, generator=g, dtype=torch.float64)
    tensors = [t.requires_grad_() for t in (u, dt, A, B, C)]
    actual, truth = (selective_scan(*tensors, causality=causality, backend=b) for b in ("chunked", "dense"))
    assert_close(actual, truth)
    gradients = (torch.autograd.grad((y * torch.sin(y.detach())).sum(), tensors) for y in (actual, truth))
    for got, expected in zip(*gradients, strict=True):
        assert_close(got, expected, what="gradient")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalize", [True, False])
def test_half_precision_is_rounded_once(dtype: torch.dtype, normalize: bool) -> None:
    half = [t.detach().to(dtype).requires_grad_() for t in inputs("vector", 2, 50)]
    wide = [t.detach().double().requires_grad_() for t in half]
    switches = {"causality": "noncausal", "normalize": normalize, "feature_map": "elu_plus_one", "scale": 0.01}
    y = linear_attention(*half, **switches)
    truth = linear_attention(*wide, **switches)
    assert y.dtype == dtype
    assert (y - truth).abs().max() <= torch.finfo(dtype).eps * truth.abs().max()
    pairs = zip(torch.autograd.grad(y.sum(), half), torch.autograd.grad(truth.sum(), wide), strict=True)
    for got, expected in pairs:
        assert got.dtype == dtype
        assert (got - expected).abs().max() <= torch.finfo(dtype).eps * expected.abs().max()


def test_inputs_of_any_layout() -> None:
    """Views as projections, heads first in memory, and heads that share keys, give what copies give."""
    q, k, v = (t.detach() for t in inputs("none", 2, 45))
    shared = k[:, :, :1].expand_as(k)
    heads_first = v.transpose(1, 2).contiguous().transpose(1, 2)
    actual = linear_attention(q.flatten(2).unflatten(-1, q.shape[2:]), shared, heads_first, feature_map="elu_plus_one")
    assert_close(actual, linear_attention(q, shared.clone(), v, feature_map="elu_plus_one", backend="dense"))


def test_backward_under_autocast_sums_in_full_precision() -> None:
    tensors = [t.detach().float().requires_grad_() for t in inputs("none", 1, 50)]
    truth = torch.autograd.grad(linear_attention(*tensors, feature_map="elu_plus_one").sum(), tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = torch.autograd.grad(linear_attention(*tensors, feature_map="elu_plus_one").sum(), tensors)
    for got, expected in zip(actual, truth, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("causality", CAUSALITIES)
def test_nothing_but_tensors_and_states_is_kept(causality: str) -> None:
    tensors = [t.detach().requires_grad_() for t in inputs("none", 1, 4000, k=4, v=4)]
    saved: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), small_blocks(2000):
        linear_attention(*tensors, causality=causality, normalize=False)
    own = {t.untyped_storage().data_ptr() for t in tensors}
    assert sum(size for place, size in saved.items() if place not in own) < tensors[0].numel() // 4


@pytest.mark.parametrize("case", OPERATORS.values(), ids=str)
def test_second_derivatives_pass_through_blocks(case: OperatorCase) -> None:
    check_second_derivatives(case, CheckInputs((37,), batch=1))


@pytest.mark.parametrize("name", ["linear_attention", "linfusion", "sana_relu", "gla", "mamba2"])
@pytest.mark.parametrize("normalize", [True, False])
def test_mixers_that_only_map_leave_it_to_the_operator(name: str, normalize: bool) -> None:
    mixer = create_mixer(name, 12, 2, normalize=normalize, **({"n_groups": 1} if name == "mamba2" else {})).double()
    x = torch.randn(2, 19, 12, dtype=torch.float64)
    streams = mixer.compute_streams(x, mixer.projections)
    *_, feature_map = mixer.operands(streams)
    q, k = mixer.features(streams)
    settings = {"causality": mixer.config.causality, "normalize": normalize, "eps": mixer.config.eps}
    truth = linear_attention(q, k, streams.v, streams.log_decay, **settings, scale=mixer.scale, backend="dense")
    assert_close(mixer.mix(streams), truth)
    assert feature_map == ("identity" if normalize and name == "mamba2" else mixer.feature_map_name(mixer.config))


def test_a_mixer_with_features_of_its_own_keeps_them() -> None:
    mixer = create_mixer("linfusion_low_rank", 12, 2)
    q, k, _, feature_map = mixer.operands(mixer.compute_streams(torch.randn(1, 5, 12), mixer.projections))
    assert feature_map == "identity" and q.shape[-1] == k.shape[-1] == mixer.features_dim
