"""Predictions of a student and its teacher for the same noisy images, and their errors image by image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from experiments.config import EvaluationConfig
from experiments.core.fingerprints import TensorVersions, weights_version
from experiments.distill.context import DistillationContext
from experiments.distill.loss import autocast
from experiments.metrics.inputs.compared_images import Split, compared_images
from experiments.teacher.teacher import Batch, Teacher
from unet_adapters import MixerAdapter


@dataclass(frozen=True)
class PredictionErrors:
    """Mean squared differences at one timestep, each (n,) in float64 for the n images that are compared there.

    Attributes:
        timestep: of the noise.
        images: their numbers (n,) among all images.
        to_teacher: student against teacher.
        teacher_power: the teacher's prediction against zero.
        to_truth: student against the true noise (or velocity).
        teacher_to_truth: teacher against it.
    """

    timestep: int
    images: Tensor
    to_teacher: Tensor
    teacher_power: Tensor
    to_truth: Tensor
    teacher_to_truth: Tensor


class NoisyImages:
    """Images of one size and split, encoded, with fixed noise for every timestep, and the teacher's predictions.

    The predictions are computed once and kept for the next student: `images · timesteps` latents in memory.

    Args:
        teacher: its adapter must not be mounted while predictions are computed.
        encoded: latents (n, c, h, w) and conditions.
        noise_seed: of the noise; the timestep is added.
        batch_size: images in one forward pass.
        groups: of images by turns; timestep number k is compared on group k mod `groups` alone.
        timesteps: all that are compared, in order, if there are several groups.
    """

    def __init__(
        self,
        teacher: Teacher,
        encoded: Batch,
        noise_seed: int,
        batch_size: int,
        groups: int = 1,
        timesteps: tuple[int, ...] = (),
    ) -> None:
        self._teacher = teacher
        self._encoded = encoded
        self._noise_seed = noise_seed
        self._batch_size = batch_size
        self._groups = groups
        self._timesteps = timesteps
        self._predictions: dict[int, Tensor] = {}
        self._teacher_version: TensorVersions = ()

    def __len__(self) -> int:
        return len(self._encoded["latents"])

    def first(self, count: int) -> NoisyImages:
        """Return the first images alone, with the same noise, for every timestep."""
        encoded = {name: value[:count] for name, value in self._encoded.items()}
        return NoisyImages(self._teacher, encoded, self._noise_seed, self._batch_size)

    def at(self, timestep: int) -> Tensor:
        """Return the numbers (n,) of the images that are compared at a timestep."""
        group = self._timesteps.index(timestep) % self._groups if self._groups > 1 else 0
        return torch.arange(group, len(self), self._groups)

    def batches(self, timestep: int) -> Iterator[tuple[Tensor, Tensor, Batch]]:
        """Iterate over noisy latents (b, c, h, w), timesteps (b,) and conditions of the images at a timestep."""
        all_noise = self._noise(timestep)
        for images in self.at(timestep).split(self._batch_size):
            inputs = {name: value[images.to(value.device)] for name, value in self._encoded.items()}
            steps = self._steps(timestep, len(images))
            noise = all_noise[images].to(inputs["latents"])
            yield self._teacher.scheduler.add_noise(inputs["latents"], noise, steps), steps, inputs

    def target(self, timestep: int) -> Tensor:
        """Return what a perfect model predicts for them: the true noise or velocity, (n, c, h, w)."""
        images = self.at(timestep)
        latents = self._encoded["latents"]
        latents = latents[images.to(latents.device)]
        noise = self._noise(timestep)[images].to(latents)
        return self._teacher.target(latents, noise, self._steps(timestep, len(images)))

    @torch.no_grad()
    def predict(self, timestep: int) -> Tensor:
        """Predict with the UNet as it is mounted now, (n, c, h, w)."""
        with autocast(self._teacher):
            return torch.cat([self._teacher.predict(*parts) for parts in self.batches(timestep)])

    def teacher_prediction(self, timestep: int) -> Tensor:
        """Return the teacher's prediction; nothing may be mounted when it is asked for first."""
        version = weights_version(self._teacher.denoiser)
        if self._teacher_version != version:
            self._predictions.clear()
            self._teacher_version = version
        if timestep not in self._predictions:
            self._predictions[timestep] = self.predict(timestep)
        return self._predictions[timestep]

    def _steps(self, timestep: int, count: int) -> Tensor:
        return torch.full((count,), timestep, device=self._encoded["latents"].device)

    def _noise(self, timestep: int) -> Tensor:
        """The noise of all images (on the CPU), which does not depend on which of them are compared."""
        generator = torch.Generator().manual_seed(1000 * self._noise_seed + timestep)
        return torch.randn(self._encoded["latents"].shape, generator=generator)


