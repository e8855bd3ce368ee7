"""What a matrix has, on matrices whose answers are known by hand, and on mixers whose answers are known by theory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixers import create_mixer, structure
from mixers.operators import linear_attention_matrix
from mixers.stages.scan_orders import SCANS
from mixers.testing.tolerances import assert_close


def test_triangularity_of_known_matrices() -> None:
    past, own, future = structure.triangularity(torch.ones(2, 4, 4))
    assert_close(past, torch.full((2,), 6 / 16))
    assert_close(own, torch.full((2,), 4 / 16))
    assert_close(future, past)
    assert structure.triangularity(-torch.ones(4, 4).tril()).future == 0
    assert structure.triangularity(torch.eye(3)).own == 1


@given(state=st.integers(1, 4), length=st.integers(2, 12), seed=st.integers(0, 100))
def test_semiseparable_rank_is_at_most_the_state(state: int, length: int, seed: int) -> None:
    """SSD with n states: every block below the diagonal has rank ≤ n, whatever the rank of the whole."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(1, length, 1, state, dtype=torch.float64, generator=generator) for _ in range(2))
    decay = -torch.rand(1, length, 1, dtype=torch.float64, generator=generator)
    settings = {"normalize": False, "eps": 0.0, "scale": 1.0}
    causal = linear_attention_matrix(q, k, decay, causality="causal", **settings)
    lower, upper = structure.semiseparable_rank(causal)
    assert lower.max() <= min(state, length // 2) and upper.max() == 0
    both = linear_attention_matrix(q, k, decay, causality="bidirectional", **settings)
    assert max(r.max() for r in structure.semiseparable_rank(both)) <= state


def test_a_full_matrix_has_full_blocks() -> None:
    lower, upper = structure.semiseparable_rank(torch.randn(8, 8, dtype=torch.float64))
    assert (lower, upper) == (4, 4)


def test_the_receptive_field_is_the_row_as_an_image() -> None:
    matrix = torch.zeros(6, 6)
    matrix[4, 1] = -3.0
    field = structure.receptive_field(matrix, (2, 3))
    assert field.shape == (6, 2, 3)
    assert field[4, 0, 1] == 1 and field[4].sum() == 1
    assert (field[0] == 0).all()


@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (4, 4)])
def test_the_radius_of_known_matrices(grid: tuple[int, int]) -> None:
    height, width = grid
    length = height * width
    assert (structure.effective_radius(torch.eye(length), grid) == 0).all()
    uniform = torch.ones(length, length, dtype=torch.float64)
    rows = torch.arange(height)
    columns = torch.arange(width)
    expected = ((rows**2).double().mean() + (columns**2).double().mean()).sqrt()  # of the token in the corner
    assert_close(structure.effective_radius(uniform, grid)[0], expected)
    offsets = [(torch.arange(n).double() - (n - 1) / 2).square() for n in grid]
    everywhere = (offsets[0][:, None] + offsets[1] + (height**2 + width**2 - 2) / 12).sqrt()
    assert_close(structure.effective_radius(uniform, grid), everywhere.flatten())
    neighbors = torch.diag(torch.ones(length - 1), 1) if length > 1 else torch.zeros(1, 1)
    assert structure.effective_radius(neighbors, grid)[0] == (1.0 if length > 1 else 0.0)


def test_decay_shortens_what_a_token_sees() -> None:
    x = torch.randn(1, 36, 12, dtype=torch.float64)
    radii = []
    for exponent in (1.0, 3.0, 6.0):
        mixer = create_mixer("retnet", 12, 2, rotary=False, normalize=True, first_exponent=exponent).double()
        radii.append(structure.effective_radius(structure.mixing_matrix(mixer, x), (6, 6)).mean())
    assert radii == sorted(radii) and radii[0] < radii[2]


def test_a_cross_scan_is_the_mean_of_its_two_orders() -> None:
    x = torch.randn(1, 12, 12, dtype=torch.float64)
    matrices = {}
    for scan in ("raster", "column", "cross"):
        torch.manual_seed(0)
        mixer = create_mixer("linear_attention", 12, 2, causality="causal", scan=scan).double()
        matrices[scan] = structure.mixing_matrix(mixer, x, grid=(3, 4))
    assert_close(matrices["cross"], (matrices["raster"] + matrices["column"]) / 2)
    assert structure.is_causal(matrices["raster"]) and not structure.is_causal(matrices["column"])


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("name", ["linear_attention", "gla", "mamba"])
def test_both_routes_agree_in_every_scan_order(name: str, scan: str) -> None:
    """The conformance suite reads in raster order; this is the way back from the others."""
    torch.manual_seed(0)
    mixer = create_mixer(name, 12, 2, causality="causal", scan=scan).double()
    x = torch.randn(2, 6, 12, dtype=torch.float64)
    formula = structure.mixing_matrix(mixer, x, grid=(2, 3))
    formula = formula if formula.ndim == 5 else formula[:, :, None]
    probed = structure.probed_matrix(mixer, x, grid=(2, 3))
    assert_close(formula.expand_as(probed), probed)


def test_the_matrix_has_gradients_through_a_cross_scan() -> None:
    mixer = create_mixer("gla", 12, 2, causality="causal", scan="cross").double()
    x = torch.randn(1, 6, 12, dtype=torch.float64, requires_grad=True)
    structure.mixing_matrix(mixer, x, grid=(2, 3)).square().sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_measures_take_a_matrix_for_every_value_channel() -> None:
    grid = (2, 3)
    generator = torch.Generator().manual_seed(0)
    many = torch.randn(2, 1, 3, 6, 6, dtype=torch.float64, generator=generator)
    many[0] = many[0].tril()
    one = many[1, 0, 2]
    for measure in (structure.numerical_rank, structure.row_sums):
        assert_close(measure(many)[1, 0, 2].double(), measure(one).double())
    for measure in (structure.triangularity, structure.semiseparable_rank):
        for measured, expected_value in zip(measure(many), measure(one), strict=True):
            assert measured.shape == (2, 1, 3)
            assert_close(measured[1, 0, 2].double(), expected_value.double())
    assert structure.receptive_field(many, grid).shape == (2, 1, 3, 6, *grid)
    assert_close(structure.effective_radius(many, grid)[1, 0, 2], structure.effective_radius(one, grid))
