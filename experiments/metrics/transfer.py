"""Agreement of a student's predictions with its teacher's on another data set than the one it was distilled on."""

from __future__ import annotations

from pydantic import Field

from experiments.config import ImageSide
from experiments.metrics.base import LinePlot, Metric, MetricOptions, MetricRow, Quantity, register_metric
from experiments.metrics.fidelity import ERROR_RATIO, RELATIVE_ERROR
from experiments.metrics.inputs.predictions import average_errors
from experiments.metrics.inputs.student import EvaluatedStudent


class TransferOptions(MetricOptions):
    """The other data and its sizes."""

    data: str = Field("scenes-more", description="a data set, as in a grid; its held-out split is measured")
    sizes: tuple[ImageSide, ...] = Field((128, 256), description="sides in pixels")


class TransferRow(MetricRow):
    """Errors at one size, as means over images, timesteps and elements.

    Attributes:
        error_by_image: error to the teacher of every image alone, in a fixed order, for paired comparisons.
    """

    size: int
    data: str
    images: int
    relative_error_to_teacher: float
    error_ratio: float
    error_by_image: tuple[float, ...] = ()


@register_metric("transfer")
class Transfer(Metric):
    """Agreement of predictions with the teacher's on held-out images of another data set.

    With the default data, larger images show more objects at the size of training instead of larger objects: two ways
    to grow, which need not be equally hard. The quantities are those of `fidelity`.

    Costs a forward pass of the student for each size, timestep and batch of images.
    """

    title = "Error on other data"
    section_order = 1
    row = TransferRow
    options_type = TransferOptions
    quantities = (
        Quantity("relative_error_to_teacher", RELATIVE_ERROR),
        Quantity("error_ratio", ERROR_RATIO, perfect=1.0),
    )
    figures = (
        LinePlot(
            "size",
            "relative_error_to_teacher",
            "image side (px)",
            "Squared error to the teacher on held-out images of other data, relative to the mean square of the "
            "teacher's prediction.",
            marks_training_size=True,
        ),
    )
    by_default = False

    def measure(self, student: EvaluatedStudent) -> list[MetricRow]:
        """See `Metric.measure`."""
        return [self._row(student, size) for size in self.options.sizes]

    def _row(self, student: EvaluatedStudent, size: int) -> TransferRow:
        errors = average_errors(student.errors_on(self.options.data, size, size))
        return TransferRow(
            size=size,
            data=self.options.data,
            images=len(errors.by_image),
            relative_error_to_teacher=errors.to_teacher / errors.teacher_power,
            error_ratio=errors.to_truth / errors.teacher_to_truth,
            error_by_image=tuple(errors.by_image.tolist()),
        )
