"""The order of a report's sections, and of the metrics among them."""

from __future__ import annotations

from experiments.metrics import Metric, list_metrics, metric_class

OVERVIEW = "Overview"
"""The section of the figure between the conclusions and the main table."""
BEFORE = (("Factors", "Rows that differ in one thing alone, compared seed by seed and image by image."),)
SAMPLES = ("Samples", "Select an image below; the slider lays it over the teacher's.")
AFTER = (
    ("Quality against cost", ""),
    ("Mixing matrices and receptive fields", ""),
    ("Training curves", ""),
)


def reported_metrics() -> list[type[Metric]]:
    """Return the registered metrics in the order of their sections."""
    metrics = [metric_class(name) for name in list_metrics()]
    return sorted(metrics, key=lambda metric: (metric.section_order, metric.name))


def report_sections() -> list[tuple[str, str]]:
    """Return (title, introduction) of the sections between the main table and the configuration."""
    titles = list(dict.fromkeys(metric.title for metric in reported_metrics()))
    measured = [(title, "") for title in titles]
    return [*BEFORE, *measured[:1], SAMPLES, *AFTER[:1], *measured[1:], *AFTER[1:]]
