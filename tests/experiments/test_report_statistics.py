"""Intervals over seeds, paired differences, effects of factors: identities before numbers."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.config import Claim
from experiments.report.effects import OTHERS, SPLITS, Factor, effects
from experiments.report.finding import find
from experiments.report.points import front
from experiments.report.records import Run
from experiments.report.statistics import Interval, bootstrap, log_ratios, mean_by_seed
from experiments.report.tables import effects_table
from tests.experiments.runs import run_of

values = st.lists(st.floats(-10, 10), min_size=1, max_size=8)


@given(values, st.randoms())
def test_the_order_of_seeds_does_not_matter(found: list[float], random) -> None:  # type: ignore[no-untyped-def]
    other = list(found)
    random.shuffle(other)
    assert bootstrap(found) == bootstrap(other)


@given(values, st.floats(-5, 5), st.floats(0.1, 5))
def test_intervals_move_and_stretch_with_their_values(found: list[float], shift: float, scale: float) -> None:
    before, after = bootstrap(found), bootstrap([shift + scale * v for v in found])
    for name in ("mean", "low", "high"):
        assert getattr(after, name) == pytest.approx(shift + scale * getattr(before, name), abs=1e-9)


@given(values)
def test_an_interval_lies_within_its_values_around_the_mean(found: list[float]) -> None:
    interval = bootstrap(found)
    assert min(found) - 1e-12 <= interval.low <= interval.mean + 1e-12
    assert interval.mean - 1e-12 <= interval.high <= max(found) + 1e-12
    assert interval.seeds == len(found)


@given(st.floats(-3, 3), st.integers(1, 8))
def test_equal_values_have_no_width_and_mark_what_they_differ_from(value: float, count: int) -> None:
    interval = bootstrap([value] * count)
    assert interval.low == interval.high
    assert interval.excludes(value + 1) is (count > 1) and not interval.excludes(interval.mean)


def test_three_seeds_are_marked_exactly_where_all_agree() -> None:
    assert bootstrap([0.1, 0.2, 3.0]).excludes(0)
    assert not bootstrap([-0.01, 0.2, 3.0]).excludes(0)
    assert bootstrap([1.0, 2.0, 6.0]) == Interval(3.0, 1.0, 6.0, 3)


def test_intervals_of_ten_seeds_hold_the_true_mean_about_as_often_as_they_say() -> None:
    draw = np.random.default_rng(0)
    inside = [not bootstrap(draw.normal(1.0, 1.0, 10).tolist()).excludes(1.0) for _ in range(300)]
    assert 0.85 < np.mean(inside) < 0.97  # percentile intervals of few values are known to be somewhat narrow


def test_intervals_of_three_seeds_hold_the_true_mean_three_times_in_four() -> None:
    draw = np.random.default_rng(1)
    inside = [not bootstrap(draw.normal(1.0, 1.0, 3).tolist()).excludes(1.0) for _ in range(1000)]
    assert 0.7 < np.mean(inside) < 0.8  # what docs/howto/read_a_report.md says


def test_what_is_not_finite_is_never_marked() -> None:
    for bad in (math.nan, math.inf):
        interval = bootstrap([1.0, bad])
        assert math.isnan(interval.mean) and not interval.excludes(0)
    with pytest.raises(ValueError, match="got none"):
        bootstrap([])


def test_pairs_are_of_one_seed() -> None:
    assert log_ratios({0: 2.0, 1: 8.0}, {1: 2.0, 2: 5.0}) == {1: pytest.approx(math.log(4))}
    assert mean_by_seed([{0: 1.0, 1: 2.0}, {1: 4.0, 2: 9.0}]) == [3.0]
    assert mean_by_seed([]) == []


def made_up(noise: float = 0.0) -> Run:
    """Errors 2^(not normalized) · 3^(causal) · 5^(mamba2), with each seed's own factor, and noise if asked for."""
    draw, rows = np.random.default_rng(0), {}
    for mixer in ("linear_attention", "mamba2"):
        for causality in ("noncausal", "causal"):
            for normalize in (True, False):
                error = 0.01 * 2 ** (not normalize) * 3 ** (causality == "causal") * 5 ** (mixer == "mamba2")
                errors = {s: {64: error * (1 + s) * math.exp(noise * draw.normal())} for s in range(3)}
                rows[mixer, causality, normalize] = errors
    return run_of(rows)


