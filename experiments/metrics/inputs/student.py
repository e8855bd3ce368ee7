"""A student as metrics see it, with the material that several metrics share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from experiments.config import EvaluationConfig
from experiments.distill.context import DistillationContext
from experiments.metrics.inputs.compared_images import Split
from experiments.metrics.inputs.generated_images import FeatureSets, feature_sets
from experiments.metrics.inputs.predictions import NoisyImages, PredictionErrors
from experiments.metrics.inputs.predictions import noisy_images as encode_noisy_images
from experiments.metrics.inputs.predictions import prediction_errors as compare_predictions
from unet_adapters import MixerAdapter


@dataclass(frozen=True)
class EvaluatedStudent:
    """A student, its teacher, and what the evaluation asks for. Shared work is done once, when it is first needed.

    Attributes:
        context: the teacher, and the images that it is compared on.
        adapter: of the student, not mounted.
        plan: the evaluation.
        data: name of the data set, as in a grid.
        seed: of the student's training, which also selects the noise.
    """

    context: DistillationContext
    adapter: MixerAdapter
    plan: EvaluationConfig
    data: str
    seed: int = 0

    def noisy_images(self, height: int, width: int, split: Split = "held_out") -> NoisyImages:
        """Return the evaluation images of a size with their noise, encoded."""
        return encode_noisy_images(self.context, self.data, height, width, split, self.plan, self.seed)

    def prediction_errors(self, height: int, width: int, split: Split = "held_out") -> tuple[PredictionErrors, ...]:
        """Return the errors of the student's predictions, timestep by timestep. Costs a forward pass for each."""
        key = (height, width, split)
        if key not in self._errors:
            images = self.noisy_images(height, width, split)
            self._errors[key] = compare_predictions(images, self.adapter, self.plan.timesteps)
        return self._errors[key]

    def errors_on(self, data: str, height: int, width: int) -> tuple[PredictionErrors, ...]:
        """Return the errors of the student's predictions on held-out images of another data set."""
        images = encode_noisy_images(self.context, data, height, width, "other", self.plan, self.seed)
        return compare_predictions(images, self.adapter, self.plan.timesteps)

    @cached_property
    def feature_sets(self) -> tuple[FeatureSets, ...]:
        """Features of generated and true images, for each size, guidance and network; empty if none are asked for."""
        return tuple(feature_sets(self.context, self.adapter, self.plan, self.data))

    @cached_property
    def _errors(self) -> dict[tuple[int, int, Split], tuple[PredictionErrors, ...]]:
        return {}
