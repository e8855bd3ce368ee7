"""The embedded teacher's recipe as data: architectures and training settings of its networks."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from experiments.config import FitConfig

OPEN_ENDED = FitConfig(
    steps=1_000_000,
    batch_size=48,
    learning_rate=1.2e-3,
    optimizer="muon",
    weight_decay=0.01,
    ema=0.9995,
    warmup=600,
    schedule="inverse_sqrt",
    mixed_precision="bf16",
    checkpoint_every=200,
)
"""The settings of a training that goes on until it is stopped."""


class TeacherRecipe(BaseModel):
    """A tiny Stable Diffusion on scenes: an autoencoder, then a UNet and its text encoder, trained jointly.

    The training of the UNet is open-ended: a slowly falling learning rate and a weight average, with a short decay from
    a copy of the state (`decay`) before an export.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    image_size: int = 64
    max_tokens: int = 20
    vocabulary: int = 1600
    latent_channels: int = 8
    vae_channels: tuple[int, ...] = (32, 48, 64)
    vae_crop: int = 32  # pixels; the autoencoder learns from crops, and its decoder then from whole images
    latent_smoothness: float = 0.02  # weight of the latents' roughness; with 0.02 they are as smooth as the images
    text_width: int = 128
    text_layers: int = 2
    unet_channels: tuple[int, ...] = (64, 128)
    unet_heads: tuple[int, ...] = (2, 4)
    unet_transformers: int = 2  # layers per block; most of the mixing is theirs
    unet_groups: int = 4  # of group norms, which mix the whole image: few
    shard: int = 4096  # scenes per file of cached latents
    shards: int = 44
    caption_dropout: float = 0.1
    timestep_focus: float = 0.5  # share of the timesteps that are drawn around t = 650
    large_sizes: tuple[int, ...] = (128,)  # px; every tenth batch has one of them
    large_from: int = 20_000  # step; the decay always has them
    dit_width: int = 128
    dit_heads: int = 4
    dit_layers: int = 10
    dit_large_from: int = 20_000  # as `large_from`
    judge_width: int = 96
    judge_layers: int = 3
    vae: FitConfig = FitConfig(
        steps=3200, batch_size=16, learning_rate=1e-3, ema=0.998, warmup=100, mixed_precision="bf16"
    )
    decoder: FitConfig = FitConfig(
        steps=2500, batch_size=8, learning_rate=1e-3, ema=0.998, warmup=100, mixed_precision="bf16"
    )
    unet: FitConfig = OPEN_ENDED
    dit: FitConfig = OPEN_ENDED.model_copy(update={"batch_size": 16})
    decay: int = 500  # steps from the learning rate reached to a tenth of it
    decay_ema: float = 0.99
    judge: FitConfig = FitConfig(steps=1500, batch_size=96, learning_rate=1e-3, weight_decay=0.05, warmup=100, seed=7)

    def identity(self) -> dict[str, Any]:
        """What a training state is of, by architecture and stage.

        Left out is what may change while a training goes on: how long the open-ended ones do, their precision, the size
        of their batches, the decay, and what is logged and kept.
        """
        bookkeeping = {"checkpoint_every", "keep", "log_every", "trackers"}
        whole = ("vae", "decoder", "judge")
        open_ended = ("unet", "dit")
        free = {"steps", "batch_size", "mixed_precision"}
        stages = {name: getattr(self, name).model_dump(mode="json", exclude=bookkeeping) for name in whole}
        for name in open_ended:
            stages[name] = getattr(self, name).model_dump(mode="json", exclude=bookkeeping | free)
        left_out = {"decay", "decay_ema", *whole, *open_ended}
        return {"architecture": self.model_dump(mode="json", exclude=left_out), **stages}

    def scaled(self, share: float) -> TeacherRecipe:
        """The same recipe with every stage's steps times `share` (at least one step), for trials and tests."""
        stages = {name: getattr(self, name) for name in ("vae", "decoder", "unet", "dit", "judge")}
        changed = {n: s.model_copy(update={"steps": max(1, round(s.steps * share))}) for n, s in stages.items()}
        return self.model_copy(update={**changed, "decay": max(1, round(self.decay * share))})

    def with_batch_size(self, batch_size: int | None) -> TeacherRecipe:
        """The same recipe with another batch size of the UNet, for other devices; None changes nothing."""
        if batch_size is None:
            return self
        return self.model_copy(update={"unet": self.unet.model_copy(update={"batch_size": batch_size})})

    def with_precision(self, precision: Literal["bf16", "no"] | None) -> TeacherRecipe:
        """The same recipe with another precision of the UNet's training, for other devices; None changes nothing."""
        if precision is None:
            return self
        return self.model_copy(update={"unet": self.unet.model_copy(update={"mixed_precision": precision})})
