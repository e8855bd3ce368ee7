"""What a call of a denoising network takes and returns, whatever its architecture: noise, timesteps, conditions."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

TEXT_TOKENS = 77  # the context length of CLIP's text encoders

Conditions = Mapping[str, Tensor]
"""What a model is conditioned on besides noise and timestep, by the names of `DenoiserCalls.condition_shapes`."""


class DenoiserCalls(ABC):
    """The calls of one model; base of `Host`.

    Attributes:
        predicts_flow: whether the models predict the velocity of a rectified flow, and not noise on a diffusion
            schedule; None: unknown.
        model: the diffusers model.
        network: what `predict` calls: the model, or `torch.compile` of it.
        vae_scale_factor: pixels along one side of a latent pixel.
    """

    predicts_flow: ClassVar[bool | None] = None

    def __init__(self, model: nn.Module, vae_scale_factor: int = 8) -> None:
        self.model: Any = model
        self.network: Any = model
        self.vae_scale_factor = vae_scale_factor

    @abstractmethod
    def condition_shapes(self, batch: int = 1, text_tokens: int = TEXT_TOKENS) -> dict[str, tuple[int, ...]]:
        """Shapes of all conditions of the model, by name.

        The names are `text` (b, t, d), `pooled` (b, p) and `time_ids` (b, 6) of SDXL, and `timestep_cond` (b, g) of
        models with an embedded guidance scale.
        """

    @abstractmethod
    def forward_arguments(self, conditions: Conditions) -> dict[str, Any]:
        """Keyword arguments of the model's forward for these conditions, named as in `condition_shapes`."""

    @abstractmethod
    def latent_shape(self, size: tuple[int, int], batch: int = 1) -> tuple[int, ...]:
        """Shape of the model's noisy input for latents of this (height, width)."""

    def predict(self, noisy: Tensor, timesteps: Tensor, conditions: Conditions, **extra: Any) -> Tensor:
        """Run the model, as it is mounted now.

        Args:
            noisy: latents (b, c, h, w).
            timesteps: (b,) or a scalar, in the numbers of the pipeline's scheduler.
            conditions: named as in `condition_shapes`; others are ignored.
            **extra: further arguments of the model's forward.

        Returns:
            The prediction (b, c, h, w), without the variances that some models predict beside it.
        """
        noise = self._noise_arguments(noisy, timesteps.to(noisy.device).expand(len(noisy)))
        arguments = {**noise, **self.forward_arguments(conditions), **extra}
        output: Tensor = self.network(return_dict=False, **arguments)[0]
        return self._read_output(output, noisy)

    def encode_prompts(
        self, pipe: Any, prompts: Sequence[str], negative_prompts: Sequence[str] | None = None, *, guided: bool = True
    ) -> tuple[Conditions, Conditions]:
        """Encode prompts with the pipeline's own text encoders.

        Args:
            pipe: the pipeline.
            prompts: b of them.
            negative_prompts: as many; None: what the pipeline uses if none is given.
            guided: also encode the negative prompts.

        Returns:
            The conditions of the prompts, and those of the negative prompts, empty unless `guided`.

        Raises:
            TypeError: the model takes no prompts.
        """
        raise TypeError(f"{type(self.model).__name__} takes no prompts: its host does not define encode_prompts")

    def size_conditions(self, size: tuple[int, int], batch: int = 1) -> dict[str, Tensor]:
        """The conditions that depend on the (height, width) of the image in pixels, which is not cropped."""
        return {}

    def timestep_options(self, scheduler: Any, size: tuple[int, int], steps: int) -> dict[str, Any]:
        """Arguments of the scheduler's `set_timesteps` besides the number of steps, as in the model's pipeline.

        Flows may shift their noise levels by the number of image tokens (`use_dynamic_shifting`).

        Args:
            scheduler: of the pipeline.
            size: (height, width) of the latents.
            steps: number of steps.
        """
        config = scheduler.config
        if not config.get("use_dynamic_shifting", False):
            return {}
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift  # pipelines take a second to import

        tokens = (size[0] // self.latent_multiple) * (size[1] // self.latent_multiple)
        lengths = (config.base_image_seq_len, config.max_image_seq_len)
        return {"mu": calculate_shift(tokens, *lengths, config.base_shift, config.max_shift)}

    def sampling_options(self, pipe: Any) -> dict[str, Any]:
        """Arguments with which a call of the pipeline samples exactly the size that is asked for.

        Some pipelines would otherwise sample the nearest size in a table and resize the image
        (`use_resolution_binning`).
        """
        has_table = default_argument(pipe, "use_resolution_binning") is not None
        return {"use_resolution_binning": False} if has_table else {}

    def guidance_scale(self, pipe: Any) -> float:
        """The scale of classifier-free guidance that a call of the pipeline uses if none is given."""
        return float(default_argument(pipe, "guidance_scale", 7.5))

    @property
    def latent_multiple(self) -> int:
        """What the sides of latents must be multiples of: the side of a patch."""
        return int(getattr(self.model.config, "patch_size", 1))

    @property
    def native_latents(self) -> int:
        """Side of the square latents that the model was trained on; of others, of a square with as many latent pixels.

        Raises:
            ValueError: the model's config does not say.
        """
        size = getattr(self.model.config, "sample_size", None)
        if size is None:
            raise ValueError(
                f"the config of this {type(self.model).__name__} does not say on which sample_size it was trained: "
                "pass base_size"
            )
        height, width = size if isinstance(size, tuple | list) else (size, size)
        return round((height * width) ** 0.5)

    @property
    def largest_latents(self) -> int | None:
        """Largest side of latents that the model has positions for; None: any."""
        return None

    @property
    def embeds_guidance(self) -> bool:
        """Whether the guidance scale is a condition of the model, which then needs one prediction per step, not two."""
        return False

    def guidance_conditions(self, pipe: Any, scale: float, batch: int = 1) -> dict[str, Tensor]:
        """The conditions that embed a guidance scale; empty unless `embeds_guidance`."""
        return {}

    def dummy_conditions(self, batch: int = 1, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Normal numbers in the shapes of `condition_shapes`, in the model's dtype and on its device."""
        shapes = self.condition_shapes(batch)
        return {name: self._normal(shape, generator) for name, shape in shapes.items()}

    def dummy_inputs(
        self, size: tuple[int, int], batch: int = 1, generator: torch.Generator | None = None
    ) -> dict[str, Any]:
        """Keyword arguments of one forward pass on random latents, for measurements and tests.

        Args:
            size: (height, width) of the latents.
            batch: images.
            generator: on the CPU; None for torch's default.
        """
        noisy = self._normal(self.latent_shape(size, batch), generator)
        timestep = torch.full((batch,), 500, device=noisy.device)
        conditions = self.dummy_conditions(batch, generator)
        return {**self._noise_arguments(noisy, timestep), **self.forward_arguments(conditions)}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the model computes in; under layerwise casting not the one it is stored in."""
        dtype = getattr(self.model, "dtype", None)
        return dtype if isinstance(dtype, torch.dtype) else next(self.model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the model's first parameter is."""
        return next(self.model.parameters()).device

    @abstractmethod
    def _noise_arguments(self, noisy: Tensor, timestep: Tensor) -> dict[str, Any]:
        """Keyword arguments of the model's forward for noisy latents and timesteps (b,)."""

    def _normal(self, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
        if self.device.type == "meta":
            return torch.empty(shape, dtype=self.dtype, device="meta")
        return torch.randn(shape, generator=generator).to(self.device, self.dtype)

    def _read_output(self, output: Tensor, noisy: Tensor) -> Tensor:
        """The prediction (b, c, h, w) in what the model returns for noisy latents (b, c, h, w)."""
        return output


def default_argument(function: Any, name: str, fallback: Any = None) -> Any:
    """The default of an argument of a function or of a pipeline's call; `fallback` if there is none.

    A pipeline without a call of its own, such as one with random weights, has no defaults.
    """
    if not callable(function):
        return fallback
    parameter = inspect.signature(function).parameters.get(name)
    return fallback if parameter is None or parameter.default is inspect.Parameter.empty else parameter.default
