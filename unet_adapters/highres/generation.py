"""The flow of a large image: prompt → base image → twice the size, denoised again, and so on → pixels.

    conditions   the pipeline's own text encoders, once
    stage 1      noise at the base size                      → denoise the whole schedule
    stage n      the previous image, upscaled, noised again  → denoise the last `strength` of the schedule
    pixels       decoded in tiles, to uint8 on the CPU

Every stage denoises the whole image at once, so there are no patches and no seams. An attention that is linear in the
number of pixels makes that affordable.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from unet_adapters.highres.autoencoder import decode_tiled, encode_tiled
from unet_adapters.highres.denoising import ClassifierFreeGuidance, ControlNetCondition, denoise
from unet_adapters.highres.dilation import dilated_convolutions
from unet_adapters.highres.pipeline import (
    blacken_if_unsafe,
    check_largest_size,
    check_not_offloaded,
    check_schedules,
    denoiser,
    encode_prompts,
    guidance_scale,
    native_size,
    size_multiple,
    timestep_options,
    uses_guidance,
    vae_scale_factor,
)
from unet_adapters.highres.plan import MemoryPlan, plan_memory
from unet_adapters.highres.progress import PartCallback, StepCallback
from unet_adapters.highres.request import GenerationRequest, GenerationResult
from unet_adapters.highres.savings import save_memory
from unet_adapters.highres.schedule import DenoisingSchedule
from unet_adapters.highres.skip_residual import SkipResidual
from unet_adapters.highres.stage_store import StageStore, stage_key
from unet_adapters.highres.stages import (
    ImageSize,
    ProgressiveStage,
    check_size,
    enlarging_stages,
    format_size,
    progressive_stages,
)
from unet_adapters.hosts import find_host
from unet_adapters.text_to_image import check_text_to_image


def generate(
    pipe: Any,
    prompt: str,
    size: ImageSize,
    *,
    memory_budget: int | None = None,
    plan: MemoryPlan | None = None,
    image: Image.Image | None = None,
    strength: float | None = None,
    control: ControlNetCondition | None = None,
    stage_dir: str | Path | None = None,
    progress: PartCallback | None = None,
    **options: Any,
) -> GenerationResult:
    """Generate one large image with an unmodified pipeline, of a UNet or of a transformer that has a host.

    Args:
        pipe: the pipeline, with a linear mixer mounted; softmax attention works up to its memory limit.
        prompt: what the image shows.
        size: (height, width) in pixels; multiples of `size_multiple(pipe)`.
        memory_budget: bytes that may be used; savings are chosen so that the image fits. None: no limit.
        plan: a plan made before, instead of a budget.
        image: start from this image, in mode RGB. Without `strength` it is the first stage, of about its own size, and
            the later stages enlarge it (super-resolution); with `strength` it is resized to the first stage's size and
            changed (image to image).
        strength: share of the schedule that the first stage runs on `image`, above 0 and up to 1.
        control: a ControlNet and its image, which is resized to every stage; for UNets.
        stage_dir: folder for the latents of finished stages, from which a run that was killed resumes.
        progress: called as (part, completed, total).
        **options: fields of `GenerationRequest`.

    Returns:
        The image and how it was made; the image is black if the pipeline's safety checker objects to it.

    Raises:
        InsufficientMemoryError: If the budget is too small; the message names the smallest sufficient one.
        ValueError: If the model cannot have this size, the pipeline is offloaded, or an option is invalid.
    """
    request = GenerationRequest(prompt=prompt, size=size, **options)
    check_text_to_image(pipe)
    check_not_offloaded(pipe)
    request = replace(request, guidance=guidance_scale(pipe, request.guidance))
    _check_start(image, strength)
    _check_control(pipe, control, plan)
    stages = _stages(pipe, request, image, strength)
    check_schedules(pipe, request.steps, stages)
    plan = plan or plan_request(pipe, request, memory_budget=memory_budget, with_control=control is not None)
    runner = _StageRunner(pipe, request, plan, control, progress)
    store = StageStore(stage_dir, "" if stage_dir is None else runner.stage_key(image, strength))
    latents, restored = store.load_latest(stages)
    first = restored
    if latents is None and image is not None:
        latents = _encode_image(pipe, image, stages[0].size, plan)
        first = 0 if strength is not None else 1
    for number, stage in list(enumerate(stages))[first:]:
        latents = runner.run(number, stage, latents)
        store.save(stage, latents)
    assert latents is not None
    pixels = decode_tiled(pipe.vae, latents.to(denoiser(pipe).device), plan.tiling, runner.progress_of("pixels"))
    pixels = blacken_if_unsafe(pipe, pixels)
    return GenerationResult(pixels, request, stages, plan, restored)


def plan_request(
    pipe: Any,
    request: GenerationRequest,
    *,
    memory_budget: int | None = None,
    throughput: float | None = None,
    with_control: bool = False,
    device: str | torch.device | None = None,
) -> MemoryPlan:
    """Plan a request; see `plan_memory` for the other arguments, what is returned and what is raised."""
    return plan_memory(
        pipe,
        request.size,
        memory_budget=memory_budget,
        base_size=request.base_size,
        strengths=request.strengths,
        steps=request.steps,
        guidance=request.guidance,
        throughput=throughput,
        direct=request.mode == "direct",
        with_control=with_control,
        device=device,
    )


class _StageRunner:
    """Runs the stages of one image."""

    def __init__(
        self,
        pipe: Any,
        request: GenerationRequest,
        plan: MemoryPlan,
        control: ControlNetCondition | None,
        progress: PartCallback | None,
    ) -> None:
        self.pipe = pipe
        self.request = request
        self.plan = plan
        self.control = control
        self.progress = progress
        self.scale = guidance_scale(pipe, request.guidance)
        self.positive, self.negative = encode_prompts(pipe, request.prompt, request.negative_prompt, self.scale)

    def stage_key(self, image: Image.Image | None, strength: float | None) -> str:
        """Return the key of the stages' files; see `stage_store.stage_key`."""
        conditions = (self.positive, self.negative)
        return stage_key(self.pipe, self.request, self.plan, conditions, image, strength, self.control)

    def progress_of(self, part: str) -> StepCallback | None:
        """Return a callback that reports the progress of one part of the work."""
        progress = self.progress
        return None if progress is None else lambda completed, total: progress(part, completed, total)

    def run(self, number: int, stage: ProgressiveStage, previous: Tensor | None) -> Tensor:
        """Return the latents (1, c, h, w) of a stage, from those of the previous stage or from noise."""
        pipe = self.pipe
        request = self.request
        host = find_host(pipe)
        host.network = denoiser(pipe)  # also what torch.compile made of it
        generator = torch.Generator().manual_seed(request.seed * 1_000_003 + number)
        options = timestep_options(pipe, stage.size, request.steps)
        device = denoiser(pipe).device
        schedule = DenoisingSchedule.create(pipe.scheduler, request.steps, stage.strength, device, options)
        noise = _noise(pipe, stage.size, generator)
        before_step = None
        if previous is None:
            latents = noise * schedule.initial_sigma
        else:
            upscaled = self.upscale(previous.to(denoiser(pipe).device), stage.size)
            latents = schedule.add_noise(upscaled, noise)
            if request.skip_residual is not None:
                before_step = SkipResidual(upscaled, noise, schedule, request.skip_residual)
        dilated = stage.size == request.size and request.dilation > 1
        with (
            save_memory(denoiser(pipe), self.plan.savings, self.plan.chunk_tokens),
            dilated_convolutions(denoiser(pipe), request.dilation) if dilated else nullcontext(),
        ):
            progress = self.progress_of(format_size(stage.size))
            guidance = self.guidance(stage.size)
            return denoise(host, guidance, schedule, latents, generator, progress, before_step)

    def guidance(self, size: ImageSize) -> ClassifierFreeGuidance:
        """Return the guidance at a stage's size, which conditions of some models and ControlNet images depend on."""
        conditions = find_host(self.pipe).size_conditions(size)
        positive = {**self.positive, **conditions}
        negative = {**self.negative, **conditions}
        control = self.control
        if control is not None:
            control = replace(control, image=F.interpolate(control.image, size, mode="bilinear", antialias=True))
        scale = self.scale if uses_guidance(self.pipe, self.scale) else 1.0
        return ClassifierFreeGuidance(positive, negative, scale, "guidance" in self.plan.savings, control)

    def upscale(self, latents: Tensor, size: ImageSize) -> Tensor:
        """Return latents of a smaller image as latents of an image of `size`; unchanged if they have that size."""
        factor = vae_scale_factor(self.pipe)
        latent_size = (size[0] // factor, size[1] // factor)
        if tuple(latents.shape[-2:]) == latent_size:
            return latents
        if self.request.upscale == "latents":
            return F.interpolate(latents, latent_size, mode="bicubic")
        pixels = decode_tiled(self.pipe.vae, latents, self.plan.tiling)
        return _encode_image(self.pipe, Image.fromarray(pixels.numpy()), size, self.plan)


def _check_start(image: Image.Image | None, strength: float | None) -> None:
    if image is not None and image.mode != "RGB":
        raise ValueError(f"image: expected mode RGB, got {image.mode}. Convert it first, 16-bit values to 8 bits.")
    if strength is not None and (image is None or not 0 < strength <= 1):
        raise ValueError(f"strength={strength}: expected a number above 0 and up to 1, together with an image.")


def _check_control(pipe: Any, control: ControlNetCondition | None, plan: MemoryPlan | None) -> None:
    if control is None:
        return
    if not hasattr(denoiser(pipe), "down_blocks"):
        raise ValueError(
            f"control: a ControlNet guides the levels of a UNet, and this pipeline has a "
            f"{type(denoiser(pipe)).__name__}: leave it out."
        )
    if plan is not None and "skips" in plan.savings:
        raise ValueError(
            "plan: the saving skips does not work with a ControlNet, whose residuals are added to skip connections. "
            "Plan with with_control=True, or pass memory_budget."
        )


def _stages(
    pipe: Any, request: GenerationRequest, image: Image.Image | None, strength: float | None
) -> tuple[ProgressiveStage, ...]:
    """Return the stages to run; the first one is the image itself if there is one and no strength to change it with."""
    multiple = size_multiple(pipe)
    check_size(request.size, multiple)
    check_largest_size(pipe, request.size)
    if request.dilation > 1 and not hasattr(denoiser(pipe), "down_blocks"):
        raise ValueError(f"dilation={request.dilation} is for the convolutions of a UNet: leave it out.")
    if request.mode == "direct":
        if image is not None and strength is None:
            raise ValueError("Cannot enlarge an image in mode direct: use mode progressive, or pass a strength.")
        return (ProgressiveStage(request.size, strength or 1.0),)
    base_size = request.base_size or native_size(pipe)
    if image is not None and strength is None:
        image_size = (image.height, image.width)
        return enlarging_stages(request.size, image_size, base_size, multiple, request.strengths)
    first, *later = progressive_stages(request.size, base_size, multiple, request.strengths)
    return (replace(first, strength=strength or 1.0), *later)


def _encode_image(pipe: Any, image: Image.Image, size: ImageSize, plan: MemoryPlan) -> Tensor:
    """Return the latents of an image after resizing it to `size`."""
    resized = image.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    pixels = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8).view(size[0], size[1], 3)
    return encode_tiled(pipe.vae, pixels, plan.tiling).to(denoiser(pipe).device, denoiser(pipe).dtype)


def _noise(pipe: Any, size: ImageSize, generator: torch.Generator) -> Tensor:
    factor = vae_scale_factor(pipe)
    shape = (1, pipe.vae.config.latent_channels, size[0] // factor, size[1] // factor)
    return torch.randn(shape, generator=generator).to(denoiser(pipe).device, denoiser(pipe).dtype)
