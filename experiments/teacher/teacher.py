"""A teacher for distillation: encoders, a UNet and the noise schedule it was trained with, whatever the family."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from torch import Tensor

Batch = dict[str, Tensor]
"""latents (b, c, h, w), scaled; text (b, t, d); of SDXL also pooled (b, p) and time_ids (b, 6)."""

CONDITIONS = ("text", "pooled", "time_ids")
ENCODERS = ("vae", "text_encoder", "text_encoder_2")
TOKENIZERS = ("tokenizer", "tokenizer_2")
_PROVENANCE = {"transformers_version", "architectures", "dtype", "torch_dtype"}  # entries that change no result


class Teacher:
    """One of Stable Diffusion 1.5, 2.1 or XL, or the embedded one.

    What differs between the families is in the batch: if a pipeline pools its captions, `encode` also returns `pooled`
    and `time_ids`, and `predict` passes them to the UNet.

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
        """The device of the pipeline."""
        return torch.device(self.pipe.device)

    @property
    def train_timesteps(self) -> int:
        """The number of timesteps of the noise schedule."""
        return int(self.scheduler.config.num_train_timesteps)

    def encode(self, images: Tensor, captions: list[str]) -> Batch:
        """Encode images (b, 3, h, w) in [-1, 1] and their captions as a batch."""
        return {**self.encode_images(images), **self.conditions(captions)}

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Batch:
        """Encode images (b, 3, h, w) in [-1, 1]: latents, which are the posterior's scaled means, and time_ids.

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
        """Whether the UNet is conditioned on pooled captions and the image's size, as SDXL's is."""
        return self.unet.config.addition_embed_type == "text_time"

    def time_ids(self, count: int, size: tuple[int, int]) -> Tensor:
        """SDXL's micro-conditioning (b, 6) of images that were not cropped: original size, crop, target size.

        In float32, because bfloat16 cannot represent 1,032.
        """
        return torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32, device=self.device).repeat(count, 1)

    @torch.no_grad()
    def conditions(self, captions: list[str]) -> Batch:
        """Encode captions: text, and pooled if there are two text encoders."""
        text, _, *pooled = self._encode_prompt(captions, guided=False)
        return {"text": text, "pooled": pooled[0]} if pooled else {"text": text}

    @property
    def unconditional(self) -> Batch:
        """What guidance starts from, of one sample: an empty caption's conditions, or zeros for SDXL."""
        with torch.no_grad():
            _, text, *pooled = self._encode_prompt([""], guided=True)
        return {"text": text[0], "pooled": pooled[1][0]} if pooled else {"text": text[0]}

    def _encode_prompt(self, captions: list[str], guided: bool) -> tuple[Tensor, ...]:
        embeddings: tuple[Tensor, ...] = self.pipe.encode_prompt(
            captions, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=guided
        )
        return embeddings

    def predict(self, noisy: Tensor, timesteps: Tensor, batch: Batch) -> Tensor:
        """Run the UNet, as it is mounted now, on noisy latents (b, c, h, w) at timesteps (b,), in its dtype."""
        dtype = self.unet.dtype
        conditions = {}
        if "pooled" in batch:
            conditions["added_cond_kwargs"] = {"text_embeds": batch["pooled"].to(dtype), "time_ids": batch["time_ids"]}
        return self.unet(noisy.to(dtype), timesteps, batch["text"].to(dtype), **conditions).sample

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return what a perfect model predicts, for the scheduler's prediction type.

        Raises:
            ValueError: the scheduler predicts neither noise nor velocity.
        """
        kind = self.scheduler.config.prediction_type
        if kind == "epsilon":
            return noise
        if kind == "v_prediction":
            return self.scheduler.get_velocity(latents, noise, timesteps)
        raise ValueError(f"Cannot distill a model that predicts {kind!r}: expected epsilon or v_prediction.")

    @property
    def encoder_fingerprint(self) -> str:
        """A SHA-256 of everything that `encode` depends on: autoencoder, text encoders and tokenizers.

        Configurations, weights and precision count. Computed at every call, at about a second per GB of weights.
        """
        digest = hashlib.sha256(json.dumps(self.pipe.config.get("force_zeros_for_empty_prompt")).encode())
        for name in TOKENIZERS:
            digest.update(f"{name} {_describe_tokenizer(getattr(self.pipe, name, None))}".encode())
        for name in ENCODERS:
            _add_network(digest, name, getattr(self.pipe, name, None))
        return digest.hexdigest()

    @property
    def fingerprint(self) -> str:
        """A SHA-256 of everything that a distillation depends on: the encoders, the UNet and the noise schedule.

        No adapter may be mounted. Computed at every call, at about a second per GB of weights.
        """
        schedule = {key: value for key, value in self.scheduler.config.items() if key[0] != "_"}
        digest = hashlib.sha256(self.encoder_fingerprint.encode())
        digest.update(json.dumps(schedule, sort_keys=True, default=str).encode())
        _add_network(digest, "unet", self.unet)
        return digest.hexdigest()


def _add_network(digest: Any, name: str, network: Any) -> None:
    """Add a network's configuration and weights to a digest."""
    digest.update(f"{name} {_describe_config(network)}".encode())
    for key, tensor in network.state_dict().items() if network else ():
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def _describe_config(network: Any) -> str:
    """A network's configuration, without where it was read from and by which version."""
    if network is None:
        return ""
    config = network.config
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    relevant = {key: value for key, value in values.items() if key[0] != "_" and key not in _PROVENANCE}
    return json.dumps(relevant, sort_keys=True, default=str)


def _describe_tokenizer(tokenizer: Any) -> str:
    """A tokenizer's rules, without the padding that its last call used."""
    if tokenizer is None:
        return ""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules = {key: value for key, value in rules.items() if key not in ("padding", "truncation")}
    return json.dumps([rules, tokenizer.special_tokens_map, tokenizer.model_max_length], sort_keys=True, default=str)
