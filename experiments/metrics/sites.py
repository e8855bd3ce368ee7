"""Error of every self-attention layer's output, each network in its own forward pass."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from experiments.config import ImageSide
from experiments.distill.loss import autocast
from experiments.metrics.base import HeatMap, Metric, MetricOptions, MetricRow, Quantity, register_metric
from experiments.metrics.inputs.predictions import NoisyImages
from experiments.metrics.inputs.student import EvaluatedStudent
from unet_adapters.capture import capture_outputs
from unet_adapters.hosts import find_host


class SiteRow(MetricRow):
    """The error of one site at one size."""

    site: str
    height: int
    width: int
    relative_error: float


class SiteOptions(MetricOptions):
    """Which sizes and how many images."""

    sizes: tuple[ImageSide, ...] = Field((64, 256), description="sides in pixels, of those that the evaluation has")
    images: int = Field(8, gt=0, description="held-out images that are compared")


@register_metric("sites")
class SiteErrors(Metric):
    """Squared error of each self-attention layer's output over the mean square of the teacher's.

    Each network runs its own forward pass, so errors accumulate along the UNet: sites before the first replaced one are
    exact, and a site that kept softmax shows what reached it. Means over held-out images and timesteps. Costs a forward
    pass of both networks for each timestep and size.
    """

    title = "Error by site"
    section_order = 10
    row = SiteRow
    options_type = SiteOptions
    quantities = (Quantity("relative_error", "squared error of the site's output / the teacher's mean square"),)
    figures = (
        HeatMap(
            "site",
            "relative_error",
            "Error of each self-attention layer's output, relative to the mean square of the teacher's, from the "
            "downward path (left) to the upward path (right); layers are named by block and position. Errors "
            "accumulate along the UNet. 1 is as wrong as an output of zeros; red: beyond it.",
        ),
    )

    def measure(self, student: EvaluatedStudent) -> list[MetricRow]:
        """See `Metric.measure`."""
        rows: list[MetricRow] = []
        for height, width in student.plan.extents:
            if height == width and height in self.options.sizes:
                images = student.noisy_images(height, width).first(self.options.images)
                errors = self._relative_errors(student, images)
                rows += [SiteRow(site=n, height=height, width=width, relative_error=e) for n, e in errors.items()]
        return rows

    def _relative_errors(self, student: EvaluatedStudent, images: NoisyImages) -> dict[str, float]:
        names = [site.name for site in find_host(student.context.teacher.denoiser).sites()]
        sums = {name: torch.zeros(2, dtype=torch.float64) for name in names}
        for timestep in student.plan.timesteps:
            for inputs in images.batches(timestep):
                teacher = self._outputs(student, names, inputs)
                with student.adapter.mounted():
                    outputs = self._outputs(student, names, inputs)
                for name in names:
                    sums[name] += torch.stack(
                        [_sum_of_squares(outputs[name] - teacher[name]), _sum_of_squares(teacher[name])]
                    )
        return {name: float(difference / power) for name, (difference, power) in sums.items()}

    @torch.no_grad()
    def _outputs(self, student: EvaluatedStudent, names: list[str], inputs: tuple) -> dict[str, Tensor]:  # type: ignore[type-arg]
        teacher = student.context.teacher
        with autocast(teacher), capture_outputs(student.context.teacher.denoiser, names) as outputs:
            teacher.predict(*inputs)
        return dict(outputs)


def _sum_of_squares(x: Tensor) -> Tensor:
    return x.double().square().sum().cpu()
