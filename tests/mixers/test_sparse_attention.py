"""Exact softmax over selected blocks or a window, against the papers' formulas written out in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixers import TokenMixer, create_mixer, structure
from mixers.operators import sparse
from mixers.operators.sparse import blocks, window
from mixers.testing import ConformanceCase, MixerCheck, parametrize_with_checks
from mixers.testing.tolerances import assert_close
from tests.mixers.builders import disturbed, float64

DIM = 12
HEADS = 2
WIDTH = DIM // HEADS

VARIANTS = [
    ConformanceCase("sparse_linear", "noncausal", True, options=options)
    for options in (
        {"combine": "shared"},
        {"combine": "shared", "feature_map": "relu", "kept_blocks": 2},
        {"linear_over": "all"},
        {"kept_blocks": 2, "feature_map": "elu_plus_one"},
        {"topk": 1.0},
        {"scan": "hilbert"},
        {"local_conv_size": 3},
    )
]


@parametrize_with_checks(VARIANTS)
def test_conformance_of_variants(mixer: TokenMixer, check: MixerCheck) -> None:
    check(mixer)


def built(name: str, **options: Any) -> TokenMixer:
    """A small mixer in float64, with noise added to every parameter."""
    torch.manual_seed(0)
    return disturbed(create_mixer(name, DIM, HEADS, **options), 0.3)


def projected(mixer: TokenMixer, x: Tensor) -> tuple[Tensor, ...]:
    """q, k and v of one image by head, (h, l, ·) each."""
    own = mixer.projections
    return tuple(layer(x)[0].unflatten(-1, (HEADS, -1)).transpose(0, 1) for layer in (own.to_q, own.to_k, own.to_v))


def selected_keys(q: Tensor, k: Tensor, block: int, count: int) -> list[set[int]]:
    """For every token of one head, the keys that its block selects, found by sorting products of means."""
    length = len(q)
    spans = [range(start, min(start + block, length)) for start in range(0, length, block)]
    visible: list[set[int]] = []
    for span in spans:
        query = q[list(span)].mean(0)
        products = [(query @ k[list(keys)].mean(0)).item() for keys in spans]
        best = sorted(range(len(spans)), key=products.__getitem__, reverse=True)[:count]
        visible += [{j for n in best for j in spans[n]}] * len(span)
    return visible


@pytest.mark.parametrize("linear_over", ["rest", "all"])
@pytest.mark.parametrize("feature_map", ["softmax", "elu_plus_one"])
def test_sparse_linear_is_its_published_formula(linear_over: str, feature_map: str) -> None:
    length = 23
    options = {"block_size": 4, "kept_blocks": 2, "linear_over": linear_over, "feature_map": feature_map}
    mixer = built("sparse_linear", **options)
    phi = {"softmax": lambda t: t.exp() / t.exp().sum(), "elu_plus_one": lambda t: F.elu(t) + 1}[feature_map]
    x = float64(1, length, DIM)
    layer = mixer.output.proj_l
    heads = []
    for q, k, v in zip(*projected(mixer, x), strict=True):
        rows = []
        for i, near in enumerate(selected_keys(q, k, 4, 2)):
            exact = {j: (q[i] @ k[j] / math.sqrt(WIDTH)).exp() for j in near}
            linear = {j: phi(q[i]) @ phi(k[j]) for j in range(length) if linear_over == "all" or j not in near}
            mean = sum(w * v[j] for j, w in exact.items()) / sum(exact.values())
            compensation = sum(w * v[j] for j, w in linear.items()) / (sum(linear.values()) + 1e-5 * length)
            rows.append(mean + layer.weight @ compensation + layer.bias)
        heads.append(torch.stack(rows))
    assert_close(mixer(x)[0], mixer.projections.to_out(torch.cat(heads, dim=-1)))


def test_the_shared_denominator_is_its_published_formula() -> None:
    """Attention Surgery: exponentials of the selected keys and features of the others, over one sum."""
    length = 18
    mixer = built("sparse_linear", block_size=4, kept_blocks=1, combine="shared", feature_map="elu_plus_one")
    x = float64(1, length, DIM)
    heads = []
    for q, k, v in zip(*projected(mixer, x), strict=True):
        rows = []
        for i, near in enumerate(selected_keys(q, k, 4, 1)):
            weights = [
                (q[i] @ k[j] / math.sqrt(WIDTH)).exp() if j in near else (F.elu(q[i]) + 1) @ (F.elu(k[j]) + 1)
                for j in range(length)
            ]
            total = sum(weights) + 1e-5 * length
            rows.append(sum(w * v[j] for j, w in enumerate(weights)) / total)
        heads.append(torch.stack(rows))
    assert_close(mixer(x)[0], mixer.projections.to_out(torch.cat(heads, dim=-1)))
    assert not any("proj_l" in name for name in mixer.state_dict())


@pytest.mark.parametrize("options", [{"topk": 1.0}, {"kept_blocks": 99}, {"kept_blocks": 99, "combine": "shared"}])
def test_all_blocks_selected_is_softmax_attention(options: dict[str, Any]) -> None:
    mixer = built("sparse_linear", block_size=4, **options)
    softmax = built("softmax")
    softmax.load_state_dict({n: p for n, p in mixer.state_dict().items() if n in softmax.state_dict()})
    if options.get("combine") != "shared":
        torch.nn.init.zeros_(mixer.output.proj_l.bias)
    x = float64(2, 21, DIM)
    assert_close(mixer(x), softmax(x))


def test_a_new_mixer_is_the_exact_part_alone() -> None:
    """proj_l starts at zero, so that φ and its keys have no effect, and learns from the first step on."""
    torch.manual_seed(0)
    mixer = create_mixer("sparse_linear", DIM, HEADS, block_size=4).double()
    x = float64(1, 40, DIM)
    other = create_mixer("sparse_linear", DIM, HEADS, block_size=4, feature_map="relu", linear_over="all").double()
    other.load_state_dict(mixer.state_dict())
    assert torch.equal(mixer(x), other(x))
    exact = structure.mixing_matrix(mixer, x)[:, :, 0]
    assert ((exact > 0).sum(-1) == 2 * 4).all(), "a fifth of ten blocks of four tokens"
    mixer(x).square().sum().backward()
    assert mixer.output.proj_l.weight.grad.any()


def test_the_parts_cover_each_key_once() -> None:
    """Over the rest: no key has both an exact and a linear weight, and each has one."""
    mixer = built("sparse_linear", block_size=4)
    matrix = structure.mixing_matrix(mixer, float64(1, 40, DIM))
    exact = matrix[:, :, 0] > 0
    linear = matrix[:, :, -1] > 0
    assert (exact ^ linear).all()


def test_shared_weights_survive_extreme_scores() -> None:
    """Scores far beyond the range of exponentials leave exact attention; far below it, the linear part."""
    mixer = built("sparse_linear", block_size=4, kept_blocks=1, combine="shared").float()
    x = torch.randn(1, 16, DIM)
    streams = mixer.compute_streams(x, mixer.resolve_projections(None))
    for factor in (1e3, -1e3):
        extreme = type(streams)(x, streams.k * factor, streams.k, streams.v)
        y = mixer.mix(extreme)
        assert y.isfinite().all()
        assert_close(torch.einsum("bhij,bjhv->bihv", mixer.mixing_matrix(extreme), streams.v), y)


def test_subtracting_blocks_keeps_float32() -> None:
    """The state of the rest is the total minus the selected blocks: 4,096 tokens, of which most are selected."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4096, 2, 8) for _ in range(3))
    features = [t.softmax(-1) for t in (q, k)]
    selected = sparse.select_key_blocks(q, k, 64, 60)
    single = sparse.linear_sums(*features, v, 64, selected)
    double = sparse.linear_sums(*(t.double() for t in features), v.double(), 64, selected)
    for actual, expected in zip(single[:2], double[:2], strict=True):
        assert_close(actual, expected, torch.float32)


