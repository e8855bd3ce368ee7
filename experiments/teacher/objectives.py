"""What each stage of the teacher's training minimizes: modules from a batch to a dictionary of losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTextModel

from experiments.teacher.noise_schedules import NoiseSchedule


class Contrastive(nn.Module):
    """CLIP's symmetric contrastive loss (2103.00020); batch: pixels (b, 3, s, s), token ids and mask (b, t)."""

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, batch: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
        pixels, ids, mask = batch
        out = self.clip(input_ids=ids, attention_mask=mask, pixel_values=pixels)
        target = torch.arange(len(ids), device=ids.device)
        logits = out.logits_per_image
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        return {"loss": loss, "top1": (logits.argmax(1) == target).float().mean()}


class Reconstruction(nn.Module):
    """Absolute and squared error of pixels, absolute error of their differences, 1e-6 KL, and roughness of latents.

    Batch: pixels (b, 3, s, s) in [-1, 1].

    Args:
        vae: the autoencoder.
        smoothness: weight of `roughness`; 0 where the encoder is not trained.
    """

    def __init__(self, vae: AutoencoderKL, smoothness: float = 0.0) -> None:
        super().__init__()
        self.smoothness = smoothness
        self.vae = vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        posterior = self.vae.encode(pixels).latent_dist
        latents = posterior.sample()
        error = self.vae.decode(latents).sample.float() - pixels
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        psnr = -10 * torch.log10(error.detach().square().mean() / 4)  # the range is 2
        kl = posterior.kl().float().mean()
        rough = roughness(latents.float())
        loss = error.abs().mean() + 2 * error.square().mean() + 0.25 * edges + 1e-6 * kl + self.smoothness * rough
        return {"loss": loss, "psnr": psnr, "kl": kl.detach(), "roughness": rough.detach()}


def roughness(maps: Tensor) -> Tensor:
    """Return the share of the variance of maps (b, c, h, w) that their interpolated 2 × 2 means do not explain.

    An autoencoder left to itself stores detail in latents that resemble noise, and a denoiser learns these slowly
    (2502.14831): of scenes of 64 px, 0.25 for the latents of such an autoencoder and 0.10 for the 4 × 4 means of the
    images. h and w are even.
    """
    coarse = F.interpolate(F.avg_pool2d(maps, 2), scale_factor=2, mode="bilinear")
    return (maps - coarse).square().mean() / maps.var().clamp_min(1e-6)


FOCUS_CENTER = 0.6
"""Mean of the logit of t / 1000 of the timesteps in focus."""
FOCUS_WIDTH = 0.8
"""Its standard deviation: two thirds of these timesteps lie from 450 to 800."""


def draw_timesteps(count: int, steps: int, focus: float, device: torch.device) -> Tensor:
    """Draw timesteps (count,) from 0 … steps - 1: a share `focus` logit-normal around t = 650, the others uniform.

    Where the outline of an object is decided, around t = 650, most is to be learned; near t = 999 almost nothing can
    be. Uniform ones are at least a share 1 - `focus`, so that no timestep is left out. Each distribution is stratified
    over the batch, which lowers the variance of the loss.
    """
    uniform, focused, choice = (_stratified(count, device) for _ in range(3))
    logits = FOCUS_CENTER + FOCUS_WIDTH * torch.special.ndtri(focused)
    return (torch.where(choice < focus, logits.sigmoid(), uniform) * steps).long().clamp(max=steps - 1)


def _stratified(count: int, device: torch.device) -> Tensor:
    """One uniform number (count,) from each of `count` equal parts of 0 … 1, in random order."""
    return (torch.randperm(count, device=device) + torch.rand(count, device=device)) / count


def add_random_noise(latents: Tensor, schedule: NoiseSchedule, focus: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return noisy latents (b, c, h, w), their timesteps (b,) and the targets; `focus` as of `draw_timesteps`."""
    noise = torch.randn_like(latents)
    steps = draw_timesteps(len(latents), schedule.train_timesteps, focus, latents.device)
    return schedule.add_noise(latents, noise, steps), steps, schedule.target(latents, noise, steps)


class Denoising(nn.Module):
    """Prediction of the schedule's target with uniform weights; batch: latents (b, c, s, s), scaled; states (b, t, d).

    Args:
        unet: the network.
        schedule: the noise levels, and what is predicted.
        focus: share of the timesteps that `draw_timesteps` concentrates; 0 draws all of them uniformly.
    """

    def __init__(self, unet: UNet2DConditionModel, schedule: NoiseSchedule, focus: float = 0.0) -> None:
        super().__init__()
        self.focus = focus
        self.unet = unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.schedule = schedule

    def forward(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        latents, states = batch
        noisy, steps, target = add_random_noise(latents, self.schedule, self.focus)
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        return {"loss": (self.unet(noisy, steps, states).sample.float() - target).square().mean()}


class JointDenoising(Denoising):
    """Denoising by a UNet and its text encoder, trained together.

    Batch: latents (b, c, s, s), scaled; token ids (b, t).
    """

    def __init__(
        self, unet: UNet2DConditionModel, text: CLIPTextModel, schedule: NoiseSchedule, focus: float = 0.0
    ) -> None:
        super().__init__(unet, schedule, focus)
        self.text = text

    def forward(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        latents, tokens = batch
        return super().forward((latents, self.text(input_ids=tokens).last_hidden_state))
