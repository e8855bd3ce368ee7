"""Which sites get which mixer: the exact selection for a goal, and the rules of thumb that it is compared with."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from experiments.bench.attention_layer import STOCK
from experiments.studies.hybrid_selection.config import SelectionGoal
from experiments.studies.hybrid_selection.knapsack import ParetoPoint, SiteAlternative, best_within, pareto_front
from experiments.studies.hybrid_selection.measure import SizeTimes
from experiments.studies.hybrid_selection.students import Assignment

TIME_STEPS = 20_000
"""Times are rounded to this part of the stock forward pass, so that the knapsack has whole numbers."""


@dataclass(frozen=True)
class HybridMeasurements:
    """The measured numbers that a selection is computed from.

    Attributes:
        sites: in the order of the model.
        errors: mixer -> site -> size in pixels -> the relative error of each image when that site alone is replaced.
        times: size in pixels -> times.
    """

    sites: tuple[str, ...]
    errors: Mapping[str, Mapping[str, Mapping[int, Sequence[float]]]]
    times: Mapping[int, SizeTimes]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sides in pixels, increasing."""
        return tuple(sorted(self.times))

    @property
    def mixers(self) -> tuple[str, ...]:
        """The candidates."""
        return tuple(self.errors)

    def error(self, site: str, mixer: str) -> float:
        """Return the error of one replaced site, the mean over images and sizes."""
        return fmean(fmean(self.errors[mixer][site][size]) for size in self.sizes)

    def of_images(self, images: Sequence[int]) -> HybridMeasurements:
        """Return the same measurements with the errors of some of the images alone."""
        errors = {
            mixer: {
                site: {size: [values[image] for image in images] for size, values in by_size.items()}
                for site, by_size in by_site.items()
            }
            for mixer, by_site in self.errors.items()
        }
        return replace(self, errors=errors)

    def summed_error(self, assignment: Assignment, size: int | None = None, min_tokens: int = 0) -> float:
        """Return the sum of the errors of single sites, at one size or as the mean over sizes.

        Sites with fewer than `min_tokens` tokens at a size are softmax attention there and have no error.
        """
        if size is None:
            return fmean(self.summed_error(assignment, each, min_tokens) for each in self.sizes)
        tokens = self.times[size].tokens
        return sum(
            fmean(self.errors[mixer][site][size]) for site, mixer in assignment.items() if tokens[site] >= min_tokens
        )

    def fast_from(self, site: str, mixer: str) -> int:
        """Return the smallest `min_tokens` with which the mixer is not slower than softmax attention at any size.

        One more than the largest measured number of tokens if it is slower there.
        """
        losing = [
            times.tokens[site]
            for times in self.times.values()
            if times.seconds[mixer][site] > times.seconds[STOCK][site]
        ]
        if not losing:
            return 0
        winning = [times.tokens[site] for times in self.times.values() if times.tokens[site] > max(losing)]
        return min(winning, default=max(losing) + 1)

    def min_tokens(self, assignment: Assignment) -> int:
        """Return the smallest `min_tokens` with which no site of a selection is slower than stock at any size."""
        return max((self.fast_from(site, mixer) for site, mixer in assignment.items()), default=0)

    def seconds(self, assignment: Assignment, size: int) -> float:
        """Return the predicted time of a forward pass with the selection's `min_tokens`, batch 2."""
        times = self.times[size]
        threshold = self.min_tokens(assignment)
        return times.rest + sum(self._site_seconds(site, assignment.get(site), size, threshold) for site in self.sites)

    def _site_seconds(self, site: str, mixer: str | None, size: int, threshold: int) -> float:
        times = self.times[size]
        is_stock = mixer is None or times.tokens[site] < threshold
        return times.seconds[STOCK if is_stock or mixer is None else mixer][site]


@dataclass(frozen=True)
class HybridSelection:
    """A selection of sites.

    Attributes:
        name: how it was selected.
        assignment: the mixer of each replaced site.
        min_tokens: as `HybridMeasurements.min_tokens`.
    """

    name: str
    assignment: Assignment
    min_tokens: int


def select_hybrid(measurements: HybridMeasurements, goal: SelectionGoal) -> HybridSelection:
    """Return the selection with the least summed error that meets a goal.

    The error of a mixer counts at every size, also at those where `min_tokens` will leave its site to softmax
    attention: what is selected is good wherever it runs.

    Raises:
        ValueError: no mixer is faster than softmax attention, or softmax attention at all sites meets the goal.
    """
    if goal.keep is not None:
        limit = int(goal.keep * len(measurements.sites) + 1e-9)
        front = pareto_front([_kept_alternatives(measurements, site) for site in measurements.sites])
        point = best_within(front, limit)
        assert point is not None  # replacing every site is always possible
        return _selection("measured", measurements, _assignment(measurements.sites, point, measurements.mixers))
    assert goal.budget is not None
    size = measurements.sizes[-1]
    candidates = pareto_selections(measurements)
    limit_seconds = goal.budget * candidates[0][0]
    _, _, assignment = [candidate for candidate in candidates if candidate[0] <= limit_seconds][-1]
    if not candidates[0][2]:
        raise ValueError(
            f"Cannot select sites: no mixer is faster than softmax attention at {size} px, at any site. Add a larger "
            "--size, other mixers, or use --keep, which limits the number of sites and not the time."
        )
    if not assignment:
        raise ValueError(
            f"Nothing needs to be replaced: softmax attention at all sites takes "
            f"{measurements.seconds({}, size) / candidates[0][0]:.2f} × the time of the fastest selection at {size} "
            f"px, which is within the budget of {goal.budget:g}x. Use a smaller --budget."
        )
    return _selection("measured", measurements, assignment)


