"""A teacher for distillation: encoders, a denoising network and its noise schedule, whatever the family."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from experiments.core.fingerprints import weights_version
from experiments.teacher.noise_schedules import create_noise_schedule
from unet_adapters.hosts import find_host

Batch = dict[str, Tensor]
"""latents (b, c, h, w), scaled, and the conditions of the model by the names of its host: text (b, t, d), pooled, …"""

IN_MODEL_DTYPE = frozenset({"text", "text_t5", "pooled"})
"""Conditions that a model gets in its own dtype; sizes stay exact."""

EMBEDDED_GUIDANCE = 3.5
"""The guidance scale at which Flux's own pipeline samples by default."""

ENCODERS = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
_PROVENANCE = {"transformers_version", "architectures", "dtype", "torch_dtype"}  # entries that change no result


class Teacher:
    """A text-to-image pipeline as distillation uses it, whatever its architecture and noise schedule.

    What differs between the families is in the batch: `encode` returns the conditions of the pipeline's model by the
    names of its `Host`, and `predict` passes them on.

    Attributes:
        pipe: the diffusers pipeline.
        host: of its denoising network.
        scheduler: the noise levels of training, and what is predicted.
        guidance: the guidance scale that guidance-distilled models are trained and compared at.
    """

    def __init__(self, pipe: DiffusionPipeline, guidance: float = EMBEDDED_GUIDANCE) -> None:
        self.pipe: Any = pipe
        self.host = find_host(pipe)
        self.scheduler = create_noise_schedule(pipe.scheduler)
        self.guidance = guidance
        self._fingerprint: tuple[Any, str] | None = None  # what it was computed from, and the digest

    @property
    def denoiser(self) -> Any:
        """The network that teacher and students share: a UNet or a transformer."""
        return self.host.model

    @property
    def device(self) -> torch.device:
        """The device of the pipeline."""
        return torch.device(self.pipe.device)

    @property
    def train_timesteps(self) -> int:
        """The number of timesteps of the noise schedule."""
        return self.scheduler.train_timesteps

    def encode(self, images: Tensor, captions: list[str]) -> Batch:
        """Encode images (b, 3, h, w) in [-1, 1] and their captions as a batch."""
        return {**self.encode_images(images), **self.conditions(captions)}

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Batch:
        """Encode images (b, 3, h, w) in [-1, 1]: latents, which are the posterior's scaled means, and size conditions.

        Latents have the autoencoder's dtype.
        """
        vae = self.pipe.vae
        means = vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mean
        latents = (means - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
        count, _, height, width = images.shape
        return {"latents": latents, **self.host.size_conditions((height, width), count)}

    @torch.no_grad()
    def conditions(self, captions: list[str]) -> Batch:
        """Encode captions: text, and pooled or text_mask if the pipeline makes them."""
        return dict(self.host.encode_prompts(self.pipe, captions, guided=False)[0])

    @property
    def unconditional(self) -> Batch:
        """What guidance starts from, of one sample: an empty caption's conditions, or zeros for SDXL."""
        with torch.no_grad():
            _, negative = self.host.encode_prompts(self.pipe, [""], guided=True)
        return {name: value[0] for name, value in negative.items()}

    def predict(self, noisy: Tensor, timesteps: Tensor, batch: Batch) -> Tensor:
        """Run the network, as it is mounted now, on noisy latents (b, c, h, w) at timesteps (b,), in its dtype."""
        dtype = self.denoiser.dtype
        conditions = {name: batch[name].to(dtype) if name in IN_MODEL_DTYPE else batch[name] for name in batch}
        conditions |= self.host.guidance_conditions(self.pipe, self.guidance, len(noisy))
        return self.host.predict(noisy.to(dtype), self.scheduler.model_timesteps(timesteps), conditions)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return what a perfect model predicts, for the scheduler's prediction type."""
        return self.scheduler.target(latents, noise, timesteps)

    @property
    def encoder_fingerprint(self) -> str:
        """A SHA-256 of everything that `encode` depends on: autoencoder, text encoders and tokenizers.

        Configurations, weights and precision count. Computed at every call, at about a second per GB of weights.
        """
        digest = hashlib.sha256(self._empty_prompt().encode())
        for name in _present(self.pipe, TOKENIZERS):
            digest.update(f"{name} {_describe_tokenizer(getattr(self.pipe, name, None))}".encode())
        for name in _present(self.pipe, ENCODERS):
            _add_network(digest, name, getattr(self.pipe, name, None))
        return digest.hexdigest()

    @property
    def fingerprint(self) -> str:
        """A SHA-256 of everything that a distillation depends on: the encoders, the network and the noise schedule.

        No adapter may be mounted. Computed at about a second per GB of weights, and again only after a change.
        """
        networks = [getattr(self.pipe, name, None) for name in ENCODERS] + [self.denoiser]
        tokenizers = [_describe_tokenizer(getattr(self.pipe, name, None)) for name in TOKENIZERS]
        settings = [self._schedule_settings(), self._empty_prompt(), *tokenizers, *map(_describe_config, networks)]
        state = (settings, [weights_version(network) for network in networks if network is not None])
        if self._fingerprint is None or self._fingerprint[0] != state:
            digest = hashlib.sha256(self.encoder_fingerprint.encode())
            digest.update(self._schedule_settings().encode())
            _add_network(digest, "unet", self.denoiser)
            self._fingerprint = (state, digest.hexdigest())
        return self._fingerprint[1]

    def _empty_prompt(self) -> str:
        return json.dumps(self.pipe.config.get("force_zeros_for_empty_prompt"))

    def _schedule_settings(self) -> str:
        schedule = {key: value for key, value in self.scheduler.config.items() if key[0] != "_"}
        return json.dumps(schedule, sort_keys=True, default=str)


def _present(pipe: Any, names: tuple[str, ...]) -> list[str]:
    """The parts to describe: the first two of a kind in any case, a third one where there is such a part."""
    return [name for name in names if not name.endswith("_3") or getattr(pipe, name, None) is not None]


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