def test_effects_are_the_factors_of_the_errors() -> None:
    found = {(e.factor, e.value): e for e in effects(made_up())}
    expected = {("normalization", "not normalized"): 2, ("causality", "causal"): 3, ("mixer", "mamba2"): 5}
    assert not any(e.depends for e in found.values())
    assert found.keys() == expected.keys()
    for key, ratio in expected.items():
        effect = found[key]
        assert effect.ratio.mean == pytest.approx(ratio) and effect.ratio.low == pytest.approx(effect.ratio.high)
        assert effect.marked and len(effect.pairs) == 4
        assert all(pair.ratio.mean == pytest.approx(ratio) for pair in effect.pairs)


def opposed(mixers: tuple[str, str]) -> Run:
    """Causal is twice as good with the one mixer and eight times worse with the other."""
    rows = {}
    for mixer, factor in zip(mixers, (0.5, 8.0), strict=True):
        for causality in ("noncausal", "causal"):
            error = 0.01 * (factor if causality == "causal" else 1)
            rows[mixer, causality, True] = {s: {64: error * (1 + s)} for s in range(3)}
    return run_of(rows)


def test_an_effect_that_goes_both_ways_depends_on_what_splits_it() -> None:
    run = opposed(("linear_attention", "mamba2"))
    (effect,) = (e for e in effects(run) if e.value == "causal")
    assert effect.ratio.mean == pytest.approx(2) and effect.depends == "mixer"
    parts = effect.among("mixer")
    assert [e.ratio.mean for e in parts.values()] == pytest.approx([0.5, 8.0])
    assert all(len(e.pairs) == 1 for e in parts.values())
    assert not effect.among("causality") and not effect.among("normalize")
    claim = Claim(statement="causal is worse", factor="causality", value="causal", worse=True)
    run.grid["claims"] = [claim.model_dump()]
    found = find(run)
    assert found.verdicts[0].state == "depends on the other factors"
    assert any("depends on the mixer: 0.500× [0.500, 0.500]" in s for s in found.sentences)


@given(st.permutations([0, 1, 2]))
def test_parts_make_up_the_whole_whatever_the_order_of_seeds(order: list[int]) -> None:
    run = made_up(noise=0.3)
    run.cells.sort(key=lambda c: order.index(c.seed or 0))
    for effect, other in zip(effects(run), effects(made_up(noise=0.3)), strict=True):
        assert effect.ratio == other.ratio
        for field in SPLITS:
            parts = effect.among(field).values()
            logs = [len(e.pairs) * math.log(e.ratio.mean) for e in parts]
            assert not parts or sum(logs) / len(effect.pairs) == pytest.approx(math.log(effect.ratio.mean))


def test_an_effect_is_marked_exactly_where_its_interval_excludes_none() -> None:
    loud, quiet = effects(made_up(noise=30.0)), effects(made_up(noise=0.1))
    assert all(e.marked is not (e.ratio.low <= 1 <= e.ratio.high) for e in (*loud, *quiet))
    assert all(e.marked for e in quiet) and not all(e.marked for e in loud)


