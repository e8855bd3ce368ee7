"""The distillation objective: what a student must match, as one module for the training loop."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from experiments.config import Distillation
from unet_adapters import MixerAdapter, capture_outputs


class Distil(nn.Module):
    """noise · ‖ŷ − y‖² + output · ‖ŷ − y_T‖² + features · mean over sites ‖a − a_T‖² (2409.02097 §3.4).

    ŷ is the student's prediction, y the true noise (or velocity, as the scheduler says), y_T the
    teacher's prediction; a and a_T are the outputs of the replaced self-attentions. Teacher and
    student are one UNet, with the adapter off and on, so its weights are in memory once.
    Each ‖·‖² is a mean over elements. Cost of a step: two forwards and one backward.
    """

    def __init__(
        self, unet: UNet2DConditionModel, adapter: MixerAdapter, scheduler: DDIMScheduler, weights: Distillation
    ) -> None:
        super().__init__()
        self.student = adapter.student  # the only parameters of this module
        self._hosts = (unet, adapter)  # a tuple: the UNet is not a child, its weights are not ours to train
        self.scheduler, self.weights = scheduler, weights

    def forward(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Latents (b, c, h, w) and text states (b, t, d) -> the loss and its terms."""
        latents, text = batch
        noise = torch.randn_like(latents)
        steps = torch.randint(0, self.scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
        noisy = self.scheduler.add_noise(latents, noise, steps)
        with torch.no_grad():
            taught, taught_features = self._run(False, noisy, steps, text)
        learned, features = self._run(True, noisy, steps, text)
        terms = {
            "noise": F.mse_loss(learned, target(self.scheduler, latents, noise, steps)),
            "output": F.mse_loss(learned, taught),
            "features": torch.stack([F.mse_loss(features[n], taught_features[n]) for n in features]).mean(),
        }
        weighted = [getattr(self.weights, name) * value for name, value in terms.items()]
        return {"loss": torch.stack(weighted).sum(), **terms}

    def _run(self, student: bool, noisy: Tensor, steps: Tensor, text: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        unet, adapter = self._hosts
        sites = [site.name for site in adapter.sites]
        with adapter.mounted() if student else adapter.unmounted(), capture_outputs(unet, sites) as features:
            return unet(noisy, steps, text).sample, dict(features)


def target(scheduler: DDIMScheduler, latents: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
    """What a perfect model predicts, for the scheduler's prediction type.

    Raises:
        ValueError: the scheduler predicts neither noise nor velocity.
    """
    kind = scheduler.config.prediction_type
    known = {"epsilon": lambda: noise, "v_prediction": lambda: scheduler.get_velocity(latents, noise, steps)}
    if kind not in known:
        raise ValueError(f"Cannot distil a model that predicts {kind!r}: expected one of {', '.join(known)}.")
    return known[kind]()
