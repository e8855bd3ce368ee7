"""All measurements of one student as one typed record."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import ConfigDict, SerializeAsAny, field_validator

from experiments.config import FrozenModel
from experiments.core.registries import METRICS
from experiments.metrics.base import MetricRow

_Row = TypeVar("_Row", bound=MetricRow)


class UnregisteredRow(MetricRow):
    """A row of a metric that is not registered here, as of a plug-in that is not loaded; holds whatever it has."""

    model_config = ConfigDict(extra="allow", frozen=True)


class Measurements(FrozenModel):
    """Rows of every metric, and the protocol that they were measured by.

    Attributes:
        protocol: SHA-256 of the protocol.
        commit: of the code that measured, with + if tracked files differ from it; empty outside a git checkout.
        metrics: name of the metric -> its rows, each of the metric's row type.
    """

    protocol: str
    commit: str = ""
    metrics: dict[str, tuple[SerializeAsAny[MetricRow], ...]]

    @field_validator("metrics", mode="before")
    @classmethod
    def _typed_rows(cls, metrics: Any) -> Any:
        if not isinstance(metrics, dict):
            return metrics
        registered = set(METRICS.names())
        types = {name: METRICS.get(name).row if name in registered else UnregisteredRow for name in metrics}
        return {
            name: tuple(row if isinstance(row, MetricRow) else types[name].model_validate(row) for row in rows)
            for name, rows in metrics.items()
        }

    def rows(self, name: str, row_type: type[_Row]) -> tuple[_Row, ...]:
        """Return the rows of a metric that are of a type; none if it was not measured."""
        return tuple(row for row in self.metrics.get(name, ()) if isinstance(row, row_type))
