"""Rotary embeddings: relative, with the published angles, exact at large positions."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixers.stages.rotary import rotary, rotary_2d
from mixers.testing.tolerances import assert_close


@given(
    key=st.integers(4, 11),
    start=st.integers(0, 50),
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    adjacent=st.booleans(),
)
def test_rotary_products_depend_on_differences_of_places(
    key: int, start: int, height: int, width: int, adjacent: bool
) -> None:
    q, k = torch.randn(2, key, dtype=torch.float64)
    length = height * width
    q, k = (t.expand(1, length, 2, key) for t in (q, k))
    rotated = rotary(q, adjacent=adjacent, start=start), rotary(k, adjacent=adjacent, start=start)
    products = torch.einsum("blhk,bmhk->hlm", *rotated)[0]
    for offset in range(length):
        diagonal = products.diagonal(offset)
        assert_close(diagonal, diagonal[0].expand_as(diagonal))
    rotated = rotary_2d(q, (height, width), adjacent=adjacent), rotary_2d(k, (height, width), adjacent=adjacent)
    products = torch.einsum("blhk,bmhk->hlm", *rotated)[0].view(height, width, height, width)
    for i, j in product(range(height), range(width)):
        assert_close(products[i:, j:, i:, j:], products[: height - i, : width - j, : height - i, : width - j])
    assert_close(rotated[0].norm(dim=-1), q.norm(dim=-1))


@pytest.mark.parametrize("adjacent", [True, False])
def test_rotary_angles_are_the_published_ones(adjacent: bool) -> None:
    x = torch.randn(1, 6, 1, 10, dtype=torch.float64)
    first = rotary(x, adjacent=adjacent)
    second = rotary_2d(x, (2, 3), adjacent=adjacent)
    pair, n = ((2, 3), 5) if adjacent else ((1, 6), 5)  # pair 1 of five
    angle = torch.tensor(4 * 10000 ** (-1 / n), dtype=torch.float64)
    a, b = x[0, 4, 0, list(pair)]
    assert_close(first[0, 4, 0, pair[0]], a * angle.cos() - b * angle.sin())
    assert_close(first[0, 4, 0, pair[1]], a * angle.sin() + b * angle.cos())
    # Token 5 of 2 × 3 is in row 1 and column 2; pairs 0 and 1 turn with the row, 2 and 3 with the column.
    for i, steps_away in ((0, 1), (2, 2)):
        pair = (2 * i, 2 * i + 1) if adjacent else (i, i + 4)
        angle = torch.tensor(float(steps_away), dtype=torch.float64)
        a, b = x[0, 5, 0, list(pair)]
        assert_close(second[0, 5, 0, pair[0]], a * angle.cos() - b * angle.sin())
    assert torch.equal(second[..., 8:], x[..., 8:])


def test_rotary_streams_keeps_the_dtype_and_refuses() -> None:
    x = torch.randn(1, 6, 2, 6)
    assert_close(torch.cat([rotary(x[:, :2]), rotary(x[:, 2:], start=2)], dim=1), rotary(x))
    assert torch.equal(rotary_2d(x, (2, 3))[..., 4:], x[..., 4:])
    half = rotary_2d(x.bfloat16(), (2, 3))
    assert half.dtype == torch.bfloat16
    assert_close(half, rotary_2d(x.bfloat16().float(), (2, 3)).bfloat16())
    with pytest.raises(ValueError, match="pass grid"):
        rotary_2d(x, None)
    with pytest.raises(ValueError, match="4 positions, but there are 6 tokens"):
        rotary_2d(x, (2, 2))
    with pytest.raises(ValueError, match="at least 4 channels, got 3"):
        rotary_2d(x[..., :3], (2, 3))


@pytest.mark.parametrize("position", [100_000, 4_000_000])
def test_rotary_angles_are_exact_at_large_positions(position: int) -> None:
    """float32 angles would be off by 4e-3 at 10⁵ tokens, and by 0.14 at 4·10⁶."""
    x = torch.randn(1, 1, 1, 64)
    exact = rotary(x.double(), start=position)
    assert (rotary(x, start=position) - exact).abs().max() < 1e-5


def test_inclusive_angles_end_at_one_over_base() -> None:
    """torchscale: base^linspace(0, −1); fla: base^(−i/n)."""
    x = torch.randn(1, 2, 1, 6, dtype=torch.float64)
    pair = torch.view_as_complex(x[0, 1, 0].unflatten(-1, (-1, 2)))
    for inclusive, exponents in ((True, [0, 1 / 2, 1]), (False, [0, 1 / 3, 2 / 3])):
        angles = 10000.0 ** -torch.tensor(exponents, dtype=torch.float64)
        expected = torch.view_as_real(pair * torch.polar(torch.ones_like(angles), angles)).flatten()
        assert_close(rotary(x, inclusive=inclusive)[0, 1, 0], expected)
