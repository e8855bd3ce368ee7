"""Agreement of a student's predictions with its teacher's, by image size and shape."""

from __future__ import annotations

from experiments.metrics.base import LinePlot, Metric, MetricRow, Quantity, register_metric
from experiments.metrics.inputs.compared_images import Split
from experiments.metrics.inputs.predictions import average_errors
from experiments.metrics.inputs.student import EvaluatedStudent

RELATIVE_ERROR = "squared error to the teacher / the teacher's mean square"
ERROR_RATIO = "squared error to the truth / the teacher's own"


class FidelityRow(MetricRow):
    """Errors at one size and split, as means over images, timesteps and elements.

    Attributes:
        size: the longer side in pixels.
        error_by_image: `error_to_teacher` of every image alone, in a fixed order, for paired comparisons.
    """

    size: int
    height: int
    width: int
    split: str
    images: int
    error_to_teacher: float
    relative_error_to_teacher: float
    error_to_truth: float
    teacher_error_to_truth: float
    error_ratio: float
    error_by_image: tuple[float, ...] = ()


@register_metric("fidelity")
class Fidelity(Metric):
    """Agreement of predictions with the teacher's on held-out images, by size and shape, and on held-in ones.

    error_to_teacher: mean squared difference of the two predictions;
    relative_error_to_teacher: that over the mean square of the teacher's prediction, so that 0 is the teacher and 1 is
    as wrong as predicting zeros;
    error_to_truth, teacher_error_to_truth: mean squared error against the true noise (or velocity);
    error_ratio: the first of these over the second; 1 is as good as the teacher.

    Costs a forward pass of the student for each size, timestep and batch of images. Beyond the smallest size, every
    image is compared at some of the timesteps alone (`timesteps_per_image`), and every timestep on some of the images.
    """

    title = "Error against resolution"
    section_order = 0
    row = FidelityRow
    quantities = (
        Quantity("error_to_teacher", "squared error to the teacher"),
        Quantity("relative_error_to_teacher", RELATIVE_ERROR),
        Quantity("error_to_truth", "squared error to the truth"),
        Quantity("teacher_error_to_truth", "the teacher's squared error to the truth", better="neither"),
        Quantity("error_ratio", ERROR_RATIO, perfect=1.0),
    )
    figures = (
        LinePlot(
            "size",
            "relative_error_to_teacher",
            "image side (px)",
            "Squared error to the teacher on held-out images, relative to the mean square of the teacher's prediction. "
            "A flat line carries over to resolutions that the student was not distilled at; a rising one does not.",
            marks_training_size=True,
        ),
        LinePlot(
            "size",
            "error_ratio",
            "image side (px)",
            "Squared error to the truth over the teacher's own, on held-out images; 1 is as good as the teacher.",
            marks_training_size=True,
        ),
    )

    def measure(self, student: EvaluatedStudent) -> list[MetricRow]:
        """See `Metric.measure`."""
        rows: list[MetricRow] = [self._row(student, *extent, "held_out") for extent in student.plan.extents]
        if student.plan.held_in_images:
            rows.append(self._row(student, *student.plan.smallest_extent, "held_in"))
        return rows

    def _row(self, student: EvaluatedStudent, height: int, width: int, split: Split) -> FidelityRow:
        errors = average_errors(student.prediction_errors(height, width, split))
        return FidelityRow(
            size=max(height, width),
            height=height,
            width=width,
            split=split,
            images=len(errors.by_image),
            error_to_teacher=errors.to_teacher,
            relative_error_to_teacher=errors.to_teacher / errors.teacher_power,
            error_to_truth=errors.to_truth,
            teacher_error_to_truth=errors.teacher_to_truth,
            error_ratio=errors.to_truth / errors.teacher_to_truth,
            error_by_image=tuple(errors.by_image.tolist()),
        )