@dataclass(frozen=True)
class MeanErrors:
    """Prediction errors as means over the timesteps of every image, and over images but for the first.

    Attributes:
        by_image: student against teacher, image by image, (images,).
        teacher_power: the teacher's prediction against zero.
        to_truth: student against the true noise (or velocity).
        teacher_to_truth: teacher against it.
    """

    by_image: Tensor
    teacher_power: float
    to_truth: float
    teacher_to_truth: float

    @property
    def to_teacher(self) -> float:
        """Student against teacher."""
        return float(self.by_image.mean())


def average_errors(errors: Sequence[PredictionErrors]) -> MeanErrors:
    """Average prediction errors over the timesteps of every image, then over images."""
    images = torch.cat([error.images for error in errors])
    counts = images.bincount()

    def by_image(values: list[Tensor]) -> Tensor:
        return torch.zeros(len(counts), dtype=torch.float64).index_add(0, images, torch.cat(values)) / counts

    return MeanErrors(
        by_image=by_image([error.to_teacher for error in errors]),
        teacher_power=float(by_image([error.teacher_power for error in errors]).mean()),
        to_truth=float(by_image([error.to_truth for error in errors]).mean()),
        teacher_to_truth=float(by_image([error.teacher_to_truth for error in errors]).mean()),
    )


def prediction_errors(
    images: NoisyImages, adapter: MixerAdapter, timesteps: tuple[int, ...]
) -> tuple[PredictionErrors, ...]:
    """Compare the student's predictions with the teacher's and with the truth, at each timestep."""
    errors = []
    for timestep in timesteps:
        teacher = images.teacher_prediction(timestep)
        with adapter.mounted():
            student = images.predict(timestep)
        target = images.target(timestep)
        errors.append(
            PredictionErrors(
                timestep,
                images.at(timestep),
                to_teacher=_mean_square(student, teacher),
                teacher_power=_mean_square(teacher, 0),
                to_truth=_mean_square(student, target),
                teacher_to_truth=_mean_square(teacher, target),
            )
        )
    return tuple(errors)


@lru_cache(maxsize=8)
@torch.no_grad()
def noisy_images(
    context: DistillationContext, data: str, height: int, width: int, split: Split, plan: EvaluationConfig, seed: int
) -> NoisyImages:
    """Encode the evaluation images of a split at a size; kept for the next student of the same seed.

    Args:
        context: the teacher and its data.
        data, split: as `compared_images` takes them.
        height, width: in pixels.
        plan: how many images, and the evaluation's own seed.
        seed: of the student's training; every seed has noise of its own.

    Raises:
        DataError: as `compared_images`.
    """
    images = compared_images(context, data, split, plan)
    parts = [context.teacher.encode(*part) for part in images.batches((height, width), plan.batch_size)]
    encoded = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    groups = 1 if (height, width) == plan.smallest_extent else plan.timestep_groups
    return NoisyImages(
        context.teacher, encoded, plan.seed + seed, plan.batch_size, min(groups, len(images)), plan.timesteps
    )


def _mean_square(a: Tensor, b: Tensor | int) -> Tensor:
    return (a - b).double().square().flatten(1).mean(1).cpu()
