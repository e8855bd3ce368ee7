"""What a metric is: `@register_metric("name")` on a class that measures a student and says how its rows are read.

    class SharpnessRow(MetricRow):
        size: int
        sharpness: float

    @register_metric("sharpness")
    class Sharpness(Metric):
        \"\"\"Mean gradient of the generated images.\"\"\"

        title = "Sharpness"
        row = SharpnessRow
        quantities = (Quantity("sharpness", "mean gradient", better="higher"),)
        figures = (LinePlot(x="size", quantity="sharpness", x_label="image side (px)"),)

        def measure(self, student): ...

Everything else follows from the class: the setting `evaluation.metrics.sharpness`, the record of every cell, CSV
columns, the tables of `mixlab evaluate`, the report's section, and `mixlab list --metrics`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict

from experiments.core.registries import METRICS

if TYPE_CHECKING:
    from experiments.metrics.inputs.student import EvaluatedStudent


class MetricRow(BaseModel):
    """One measurement; fields that are no quantities say of what: a size, a timestep, a network."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")


class MetricOptions(BaseModel):
    """Settings of a metric beside those of the whole evaluation; fields with defaults."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class Quantity:
    """A number of a metric's rows.

    Attributes:
        field: of the row.
        label: for readers, with the unit and what it is relative to.
        better: which direction is.
        perfect: the value of a student equal to its teacher, which figures mark; None if there is no such value.
    """

    field: str
    label: str
    better: Literal["lower", "higher", "neither"] = "lower"
    perfect: float | None = None


@dataclass(frozen=True)
class LinePlot:
    """A line for each variant: a quantity against a field of the row, both on log scales.

    Attributes:
        x, quantity: fields of the row.
        x_label: with its unit.
        caption: what readers learn from it.
        marks_training_size: whether x is a size in pixels, so that the training size is marked.
        shows_growth: whether the legend has each line's exponent over its last points.
        scale: the quantity is divided by it, as 1e9 for billions; its label names the unit after division.
    """

    x: str
    quantity: str
    x_label: str
    caption: str = ""
    marks_training_size: bool = False
    shows_growth: bool = False
    scale: float = 1.0


@dataclass(frozen=True)
class HeatMap:
    """A row for each variant and a column for each value of a field, at every size; the color is the quantity.

    Attributes:
        column, quantity: fields of the row, which has a `height` too.
        caption: what readers learn from it.
        worthless: the value of an output of zeros, beyond which all is one color; None if there is no such value.
    """

    column: str
    quantity: str
    caption: str = ""
    worthless: float | None = 1.0


@dataclass(frozen=True)
class ValueTable:
    """A table: a row for each variant, a column for each quantity and combination of the fields that are no quantities.

    Attributes:
        quantities: fields of the row; (): all quantities of the metric.
        caption: what readers need to know to read it.
        baselines: {what the baseline is: field of the row that holds it}; each is a row of the table.
    """

    quantities: tuple[str, ...] = ()
    caption: str = ""
    baselines: tuple[tuple[str, str], ...] = ()


FigureSpec = LinePlot | HeatMap | ValueTable


class Metric:
    """A measurement of a student. The first sentence of a subclass's docstring says what it measures.

    Attributes:
        name: as it is registered.
        title: heading of its section in the report.
        row: type of its rows.
        options_type: type of its own settings.
        quantities: the numbers of a row; all other fields say what the row is of.
        figures: how the report shows it.
        by_default: whether evaluations measure it unless they say otherwise.
        section_order: position of its section in the report; smaller comes first.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    row: ClassVar[type[MetricRow]]
    options_type: ClassVar[type[MetricOptions]] = MetricOptions
    quantities: ClassVar[tuple[Quantity, ...]]
    figures: ClassVar[tuple[FigureSpec, ...]] = ()
    by_default: ClassVar[bool] = True
    section_order: ClassVar[int] = 50

    def __init__(self, options: Any = None) -> None:
        self.options: Any = options if options is not None else self.options_type()

    def measure(self, student: EvaluatedStudent) -> list[MetricRow]:
        """Measure a student; its adapter is not mounted before and after.

        Args:
            student: with its teacher, the evaluation's settings, and the material that metrics share.

        Returns:
            Rows of the type `row`; none if the evaluation asks for nothing that this metric measures.
        """
        raise NotImplementedError

    @classmethod
    def summary(cls) -> str:
        """Return the first line of the docstring."""
        return (cls.__doc__ or "").strip().partition("\n")[0]

    @classmethod
    def key_fields(cls) -> tuple[str, ...]:
        """Return the fields of a row that say what it is of: single values that are no quantities."""
        numbers = {quantity.field for quantity in cls.quantities}
        fields = cls.row.model_fields.items()
        return tuple(n for n, field in fields if n not in numbers and "tuple" not in str(field.annotation))

    @classmethod
    def quantity(cls, field: str) -> Quantity:
        """Return a quantity by its field."""
        return next(quantity for quantity in cls.quantities if quantity.field == field)


_Metric = TypeVar("_Metric", bound=type[Metric])


def register_metric(name: str) -> Callable[[_Metric], _Metric]:
    """Class decorator that adds a `Metric` to the registry.

    Args:
        name: lower case, unique; the key of its settings and of its rows in records.

    Raises:
        ValueError: the name is taken, or the class is no metric, or its quantities or figures name fields that
            its rows do not have.
    """

    def register(metric: _Metric) -> _Metric:
        if not (isinstance(metric, type) and issubclass(metric, Metric)):
            raise ValueError(
                f"Cannot register {metric!r} as {name!r}: expected a subclass of experiments.metrics.Metric."
            )
        missing = [part for part in ("title", "row", "quantities") if not hasattr(metric, part)]
        if missing:
            raise ValueError(f"Cannot register {metric.__name__} as {name!r}: it has no {', '.join(missing)}.")
        fields = set(metric.row.model_fields)
        unknown = sorted(_named_fields(metric) - fields)
        if unknown:
            raise ValueError(
                f"Cannot register {metric.__name__} as {name!r}: its rows have no field {', '.join(unknown)}, which "
                f"its quantities or figures name; they have {', '.join(sorted(fields))}."
            )
        metric.name = name
        METRICS.add(name, metric)
        return metric

    return register


def list_metrics(pattern: str = "*") -> list[str]:
    """Return the names of the registered metrics that match a wildcard pattern."""
    return METRICS.names(pattern)


def metric_class(name: str) -> type[Metric]:
    """Return a metric by name.

    Raises:
        ValueError: no such metric; the message names the nearest one.
    """
    metric: type[Metric] = METRICS.get(name)
    return metric


def _named_fields(metric: type[Metric]) -> set[str]:
    names = {quantity.field for quantity in metric.quantities}
    for figure in metric.figures:
        match figure:
            case LinePlot(x=x, quantity=quantity):
                names |= {x, quantity}
            case HeatMap(column=column, quantity=quantity):
                names |= {column, quantity, "height"}
            case ValueTable(quantities=quantities, baselines=baselines):
                names |= {*quantities, *(field for _, field in baselines)}
    return names
