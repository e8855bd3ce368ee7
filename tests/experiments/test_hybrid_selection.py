"""The selection of sites is exact, its errors are those of `fidelity`, and the command runs from end to end."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from experiments.bench.attention_layer import STOCK
from experiments.cli import app
from experiments.config import MixerSpec
from experiments.core.progress import ignore_progress
from experiments.distill import DistillationContext, build_student, open_context
from experiments.metrics import metric_class
from experiments.metrics.inputs.student import EvaluatedStudent
from experiments.studies.hybrid_selection import HybridConfig, SelectionGoal, parse_goal, run_selection
from experiments.studies.hybrid_selection.config import split_images
from experiments.studies.hybrid_selection.knapsack import SiteAlternative, best_within, pareto_front
from experiments.studies.hybrid_selection.measure import SizeTimes, measure_errors, measure_times
from experiments.studies.hybrid_selection.selection import (
    HybridMeasurements,
    pareto_selections,
    rule_selections,
    select_hybrid,
)
from experiments.studies.hybrid_selection.students import combine_students
from experiments.teacher.load import open_teacher
from unet_adapters import MixerAdapter
from unet_adapters.hosts import find_host

MIXERS = ("linear_attention", "identity")
TINY_SETTINGS = [
    "distillation.fit.steps=2",
    "distillation.fit.batch_size=2",
    "distillation.images=4",
    "evaluation.images=4",
    "evaluation.timesteps=[500]",
    "repeats=1",
    "random_selections=1",
]

# --- the knapsack -------------------------------------------------------------------------------------------------

ALTERNATIVES = st.lists(
    st.builds(SiteAlternative, st.integers(0, 30), st.integers(0, 1000).map(lambda n: n / 64)), min_size=1, max_size=4
)


@given(st.lists(ALTERNATIVES, max_size=5), st.integers(0, 160))
def test_the_knapsack_is_exact(sites: list[list[SiteAlternative]], limit: int) -> None:
    sums = [(sum(a.cost for a in choice), sum(a.error for a in choice)) for choice in itertools.product(*sites)]
    feasible = [error for cost, error in sums if cost <= limit]
    front = pareto_front(sites)
    best = best_within(front, limit)
    if not feasible:
        assert best is None
        return
    assert best is not None and best.error == min(feasible)
    choice = [alternatives[pick] for alternatives, pick in zip(sites, best.picks, strict=True)]
    assert (best.cost, best.error) == (sum(a.cost for a in choice), sum(a.error for a in choice))
    assert best.cost <= limit


@given(st.lists(ALTERNATIVES, min_size=1, max_size=5))
def test_the_front_has_no_dominated_point(sites: list[list[SiteAlternative]]) -> None:
    front = pareto_front(sites)
    assert all(a.cost < b.cost and a.error > b.error for a, b in itertools.pairwise(front))
    for choice in itertools.product(*sites):
        cost = sum(a.cost for a in choice)
        error = sum(a.error for a in choice)
        assert any(point.cost <= cost and point.error <= error for point in front)


# --- selections ---------------------------------------------------------------------------------------------------


def random_measurements(seed: int, sites: int = 4, sizes: tuple[int, ...] = (64, 128)) -> HybridMeasurements:
    """Numbers of a UNet whose mixers win at some sites and sizes and lose at others; times are 1/20,000 of a pass."""
    chance = random.Random(seed)
    names = tuple(f"block.{number}" for number in range(sites))
    levels = {name: 2 ** chance.randrange(3) for name in names}
    errors = {
        mixer: {name: {size: [chance.random() for _ in range(3)] for size in sizes} for name in names}
        for mixer in MIXERS
    }
    times = {}
    for size in sizes:
        seconds = {kind: {name: chance.randrange(1, 400) / 20_000 for name in names} for kind in (STOCK, *MIXERS)}
        tokens = {name: (size // 4 // levels[name]) ** 2 for name in names}
        times[size] = SizeTimes(tokens=tokens, seconds=seconds, forward=1.0)
    return HybridMeasurements(names, errors, times)


def all_assignments(measurements: HybridMeasurements) -> list[dict[str, str]]:
    """Every choice of a mixer, or none, at every site."""
    choices = itertools.product((None, *MIXERS), repeat=len(measurements.sites))
    pairs = [zip(measurements.sites, choice, strict=True) for choice in choices]
    return [{site: mixer for site, mixer in pair if mixer is not None} for pair in pairs]


@pytest.mark.parametrize("seed", range(12))
def test_a_budget_is_met_with_the_least_error(seed: int) -> None:
    measurements = random_measurements(seed)
    budget = 1.005
    assignments = all_assignments(measurements)
    fastest = min(measurements.seconds(each, 128) for each in assignments)
    feasible = [each for each in assignments if measurements.seconds(each, 128) <= budget * fastest + 1e-9]
    least = min(measurements.summed_error(each) for each in feasible)
    try:
        selection = select_hybrid(measurements, SelectionGoal(budget=budget))
    except ValueError:
        assert least == 0
        return
    assert measurements.seconds(selection.assignment, 128) <= budget * fastest + 1e-9
    assert measurements.summed_error(selection.assignment) == pytest.approx(least)


@pytest.mark.parametrize("keep", [0.0, 0.25, 0.5, 0.74])
def test_a_share_is_kept_with_the_least_error(keep: float) -> None:
    measurements = random_measurements(3)
    selection = select_hybrid(measurements, SelectionGoal(keep=keep))
    limit = int(keep * 4)
    assert len(measurements.sites) - len(selection.assignment) == limit
    least = min(measurements.summed_error(each) for each in all_assignments(measurements) if len(each) >= 4 - limit)
    assert measurements.summed_error(selection.assignment) == pytest.approx(least)


@pytest.mark.parametrize("seed", range(12))
def test_no_selection_is_slower_than_stock_at_any_size(seed: int) -> None:
    measurements = random_measurements(seed)
    for assignment in [*all_assignments(measurements), *(front[2] for front in pareto_selections(measurements))]:
        for size in measurements.sizes:
            assert measurements.seconds(assignment, size) <= measurements.seconds({}, size) + 1e-12


def test_rules_keep_as_many_sites_or_meet_the_budget() -> None:
    measurements = random_measurements(5, sites=8)
    goal = SelectionGoal(keep=0.25)
    rules = list(rule_selections(measurements, goal, select_hybrid(measurements, goal), 3))
    assert [rule.name for rule in rules[:3]] == ["every n-th", "first and last", "fewest tokens"]
    assert len(rules) == 6 and all(len(rule.assignment) == 6 for rule in rules)
    first_and_last = set(measurements.sites) - set(rules[1].assignment)
    assert first_and_last == {"block.0", "block.7"}
    goal = SelectionGoal(budget=1.01)
    limit = 1.01 * pareto_selections(measurements)[0][0]
    for rule in rule_selections(measurements, goal, select_hybrid(measurements, goal), 3):
        assert measurements.seconds(rule.assignment, 128) <= limit


def test_goals_are_parsed_and_checked() -> None:
    assert parse_goal("25%", None) == parse_goal("0.25", None) == SelectionGoal(keep=0.25)
    assert parse_goal(None, "1.5x") == parse_goal(None, "1.5") == SelectionGoal(budget=1.5)
    for keep, budget in [(None, None), ("25%", "1.5x"), ("100%", None), (None, "0.5x"), ("some", None), (None, "nan")]:
        with pytest.raises(ValueError, match="Cannot"):
            parse_goal(keep, budget)


def test_nothing_to_select_is_reported() -> None:
    measurements = random_measurements(0)
    slow = {size: times.model_copy(deep=True) for size, times in measurements.times.items()}
    for times in slow.values():
        times.seconds |= {mixer: {site: 1.0 for site in measurements.sites} for mixer in MIXERS}
    with pytest.raises(ValueError, match="no mixer is faster than softmax attention at 128 px"):
        select_hybrid(HybridMeasurements(measurements.sites, measurements.errors, slow), SelectionGoal(budget=2))
    with pytest.raises(ValueError, match="within the budget of 100x"):
        select_hybrid(measurements, SelectionGoal(budget=100))


# --- measurements of the tiny teacher -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(tiny_teacher: Path) -> HybridConfig:
    from experiments.config import apply_overrides

    config = HybridConfig(mixers=("linear_attention",), teacher=str(tiny_teacher))
    return apply_overrides(config, [*TINY_SETTINGS, "evaluation.sizes=[64]"])


def test_an_untouched_softmax_site_has_error_0_and_others_that_of_fidelity(config: HybridConfig) -> None:
    context = open_context(config.teacher, config.data, 64, 4)
    site = find_host(context.pipe).sites()[0].name
    errors = {}
    for mixer in ("softmax", "linear_attention"):
        plan = config.distillation.model_copy(update={"calibrate_outputs": False})
        student = build_student(context.teacher, mixer, MixerSpec(), plan, 0)
        single = combine_students({mixer: student}, {site: mixer}, find_host(context.pipe))
        assert [s.name for s in single.sites] == [site]
        errors[mixer] = measure_errors(context, config, single, 64)
    assert errors["softmax"] == (0.0,) * 4
    evaluated = EvaluatedStudent(context, single, config.evaluation, config.data)
    row = metric_class("fidelity")().measure(evaluated)[0]
    assert sum(errors["linear_attention"]) / 4 == pytest.approx(row.relative_error_to_teacher)  # type: ignore[attr-defined]


def test_times_cover_every_site_and_leave_the_model_as_it_was(config: HybridConfig) -> None:
    context = open_context(config.teacher, config.data, 64, 4)
    student = build_student(context.teacher, "linear_attention", MixerSpec(), config.distillation, 0)
    before = context.teacher.fingerprint
    times = measure_times(context, config, {"linear_attention": student}, 64)
    names = {site.name for site in find_host(context.pipe).sites()}
    assert times.tokens.keys() == times.seconds[STOCK].keys() == times.seconds["linear_attention"].keys() == names
    assert all(value > 0 for seconds in times.seconds.values() for value in seconds.values())
    assert context.teacher.fingerprint == before and not student.is_mounted


def test_the_command_runs_and_its_adapter_loads(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["hybrid", *MIXERS, "--keep", "40%", "--size", "64", "--teacher", str(tiny_teacher)]
    arguments += ["--out", str(tmp_path), *(part for each in TINY_SETTINGS for part in ("--set", each))]
    invocation = CliRunner().invoke(app, arguments)
    assert invocation.exit_code == 0, invocation.output
    assert "Additivity" in invocation.output or "sum to 0" in invocation.output, "if no mixer is fast enough to run"
    assert (tmp_path / "hybrid.png").is_file()
    result = json.loads((tmp_path / "result.json").read_text())
    measured = result["selections"][0]
    assert {row["name"] for row in result["selections"]} > {"every n-th", "first and last", "fewest tokens"}
    assert measured["excess"]["mean"] == 0 and math.isfinite(measured["error"]["high"])
    pipe = open_teacher(str(tiny_teacher)).pipe
    adapter = MixerAdapter.from_pretrained(tmp_path / "adapter", pipe)
    assert {name: mixer.mixer for name, mixer in adapter.site_mixers.items()} == measured["assignment"]
    assert adapter.min_tokens == measured["min_tokens"]
    students = {name: MixerAdapter.from_pretrained(tmp_path / "mixers" / name / "adapter", pipe) for name in MIXERS}
    for site, mixer in measured["assignment"].items():
        expected = students[mixer].student.state_dict()
        for name, tensor in adapter.student.state_dict().items():
            assert not name.startswith(f"{site}.") or tensor.equal(expected[name])

    saved = (tmp_path / "measurements.json").read_bytes()
    config = HybridConfig(**result["config"])
    again = run_selection(tmp_path, config, SelectionGoal(keep=0.4), ignore_progress)
    assert again == result and (tmp_path / "measurements.json").read_bytes() == saved  # nothing is measured twice
    with pytest.raises(ValueError, match="another configuration"):
        run_selection(tmp_path, config.model_copy(update={"seed": 1}), SelectionGoal(keep=0.4), ignore_progress)
    monkeypatch.setattr("experiments.studies.hybrid_selection.run.digest_records", lambda *_: "another")
    with pytest.raises(ValueError, match="another data"):
        run_selection(tmp_path, config, SelectionGoal(keep=0.4), ignore_progress)


def chosen_times(losing: int) -> Callable[..., SizeTimes]:
    """Times with which the mixer is slower than stock attention at sites with so many tokens or fewer."""

    def times(context: DistillationContext, config: HybridConfig, students: object, size: int) -> SizeTimes:
        host = find_host(context.pipe)
        side = size // host.vae_scale_factor
        tokens = {site.name: host.tokens_at(site, (side, side)) or 0 for site in host.sites()}
        stock = dict.fromkeys(tokens, 1.0)
        mixed = {name: 2.0 if count <= losing else 0.5 for name, count in tokens.items()}
        return SizeTimes(tokens=tokens, seconds={STOCK: stock, "linear_attention": mixed}, forward=len(tokens) + 1.0)

    return times


@pytest.mark.parametrize("losing", [0, 64, 256])
def test_the_errors_are_those_of_the_adapter_that_is_written(
    losing: int, config: HybridConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its `min_tokens`, which leaves sites to softmax attention; on images that nothing was selected on."""
    monkeypatch.setattr("experiments.studies.hybrid_selection.run.measure_times", chosen_times(losing))
    result = run_selection(tmp_path, config, SelectionGoal(keep=0.0), ignore_progress)
    measured = result["selections"][0]
    context = open_context(config.teacher, config.data, 64, 4)
    adapter = MixerAdapter.from_pretrained(tmp_path / "adapter", context.pipe)
    assert adapter.min_tokens == measured["min_tokens"] and (adapter.min_tokens > 0) is (losing > 0)
    errors = measure_errors(context, config, adapter, 64)
    _, comparing = split_images(4, 1)
    assert measured["error"]["mean"] == pytest.approx(sum(errors[image] for image in comparing) / len(comparing))
    assert (measured["error"]["mean"] == measured["summed_error"] == 0) is (losing == 256)


