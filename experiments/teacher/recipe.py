"""The embedded teacher's recipe as data: architectures and training settings of its three networks."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from experiments.config import FitConfig


class TeacherRecipe(BaseModel):
    """A tiny Stable Diffusion: CLIP, then a VAE, then a UNet on its latents.

    The defaults trained the weights that ship with the package.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    image_size: int = 64
    max_tokens: int = 24
    vocabulary: int = 2600
    clip_width: int = 128
    clip_layers: int = 3
    vae_channels: tuple[int, ...] = (16, 32, 64)
    unet_channels: tuple[int, ...] = (48, 96)
    unet_heads: int = 4
    variations: int = 12  # of background, place and scale an emoji, in the latent cache
    caption_dropout: float = 0.1
    clip: FitConfig = FitConfig(steps=500, batch_size=96, learning_rate=1e-3, weight_decay=0.05, warmup=100)
    vae: FitConfig = FitConfig(steps=2600, batch_size=16, learning_rate=2e-3, ema=0.998, warmup=100)
    unet: FitConfig = FitConfig(steps=2800, batch_size=32, learning_rate=1.5e-3, ema=0.998, warmup=150)

    def scaled(self, share: float) -> TeacherRecipe:
        """The same recipe with every stage's steps times `share` (at least one step), for trials and tests."""
        stages = {n: getattr(self, n) for n in ("clip", "vae", "unet")}
        return self.model_copy(
            update={n: s.model_copy(update={"steps": max(1, round(s.steps * share))}) for n, s in stages.items()}
        )
