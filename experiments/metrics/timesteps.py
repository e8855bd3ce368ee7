"""Agreement of a student's predictions with its teacher's, by timestep."""

from __future__ import annotations

from experiments.metrics.base import HeatMap, Metric, MetricRow, Quantity, register_metric
from experiments.metrics.fidelity import RELATIVE_ERROR
from experiments.metrics.inputs.student import EvaluatedStudent


class TimestepRow(MetricRow):
    """Errors to the teacher at one timestep of one size, as means over held-out images and elements."""

    height: int
    width: int
    timestep: int
    error_to_teacher: float
    relative_error_to_teacher: float


@register_metric("timesteps")
class TimestepErrors(Metric):
    """Error of predictions to the teacher's on held-out images, at each timestep.

    The same forward passes as `fidelity`: costs nothing beside it. At the smallest size its means over timesteps are
    fidelity's errors; beyond it, neighboring timesteps are compared on different images.
    """

    title = "Error by timestep"
    section_order = 11
    row = TimestepRow
    quantities = (
        Quantity("error_to_teacher", "squared error to the teacher"),
        Quantity("relative_error_to_teacher", RELATIVE_ERROR),
    )
    figures = (
        HeatMap(
            "timestep",
            "relative_error_to_teacher",
            "Error to the teacher by timestep, relative to the mean square of the teacher's prediction; at high "
            "timesteps the image is nearly noise. Red: 1 and more, as wrong as a prediction of zeros.",
        ),
    )

    def measure(self, student: EvaluatedStudent) -> list[MetricRow]:
        """See `Metric.measure`."""
        return [
            TimestepRow(
                height=height,
                width=width,
                timestep=error.timestep,
                error_to_teacher=float(error.to_teacher.mean()),
                relative_error_to_teacher=float(error.to_teacher.mean() / error.teacher_power.mean()),
            )
            for height, width in student.plan.extents
            for error in student.prediction_errors(height, width)
        ]