@given(st.sampled_from((0.4, 1.0, 3.0)), st.sampled_from((0.4, 1.0, 3.0)))
def test_a_row_as_wrong_as_zeros_is_no_reference(first: float, second: float) -> None:
    rows = {}
    for mixer, error in (("linear_attention", first), ("mamba2", second)):
        for causality, factor in (("noncausal", 1.0), ("causal", 0.1)):
            rows[mixer, causality, False] = {seed: {64: error * factor * (1 + seed / 9)} for seed in (-1, 0, 1)}
    found = [e for e in effects(run_of(rows)) if e.value == "causal"]
    sound = [error < 1 for error in (first, second)]
    assert len(found) == any(sound)
    for effect in found:
        assert (len(effect.pairs), effect.hopeless) == (sum(sound), 2 - sum(sound))
        told = find(run_of(rows)).sentences
        assert all(sound) is not any("as wrong as a prediction of zeros" in sentence for sentence in told)


def test_whatever_else_rows_differ_in_is_an_effect_of_its_own() -> None:
    run = made_up()
    run.variants = [replace(v, options={"rank": 1 + n}) for n, v in enumerate(run.variants)]
    assert not effects(run), "these differ in two things each"
    first = run.variants[0]
    run.variants += [
        replace(first, name=f"other {n}", label=f"rank {n}", **{field: n})
        for n, field in enumerate(("options", "select", "min_tokens", "distillation"))
    ]
    run.cells += [
        replace(cell, variant=f"other {n}", fidelity={64: replace(cell.fidelity[64], relative_error_to_teacher=0.5)})
        for n in range(4)
        for cell in run.done(first.name)
    ]
    found = effects(run)
    assert [(e.above, e.below, len(e.pairs)) for e in found] == [(f"rank {n}", first.label, 1) for n in range(4)]
    assert {e.factor for e in found} == set(OTHERS.values())
    assert "rather than" in find(run).sentences[0]


def test_pairs_are_told_apart_where_one_factor_does_not() -> None:
    run = made_up()
    (causal,) = (e for e in effects(run) if e.value == "causal")
    assert {key: len(e.pairs) for key, e in causal.parts("mixer", "normalize").items()} == {
        (mixer, normalize): 1 for mixer in ("linear_attention", "mamba2") for normalize in (True, False)
    }
    for cell in run.cells:
        (fidelity,) = cell.fidelity.values()
        lost = 9.0 if "unnormalized" in cell.variant else fidelity.relative_error_to_teacher
        cell.fidelity[128] = replace(fidelity, size=128, relative_error_to_teacher=lost)
    table = {(row.label, row.entries[0].text): row.entries for row in effects_table(run, effects(run)).rows}
    for among in ("linear_attention", "normalized", "linear_attention, normalized", "mamba2, normalized"):
        _, small, large, *_ = table["causal ÷ non-causal", among]
        assert small.text[0] == large.text[0] == "▲", "also where at a size no other rows are left"
    assert table["causal ÷ non-causal", "not normalized"][2].text == "–"
    alone = effects(opposed(("linear_attention", "mamba2")))
    rows = effects_table(run, [e for e in alone if e.value == "causal"]).rows
    assert [row.entries[0].text for row in rows] == ["all rows", "linear_attention", "mamba2"]


def test_a_claim_that_no_row_speaks_of_is_said_to_be_not_asked() -> None:
    run = made_up()
    run.grid["claims"] = [Claim(statement="order", factor="causality", value="bidirectional", worse=True).model_dump()]
    assert [v.state for v in find(run).verdicts] == ["not asked"]


def test_the_plain_mixer_is_the_reference_of_families() -> None:
    from experiments.report import effects as module

    (factor,) = module._families(made_up())
    assert isinstance(factor, Factor) and factor.reference == "linear_attention"


@given(st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)), min_size=1, max_size=12))
def test_nothing_beats_the_front(points: list[tuple[float, float]]) -> None:
    best = front(points)
    assert best and set(best) <= set(points)
    for cost, error in best:
        assert not any((c <= cost and e < error) or (c < cost and e <= error) for c, e in points)
    for cost, error in set(points) - set(best):
        assert any(c <= cost and e <= error for c, e in best)
