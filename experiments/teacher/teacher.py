"""A teacher as distillation sees it: encoders, a UNet and the noise it was trained with, whatever the family."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from torch import Tensor

Batch = dict[str, Tensor]
"""latents (b, c, h, w), scaled; text (b, t, d); of SDXL also pooled (b, p) and time_ids (b, 6)."""

CONDITIONS = ("text", "pooled", "time_ids")
ENCODERS = ("vae", "text_encoder", "text_encoder_2")
TOKENIZERS = ("tokenizer", "tokenizer_2")
_PROVENANCE = {"transformers_version", "architectures", "dtype", "torch_dtype"}  # of a configuration: no setting


class Teacher:
    """One of Stable Diffusion 1.5, 2.1 or XL, or the embedded one.

    What differs between the families is in the batch: where a pipeline pools its captions, `encode` gives `pooled` and
    `time_ids` too, and `predict` hands them to the UNet.

    Attributes:
        pipe: the diffusers pipeline.
        scheduler: its noise schedule and prediction type, for training.
    """

    def __init__(self, pipe: DiffusionPipeline) -> None:
        """Use `pipe` as a teacher.

        Raises:
            ValueError: If its UNet takes the guidance scale as an input, which training does not choose.
        """
        self.pipe: Any = pipe
        width = getattr(self.unet.config, "time_cond_proj_dim", None)
        if width is not None:
            raise ValueError(
                f"Cannot distill a UNet that takes the guidance scale as an input (time_cond_proj_dim={width}), such "
                "as a full LCM model. Distill the model that it was made from, and load an LCM-LoRA on the result."
            )
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

    def encode(self, images: Tensor, captions: list[str]) -> Batch:
        """Images (b, 3, h, w) in [-1, 1] and their captions -> a batch."""
        return {**self.encode_images(images), **self.conditions(captions)}

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Batch:
        """Images (b, 3, h, w) in [-1, 1] -> their part of a batch: latents, the posterior's means, scaled; time_ids.

        Latents have the autoencoder's dtype.
        """
        vae = self.pipe.vae
        latents = vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mean * vae.config.scaling_factor
        if not self.pools:
            return {"latents": latents}
        count, _, height, width = images.shape
        return {"latents": latents, "time_ids": self.time_ids(count, (height, width))}

    @property
    def pools(self) -> bool:
        """Whether the UNet is told pooled captions and the image's size, as SDXL's is."""
        return self.unet.config.addition_embed_type == "text_time"

    def time_ids(self, count: int, size: tuple[int, int]) -> Tensor:
        """SDXL's micro-conditioning (b, 6): original size, crop, target size; of images that were not cropped.

        In float32: bfloat16 has no 1,032.
        """
        return torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32, device=self.device).repeat(count, 1)

    @torch.no_grad()
    def conditions(self, captions: list[str]) -> Batch:
        """What the text encoders make of captions: text, and pooled where there are two encoders."""
        text, _, *pooled = self._prompt(captions, guided=False)
        return {"text": text, "pooled": pooled[0]} if pooled else {"text": text}

    @cached_property
    def unconditional(self) -> Batch:
        """What the pipeline guides away from, of one sample: an empty caption's conditions; zeros, for SDXL."""
        with torch.no_grad():
            _, text, *pooled = self._prompt([""], guided=True)
        return {"text": text[0], "pooled": pooled[1][0]} if pooled else {"text": text[0]}

    def _prompt(self, captions: list[str], guided: bool) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = self.pipe.encode_prompt(
            captions, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=guided
        )
        return found

    def predict(self, noisy: Tensor, timesteps: Tensor, batch: Batch) -> Tensor:
        """What the UNet, as it is mounted now, makes of noisy latents (b, c, h, w) at timesteps (b,); in its dtype."""
        added, dtype = {}, self.unet.dtype
        if "pooled" in batch:
            added["added_cond_kwargs"] = {"text_embeds": batch["pooled"].to(dtype), "time_ids": batch["time_ids"]}
        return self.unet(noisy.to(dtype), timesteps, batch["text"].to(dtype), **added).sample

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
        raise ValueError(f"Cannot distill a model that predicts {kind!r}: expected epsilon or v_prediction.")

    @cached_property
    def fingerprint(self) -> str:
        """A SHA-256 of all that `encode` depends on: configurations and weights of the autoencoder, the text encoders
        and the tokenizers, in their precision. About a second per GB of weights.
        """
        digest = hashlib.sha256(json.dumps(self.pipe.config.get("force_zeros_for_empty_prompt")).encode())
        for name in TOKENIZERS:
            digest.update(f"{name} {_tokenizer(getattr(self.pipe, name, None))}".encode())
        for name in ENCODERS:
            network = getattr(self.pipe, name, None)
            digest.update(f"{name} {_config(network)}".encode())
            for key, tensor in network.state_dict().items() if network else ():
                digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()


def _config(network: Any) -> str:
    """A network's configuration, without what depends on where it was read from and by which version."""
    if network is None:
        return ""
    config = network.config
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    kept = {key: value for key, value in values.items() if key[0] != "_" and key not in _PROVENANCE}
    return json.dumps(kept, sort_keys=True, default=str)


def _tokenizer(tokenizer: Any) -> str:
    """What a tokenizer does, without the padding that its last call asked for."""
    if tokenizer is None:
        return ""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = {key: value for key, value in rules.items() if key not in ("padding", "truncation")}
    return json.dumps([kept, tokenizer.special_tokens_map, tokenizer.model_max_length], sort_keys=True, default=str)
