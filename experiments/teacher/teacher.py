"""A teacher as distillation sees it: encoders, a UNet and the noise it was trained with, whatever the family."""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from torch import Tensor

Batch = dict[str, Tensor]
"""latents (b, c, h, w), scaled; text (b, t, d); of SDXL also pooled (b, p) and time_ids (b, 6)."""

CONDITIONS = ("text", "pooled", "time_ids")
ENCODERS = ("vae", "text_encoder", "text_encoder_2")


class Teacher:
    """One of Stable Diffusion 1.5, 2.1 or XL, or the embedded one.

    What differs between the families is in the batch: where a pipeline pools its captions, `encode` gives `pooled` and
    `time_ids` too, and `predict` hands them to the UNet.

    Attributes:
        pipe: the diffusers pipeline.
        scheduler: its noise schedule and prediction type, for training.
    """

    def __init__(self, pipe: DiffusionPipeline) -> None:
        self.pipe: Any = pipe
        self.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)

    @property
    def unet(self) -> UNet2DConditionModel:
        """The network that teacher and students share."""
        return self.pipe.unet

    @property
    def device(self) -> torch.device:
        """Where the pipeline is."""
        return torch.device(self.pipe.device)

    @property
    def train_timesteps(self) -> int:
        """How many steps of noise there are."""
        return int(self.scheduler.config.num_train_timesteps)

    @torch.no_grad()
    def encode(self, images: Tensor, captions: list[str]) -> Batch:
        """Images (b, 3, h, w) in [-1, 1] and their captions -> a batch; latents are the posterior's means, scaled."""
        vae = self.pipe.vae
        latents = vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mean * vae.config.scaling_factor
        conditions = self.conditions(captions)
        if "pooled" in conditions:
            height, width = images.shape[-2:]
            ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=latents.dtype, device=latents.device)
            conditions["time_ids"] = ids.repeat(len(images), 1)  # original size, crop, target size
        return {"latents": latents, **conditions}

    @torch.no_grad()
    def conditions(self, captions: list[str]) -> Batch:
        """What the text encoders make of captions: text, and pooled where there are two encoders."""
        text, *others = self.pipe.encode_prompt(
            captions, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"text": text, "pooled": others[1]} if len(others) > 1 else {"text": text}

    def predict(self, noisy: Tensor, timesteps: Tensor, batch: Batch) -> Tensor:
        """What the UNet, as it is mounted now, makes of noisy latents (b, c, h, w) at timesteps (b,)."""
        added = {}
        if "pooled" in batch:
            added = {"added_cond_kwargs": {"text_embeds": batch["pooled"], "time_ids": batch["time_ids"]}}
        return self.unet(noisy, timesteps, batch["text"], **added).sample

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What a perfect model predicts, for the scheduler's prediction type.

        Raises:
            ValueError: the scheduler predicts neither noise nor velocity.
        """
        kind = self.scheduler.config.prediction_type
        if kind == "epsilon":
            return noise
        if kind == "v_prediction":
            return self.scheduler.get_velocity(latents, noise, timesteps)
        raise ValueError(f"Cannot distil a model that predicts {kind!r}: expected epsilon or v_prediction.")

    @cached_property
    def fingerprint(self) -> str:
        """A hash of what `encode` depends on: configurations and weights of the VAE and the text encoders."""
        digest = hashlib.sha256()
        for name in ENCODERS:
            network = getattr(self.pipe, name, None)
            if network is not None:
                digest.update(network.to_json_string().encode() if hasattr(network, "to_json_string") else b"")
                for key, tensor in network.state_dict().items():
                    digest.update(f"{key} {tuple(tensor.shape)}".encode())
                    digest.update(_some(tensor).double().cpu().numpy().tobytes())
        return digest.hexdigest()


def _some(tensor: Tensor) -> Tensor:
    """Up to 4,096 values spread over a tensor: enough to tell two trainings apart."""
    return tensor.detach().flatten()[:: max(1, tensor.numel() // 4096)][:4096]
