"""Metrics of a student, one file each, by name: what is measured, the type of its rows, and how it is drawn."""

from experiments.metrics.base import (
    HeatMap,
    LinePlot,
    Metric,
    MetricOptions,
    MetricRow,
    Quantity,
    ValueTable,
    list_metrics,
    metric_class,
    register_metric,
)

__all__ = [
    "HeatMap",
    "LinePlot",
    "Metric",
    "MetricOptions",
    "MetricRow",
    "Quantity",
    "ValueTable",
    "list_metrics",
    "metric_class",
    "register_metric",
]