def test_sites_are_not_compared_on_the_images_that_selected_them(
    config: HybridConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of sites that only differ by chance, the selected one is no better than the others on other images."""
    sites = [site.name for site in find_host(open_context(config.teacher, config.data, 64, 4).pipe).sites()]
    selecting, _ = split_images(4, 1)

    def by_chance(context: object, config: object, adapter: MixerAdapter, size: int) -> tuple[float, ...]:
        lucky = sites[1] not in {site.name for site in adapter.sites}
        return tuple(0.1 if lucky and image in selecting else 1.0 for image in range(4))

    monkeypatch.setattr("experiments.studies.hybrid_selection.run.measure_times", chosen_times(0))
    monkeypatch.setattr("experiments.studies.hybrid_selection.run.measure_errors", by_chance)
    keep = 1.01 / len(sites)
    result = run_selection(tmp_path, config, SelectionGoal(keep=keep), ignore_progress)
    measured = result["selections"][0]
    assert sites[1] not in measured["assignment"] and len(measured["assignment"]) == len(sites) - 1
    assert all(row["error"]["mean"] == 1.0 and row["excess"]["mean"] == 0 for row in result["selections"])


@given(st.integers(2, 60), st.integers(1, 5))
def test_halves_share_no_image_and_have_all_timesteps(count: int, groups: int) -> None:
    if count < 2 * min(groups, count):
        with pytest.raises(ValueError, match=r"evaluation\.images"):
            split_images(count, groups)
        return
    halves = split_images(count, groups)
    assert sorted([*halves[0], *halves[1]]) == list(range(count))
    assert all({image % groups for image in half} == set(range(groups)) for half in halves)


def test_the_command_reports_mistakes_in_one_sentence(tmp_path: Path) -> None:
    for arguments, message in [
        (["linear_atention", "--keep", "25%"], "linear_attention"),
        (["linear_attention"], "either --keep or --budget"),
        (["linear_attention", "--budget", "0.5x"], "1x or more"),
    ]:
        invocation = CliRunner().invoke(app, ["hybrid", *arguments, "--out", str(tmp_path / "run")])
        assert invocation.exit_code == 2 and message in " ".join(invocation.output.split())
        assert not (tmp_path / "run").exists()
