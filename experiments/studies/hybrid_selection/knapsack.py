"""The multiple-choice knapsack: one alternative for each site, the least summed error within a summed cost.

Solved exactly by dynamic programming over the sites. After each site only the Pareto-optimal sums are kept: every
extension of a dominated sum is dominated by the same extension of the sum that dominates it. Costs are whole numbers,
so there are never more sums than the total cost plus one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class SiteAlternative:
    """What can be at a site.

    Attributes:
        cost: a whole number, such as microseconds.
        error: what is added to the summed error.
    """

    cost: int
    error: float


@dataclass(frozen=True)
class ParetoPoint:
    """A choice for all sites that no other choice beats in both sums.

    Attributes:
        cost: the summed cost.
        error: the summed error.
        picks: the position of each site's alternative.
    """

    cost: int
    error: float
    picks: tuple[int, ...]


def pareto_front(sites: Sequence[Sequence[SiteAlternative]]) -> list[ParetoPoint]:
    """Return the choices that are optimal for some limit of the cost, the cheapest first.

    Of choices with equal sums, one is returned.

    Args:
        sites: the alternatives of each site, one or more.

    Cost: O(sites · alternatives · length of the longest front), with a sort of each.
    """
    front = [ParetoPoint(0, 0.0, ())]
    for alternatives in sites:
        extended = [
            ParetoPoint(point.cost + option.cost, point.error + option.error, (*point.picks, number))
            for point in front
            for number, option in enumerate(alternatives)
        ]
        front = _drop_dominated(extended)
    return front


def best_within(front: Sequence[ParetoPoint], limit: float) -> ParetoPoint | None:
    """Return the choice of a front with the least error whose cost is at most `limit`; None if none is so cheap."""
    return next((point for point in reversed(front) if point.cost <= limit), None)


def _drop_dominated(points: list[ParetoPoint]) -> list[ParetoPoint]:
    front: list[ParetoPoint] = []
    for point in sorted(points, key=lambda p: (p.cost, p.error)):
        if not front or point.error < front[-1].error:
            front.append(point)
    return front