def pareto_selections(measurements: HybridMeasurements) -> list[tuple[float, float, Assignment]]:
    """Return (seconds, summed error, assignment) of the optimal selections for every time budget, the fastest first.

    `min_tokens` is one number for all sites of an adapter, so the knapsack is solved for each value that some mixer
    needs: with the mixers that are fast enough from there on, at the sites with so many tokens at the largest size.
    """
    size = measurements.sizes[-1]
    unit = measurements.times[size].forward / TIME_STEPS
    thresholds = {
        0,
        *(measurements.fast_from(site, name) for site in measurements.sites for name in measurements.mixers),
    }
    selections = []
    for threshold in sorted(thresholds):
        offered = [_offered_mixers(measurements, site, threshold) for site in measurements.sites]
        alternatives = [
            _timed_alternatives(measurements, site, names, unit)
            for site, names in zip(measurements.sites, offered, strict=True)
        ]
        for point in pareto_front(alternatives):
            picks = zip(measurements.sites, offered, point.picks, strict=True)
            assignment = {site: names[pick - 1] for site, names, pick in picks if pick}
            selections.append((measurements.seconds(assignment, size), point.error, assignment))
    selections.sort(key=lambda selection: selection[:2])
    front: list[tuple[float, float, Assignment]] = []
    for selection in selections:
        if not front or selection[1] < front[-1][1]:
            front.append(selection)
    return front


def _offered_mixers(measurements: HybridMeasurements, site: str, threshold: int) -> list[str]:
    """The mixers that run at the largest size, and nowhere slower than stock, if `min_tokens` is `threshold`."""
    if measurements.times[measurements.sizes[-1]].tokens[site] < threshold:
        return []
    return [name for name in measurements.mixers if measurements.fast_from(site, name) <= threshold]


def _timed_alternatives(
    measurements: HybridMeasurements, site: str, names: Sequence[str], unit: float
) -> list[SiteAlternative]:
    seconds = measurements.times[measurements.sizes[-1]].seconds
    stock = SiteAlternative(round(seconds[STOCK][site] / unit), 0.0)
    return [
        stock,
        *(SiteAlternative(round(seconds[name][site] / unit), measurements.error(site, name)) for name in names),
    ]


def _kept_alternatives(measurements: HybridMeasurements, site: str) -> list[SiteAlternative]:
    return [
        SiteAlternative(1, 0.0),
        *(SiteAlternative(0, measurements.error(site, name)) for name in measurements.mixers),
    ]


def _assignment(sites: Sequence[str], point: ParetoPoint, mixers: Sequence[str]) -> Assignment:
    return {site: mixers[pick - 1] for site, pick in zip(sites, point.picks, strict=True) if pick}


def _selection(name: str, measurements: HybridMeasurements, assignment: Assignment) -> HybridSelection:
    return HybridSelection(name, assignment, measurements.min_tokens(assignment))


SitesToKeep = Callable[[int], set[str]]
"""Takes how many sites stay softmax attention, and returns their names."""


def rule_selections(
    measurements: HybridMeasurements, goal: SelectionGoal, measured: HybridSelection, random_count: int
) -> Iterator[HybridSelection]:
    """Yield the selections of rules of thumb at the same cost, with the mixer of the least summed error.

    With `keep`, they keep as many sites as the measured selection does. With a budget, each keeps as many as it can
    within the budget; a rule that cannot meet the budget is left out.

    Args:
        measurements: the measured numbers.
        goal: of the measured selection.
        measured: that selection.
        random_count: number of random selections.
    """
    mixer = min(
        measurements.mixers, key=lambda name: sum(measurements.error(site, name) for site in measurements.sites)
    )
    size = measurements.sizes[-1]
    for name, keep in _rules(measurements, random_count).items():
        counts = [len(measurements.sites) - len(measured.assignment)]
        if goal.budget is not None:
            limit = goal.budget * pareto_selections(measurements)[0][0]
            assignments = [_without(measurements, keep(count), mixer) for count in range(len(measurements.sites))]
            counts = [n for n, each in enumerate(assignments) if measurements.seconds(each, size) <= limit][-1:]
        for count in counts:
            yield _selection(name, measurements, _without(measurements, keep(count), mixer))


def _without(measurements: HybridMeasurements, softmax_sites: set[str], mixer: str) -> Assignment:
    return {site: mixer for site in measurements.sites if site not in softmax_sites}


def _rules(measurements: HybridMeasurements, random_count: int) -> dict[str, SitesToKeep]:
    tokens = measurements.times[measurements.sizes[-1]].tokens
    sites = list(tokens)  # in the order in which the model calls them: a UNet's mid block is in the middle
    total = len(sites)

    def evenly(count: int) -> set[str]:
        return {sites[int((index + 0.5) * total / count)] for index in range(count)}

    def outer(count: int) -> set[str]:
        return {*sites[: (count + 1) // 2], *sites[total - count // 2 :]}

    def fewest_tokens(count: int) -> set[str]:
        return set(sorted(sites, key=lambda site: tokens[site])[:count])

    def shuffled(seed: int) -> SitesToKeep:
        order = random.Random(seed).sample(sites, total)
        return lambda count: set(order[:count])

    rules: dict[str, SitesToKeep] = {"every n-th": evenly, "first and last": outer, "fewest tokens": fewest_tokens}
    return rules | {f"random {seed}": shuffled(seed) for seed in range(random_count)}
