"""Confidence intervals: identities before numbers, and that they cover what they say."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.core.statistics import (
    Interval,
    bootstrap_interval,
    crossed_interval,
    holm,
    interval_over_seeds,
    log_ratios,
)

tables = st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(0, 1000)).map(
    lambda key: np.random.default_rng(key[2]).normal(1.0, 1.0, key[:2])
)


@given(tables, st.integers(0, 100))
def test_the_order_of_seeds_and_images_does_not_matter(table: np.ndarray, seed: int) -> None:
    random = np.random.default_rng(seed)
    other = table[random.permutation(len(table))][:, random.permutation(table.shape[1])]
    a = crossed_interval(table)
    b = crossed_interval(other)
    assert a.count == b.count
    for name in ("mean", "low", "high"):
        assert getattr(a, name) == pytest.approx(getattr(b, name), rel=1e-9, nan_ok=True)


@given(tables, st.floats(-5, 5), st.floats(0.1, 5))
def test_intervals_move_and_scale_with_their_values(table: np.ndarray, shift: float, scale: float) -> None:
    before = crossed_interval(table)
    after = crossed_interval(shift + scale * table)
    for name in ("mean", "low", "high"):
        expected = shift + scale * getattr(before, name)
        assert getattr(after, name) == pytest.approx(expected, rel=1e-7, abs=1e-7, nan_ok=True)


def test_an_interval_over_seeds_is_students_t() -> None:
    interval = crossed_interval([1.0, 2.0, 6.0])
    half = 4.302652729911275 * math.sqrt(7 / 3)  # t(0.975, 2) · s / √3, with s² = 7
    assert interval.mean == 3.0 and interval.count == 3
    assert interval.low == pytest.approx(3 - half) and interval.high == pytest.approx(3 + half)


def test_a_single_seed_gives_no_interval() -> None:
    interval = crossed_interval(np.ones((1, 50)))
    assert interval.mean == 1.0 and not interval.has_bounds and math.isnan(interval.p_value)
    assert not interval.excludes(0.0)
    assert not bootstrap_interval([1.0]).has_bounds


@given(tables.filter(lambda table: len(table) > 1), st.floats(-3, 3))
def test_the_p_value_is_below_five_percent_exactly_if_the_interval_excludes_zero(
    table: np.ndarray, shift: float
) -> None:
    interval = crossed_interval(table + shift)
    assert (interval.p_value < 0.05) == interval.excludes(0.0)


@given(st.floats(-3, 3), st.integers(2, 8))
def test_equal_values_have_no_width_and_differ_from_all_other_numbers(value: float, count: int) -> None:
    for interval in (crossed_interval([value] * count), bootstrap_interval([value] * count)):
        assert interval.low == interval.high == interval.mean
        assert interval.excludes(value + 1) and not interval.excludes(interval.mean)


@pytest.mark.parametrize(
    ("seeds", "images", "between_seeds", "between_images"),
    [(3, 1, 1.0, 0.0), (3, 32, 1.0, 1.0), (5, 32, 0.2, 1.0), (3, 8, 0.1, 3.0)],
)
def test_intervals_cover_the_true_mean_at_least_as_often_as_they_say(
    seeds: int, images: int, between_seeds: float, between_images: float
) -> None:
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        rows = random.normal(0, between_seeds, (seeds, 1))
        columns = random.normal(0, between_images, (1, images))
        covered += not crossed_interval(rows + columns + random.normal(0, 0.5, (seeds, images))).excludes(0.0)
    assert covered / 400 > 0.93


def test_bootstrap_intervals_of_many_values_cover_the_mean() -> None:
    random = np.random.default_rng(0)
    covered = [not bootstrap_interval(random.normal(1.0, 1.0, 64).tolist()).excludes(1.0) for _ in range(200)]
    assert 0.88 < np.mean(covered) < 0.99


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=20), st.randoms())
def test_bootstrap_intervals_do_not_depend_on_the_order(values: list[float], random) -> None:  # type: ignore[no-untyped-def]
    other = list(values)
    random.shuffle(other)
    interval = bootstrap_interval(values)
    assert bootstrap_interval(other) == interval
    assert min(values) - 1e-9 <= interval.low <= interval.high <= max(values) + 1e-9


def test_values_that_are_not_finite_give_no_interval() -> None:
    for bad in (math.nan, math.inf):
        for interval in (crossed_interval([1.0, bad]), bootstrap_interval([1.0, bad])):
            assert math.isnan(interval.mean) and not interval.excludes(0)
    for function in (crossed_interval, bootstrap_interval):
        with pytest.raises(ValueError, match="no values"):
            function([])


def test_holms_adjustment() -> None:
    assert holm([0.01, 0.04, math.nan, 0.03])[:2] == pytest.approx([0.03, 0.06])
    assert holm([0.01, 0.04, math.nan, 0.03])[3] == pytest.approx(0.06), "never smaller than one before it"
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []
    assert math.isnan(holm([math.nan])[0])


def test_log_ratios_are_of_one_seed_and_image() -> None:
    above = {0: np.array([2.0, 4.0]), 1: np.array([8.0, 8.0])}
    below = {1: np.array([2.0, 4.0]), 2: np.array([5.0, 5.0])}
    logs = log_ratios(above, below)
    assert list(logs) == [1] and logs[1] == pytest.approx([math.log(4), math.log(2)])
    assert interval_over_seeds(logs).exp().mean == pytest.approx(math.sqrt(8))


def test_ratios_of_an_interval() -> None:
    ratio = Interval(0.0, math.log(0.5), math.log(2.0), 3, 0.9).exp()
    assert (ratio.mean, ratio.low, ratio.high) == pytest.approx((1.0, 0.5, 2.0)) and ratio.p_value == 0.9