@pytest.mark.parametrize("combine", ["project", "shared"])
def test_bands_of_query_blocks_change_nothing(combine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mixer = built("sparse_linear", block_size=4, combine=combine)
    x = float64(2, 45, DIM).requires_grad_()
    outcomes = []
    for elements in (blocks.BAND_ELEMENTS, 1):
        monkeypatch.setattr(blocks, "BAND_ELEMENTS", elements)
        y = mixer(x)
        outcomes.append((y, *torch.autograd.grad(y.square().sum(), x)))
    for at_once, in_bands in zip(*outcomes, strict=True):
        assert_close(in_bands, at_once)


def test_cost_is_linear_but_for_the_selection() -> None:
    """With a fixed number of blocks; the selection costs as much as the exact part at l = 2 · kept_blocks · B³."""
    mixer = built("sparse_linear", block_size=8, kept_blocks=3)
    near, far = (mixer.mixing_flops(length) - mixer.selection_flops(length) for length in (1024, 4096))
    assert far == 4 * near
    length = 2 * 3 * 8**3
    exact = 4 * length * 3 * 8 * DIM
    assert mixer.selection_flops(length) == exact
    share = built("sparse_linear", block_size=8, topk=0.25)
    near, far = (share.mixing_flops(length) for length in (1024, 4096))
    assert far > 15 * near


def test_memory_for_gradients_is_linear() -> None:
    """No tensor that is saved for the backward pass has l² elements."""
    mixer = built("sparse_linear", block_size=16, kept_blocks=2)

    def saved_elements(length: int) -> int:
        total = 0

        def record(t: Tensor) -> Tensor:
            nonlocal total
            total += t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(record, lambda t: t):
            mixer(float64(1, length, DIM))
        return total

    assert saved_elements(1024) < 4.2 * saved_elements(256)


GRIDS = [(7, 9), (16, 16), (1, 40), (40, 1), (5, 23)]


@pytest.mark.parametrize("causality", ["noncausal", "causal"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("radius", [1, 2, 3, 5])
def test_the_window_is_softmax_in_a_circle(grid: tuple[int, int], radius: int, causality: str) -> None:
    """The result and its gradients, token by token."""
    length = grid[0] * grid[1]
    q, k, v = (float64(2, length, HEADS, 4).requires_grad_() for _ in range(3))
    rows = []
    for i in range(length):
        near = [
            j
            for j in range(length)
            if math.dist(divmod(i, grid[1]), divmod(j, grid[1])) < radius and (causality == "noncausal" or j <= i)
        ]
        weights = (torch.einsum("bhk,bjhk->bhj", q[:, i], k[:, near]) / 2).softmax(-1)
        rows.append(torch.einsum("bhj,bjhv->bhv", weights, v[:, near]))
    expected = torch.stack(rows, dim=1)
    y = window.window_attention(q, k, v, grid, radius, causality)
    assert_close(y, expected)
    weighting = float64(*y.shape)
    for actual, truth in zip(*(torch.autograd.grad(t, (q, k, v), weighting) for t in (y, expected)), strict=True):
        assert_close(actual, truth)
    matrix = window.window_attention_matrix(q, k, grid, radius, causality)
    assert_close(torch.einsum("bhij,bjhv->bihv", matrix, v), expected)


def test_bands_of_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = (19, 21)
    q, k, v = (float64(2, 19 * 21, HEADS, 4) for _ in range(3))
    at_once = window.window_attention(q, k, v, grid, 3)
    monkeypatch.setattr(window, "BAND_ELEMENTS", 1)
    assert_close(window.window_attention(q, k, v, grid, 3), at_once)


def test_the_largest_window_is_softmax_attention_and_the_smallest_is_none() -> None:
    x = float64(2, 63, DIM)
    wide = built("softmax_window", radius=12)  # the diagonal of a 7 × 9 image is 10
    softmax = built("softmax")
    softmax.load_state_dict(wide.state_dict())
    assert_close(wide(x, grid=(7, 9)), softmax(x))
    alone = built("softmax_window", radius=1)
    identity = built("identity")
    identity.load_state_dict({n: p for n, p in alone.state_dict().items() if n in identity.state_dict()})
    assert_close(alone(x, grid=(7, 9)), identity(x))


def test_a_causal_window_never_looks_ahead() -> None:
    mixer = built("softmax_window", radius=3, causality="causal")
    x = float64(1, 144, DIM)
    changed = x.clone()
    changed[:, 70:] += 1
    before = mixer(x, grid=(12, 12))
    after = mixer(changed, grid=(12, 12))
    assert torch.equal(before[:, :70], after[:, :70]) and not torch.equal(before[:, 70], after[:, 70])


def test_the_window_sees_as_far_as_its_radius() -> None:
    """Equal keys weigh the disk equally: the effective radius is that of the disk."""
    mixer = built("softmax_window", radius=4)
    torch.nn.init.zeros_(mixer.projections.to_k.weight)
    grid = (15, 15)
    matrix = structure.mixing_matrix(mixer, float64(1, 225, DIM), grid=grid)
    middle = structure.effective_radius(matrix, grid)[0, 0, 112]
    squares = [y * y + x * x for y in range(-4, 5) for x in range(-4, 5) if y * y + x * x < 16]
    assert_close(middle, torch.tensor(sum(squares) / len(squares)).double().sqrt(), torch.float32)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sparse_linear", {"block_size": 0}, "block_size ≥ 1"),
        ("sparse_linear", {"topk": 0.0}, "0 < topk ≤ 1"),
        ("sparse_linear", {"eps": 0.0}, "eps > 0"),
        ("sparse_linear", {"kept_blocks": 0}, "kept_blocks ≥ 1"),
        ("sparse_linear", {"combine": "shard"}, "Did you mean 'shared'"),
        ("sparse_linear", {"feature_map": "identity"}, "expected one of"),
        ("sparse_linear", {"combine": "shared", "linear_over": "all"}, "count the selected keys twice"),
        ("sparse_linear", {"causality": "causal"}, "come later than the query"),
        ("softmax_window", {"radius": 0}, "radius ≥ 1"),
        ("softmax_window", {"scan": "column"}, "raster order"),
        ("softmax_window", {"normalize": False}, "unbounded"),
    ],
)
def test_what_has_no_meaning_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer(name, DIM, HEADS, **options)


def test_the_window_needs_the_grid() -> None:
    with pytest.raises(ValueError, match="pass grid"):
        built("softmax_window")(float64(1, 4, DIM))
