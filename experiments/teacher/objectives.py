"""What each stage of the teacher's training minimizes: modules from a batch to a dictionary of losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPModel


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
    """Squared error + 0.1 absolute error + 1e-6 KL; batch: pixels (b, 3, s, s) in [-1, 1]."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        posterior = self.vae.encode(pixels).latent_dist
        error = self.vae.decode(posterior.sample()).sample - pixels
        mse = error.square().mean()
        psnr = -10 * torch.log10(mse.detach() / 4)  # the range is 2
        return {"loss": mse + 0.1 * error.abs().mean() + 1e-6 * posterior.kl().mean(), "psnr": psnr}


class Denoising(nn.Module):
    """Velocity prediction with min-SNR-5 weights (2303.09556); batch: latents (b, 4, s, s), text states (b, t, d)."""

    def __init__(self, unet: UNet2DConditionModel, scheduler: DDIMScheduler) -> None:
        super().__init__()
        self.unet = unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.scheduler = scheduler

    def forward(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        latents, text = batch
        noise = torch.randn_like(latents)
        steps = torch.randint(0, self.scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
        noisy = self.scheduler.add_noise(latents, noise, steps).contiguous(memory_format=torch.channels_last)
        target = self.scheduler.get_velocity(latents, noise, steps)
        error = (self.unet(noisy, steps, text).sample - target).square().mean(dim=(1, 2, 3))
        signal = self.scheduler.alphas_cumprod.to(latents.device)[steps]
        snr = signal / (1 - signal)
        return {"loss": (error * snr.clamp(max=5) / (snr + 1)).mean() * 4, "error": error.mean()}
