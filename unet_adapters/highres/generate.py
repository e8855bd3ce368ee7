"""THE flow of a large image: prompt -> base image -> twice the size, denoised again, and so on -> pixels.

    conditions   the pipeline's own text encoders, once
    stage 1      noise at the base size                     -> denoise, the whole schedule
    stage n      the image before, enlarged, noised again   -> denoise, the last `strength` of the schedule
    pixels       the autoencoder in tiles, to uint8 on the CPU

Every stage denoises the whole image at once: no patches, no seams. That is what an attention linear in the number of
pixels buys.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from unet_adapters.highres import vae as autoencoder
from unet_adapters.highres.denoise import Control, Guide, Schedule, denoise
from unet_adapters.highres.ladder import STRENGTHS, Size, Stage, check_size, ladder, shown
from unet_adapters.highres.plan import Plan, latent_unit, make_plan, native_side, pixels_a_place
from unet_adapters.highres.savings import save_memory
from unet_adapters.highres.tricks import SkipResidual, dilated_convolutions

Mode = Literal["progressive", "direct"]
Report = Callable[[str, int, int], None]
"""(what, done, of how many)."""


@dataclass(frozen=True)
class Request:
    """What image is wanted, as plain values: the metadata of the picture, and the name of its kept stages.

    Attributes:
        prompt, negative_prompt: what it shows, and what not.
        size: (height, width) in pixels.
        mode: `progressive` from the base size up, or `direct`: from noise at the full size, for study.
        base: side of the first stage's square; None is the size that the model was trained on.
        strengths: of the later stages.
        steps, guidance, seed: as of any diffusion pipeline.
        enlarge: how an image goes to twice its size: as `pixels` (decoded, bicubic, encoded) or as `latents`.
        residual: cosine power of DemoFusion's skip residual (2311.16973, eq. 5); None is none.
        dilation: of the 3 × 3 convolutions in the last stage (ScaleCrafter, 2310.07702); 1 is none.
    """

    prompt: str
    negative_prompt: str = ""
    size: Size = (1024, 1024)
    mode: Mode = "progressive"
    base: int | None = None
    strengths: tuple[float, ...] = STRENGTHS
    steps: int = 50
    guidance: float = 7.5
    seed: int = 0
    enlarge: Literal["pixels", "latents"] = "pixels"
    residual: float | None = None
    dilation: int = 1

    def __post_init__(self) -> None:
        if self.mode not in ("progressive", "direct") or self.enlarge not in ("pixels", "latents"):
            raise ValueError(
                f"Expected mode progressive or direct and enlarge pixels or latents, got {self.mode!r} and "
                f"{self.enlarge!r}."
            )
        if self.steps < 1 or self.guidance < 1 or self.dilation < 1:
            raise ValueError(
                f"Expected steps, guidance and dilation of 1 or more, got {self.steps}, {self.guidance} and "
                f"{self.dilation}."
            )


@dataclass(frozen=True)
class Result:
    """An image and how it came about.

    Attributes:
        pixels: (height, width, 3), uint8.
        request: what was asked for.
        stages: those that ran or were found.
        plan: memory, savings and tiling.
    """

    pixels: Tensor
    request: Request
    stages: tuple[Stage, ...]
    plan: Plan
    resumed: int = field(default=0)

    def save(self, path: str | Path, **more: Any) -> None:
        """Write a PNG that tells in its metadata, as JSON under the name `mixers`, how it was made, and `more`."""
        made: dict[str, Any] = {"stages": [asdict(stage) for stage in self.stages], "savings": self.plan.savings}
        made |= {"tiling": asdict(self.plan.tiling), **more}
        told = PngInfo()
        told.add_text("mixers", json.dumps({**asdict(self.request), **made}))
        Image.fromarray(self.pixels.numpy()).save(path, format="PNG", pnginfo=told)


def generate(
    pipe: Any,
    prompt: str,
    size: Size,
    *,
    memory: int | None = None,
    plan: Plan | None = None,
    image: Image.Image | None = None,
    strength: float | None = None,
    control: Control | None = None,
    keep: str | Path | None = None,
    report: Report | None = None,
    **options: Any,
) -> Result:
    """Make one large image with a Stable Diffusion pipeline, as it is: SD-1.5, SD-2.1, SDXL or the embedded one.

    Args:
        pipe: the pipeline, a linear mixer mounted in its UNet; softmax works as far as its memory goes.
        prompt: what it shows.
        size: (height, width) in pixels; multiples of `plan.latent_unit(pipe)`.
        memory: bytes that may be used; savings are chosen so that it holds.
        plan: one made before, instead.
        image: start from this picture: it is taken for the result of a stage of its size (super-resolution); with
            `strength`, it is brought to the first stage's size and changed by that much (image to image).
        control: a ControlNet and its picture, which is resized to every stage.
        keep: a folder in which every stage's latents are kept: a run that was killed goes on after the last one there.
        report: called as (what, done, of how many).
        **options: of `Request`.

    Returns:
        The image and how it was made.

    Raises:
        TooLittleMemory: the budget is too small; the message says what is enough.
        ValueError: a size the model cannot have, or unknown options.
    """
    request = Request(prompt=prompt, size=size, **options)
    stages = _stages(pipe, request, image if strength is None else None)
    plan = plan or _plan(pipe, request, memory)
    run = _Run(pipe, request, plan, control, report)
    store = _Store(None if keep is None else Path(keep), pipe, request, image, strength, control)
    latents, first = store.latest(stages)
    resumed = first
    if latents is None and image is not None:
        latents, first = _encoded(pipe, image, stages[0].size, plan), 0 if strength is not None else 1
    if strength is not None:
        stages = (replace(stages[0], strength=strength), *stages[1:])
    for number, stage in list(enumerate(stages))[first:]:
        latents = run.stage(number, stage, latents)
        store.keep(stage, latents)
    assert latents is not None
    pixels = autoencoder.decode(pipe.vae, latents.to(pipe.unet.device), plan.tiling, run.told("pixels"))
    return Result(pixels, request, stages, plan, resumed)


class _Run:
    """What the stages of one image share."""

    def __init__(self, pipe: Any, request: Request, plan: Plan, control: Control | None, report: Report | None) -> None:
        self.pipe, self.request, self.plan, self.control, self.report = pipe, request, plan, control, report
        self.positive, self.negative = _conditions(pipe, request)

    def told(self, what: str) -> Callable[[int, int], None] | None:
        """A report of this part of the work."""
        report = self.report
        return None if report is None else lambda done, total: report(what, done, total)

    def stage(self, number: int, stage: Stage, before: Tensor | None) -> Tensor:
        """The latents of a stage (1, c, h, w), from those of the one before."""
        pipe, request = self.pipe, self.request
        generator = torch.Generator().manual_seed(request.seed * 1_000_003 + number)
        schedule = Schedule.of(pipe.scheduler, request.steps, stage.strength, pipe.unet.device)
        start = None if before is None else self.enlarged(before.to(pipe.unet.device), stage.size)
        noise = _noise(pipe, stage.size, generator)
        first = noise * schedule.scheduler.init_noise_sigma
        latents = first if start is None else schedule.noised(start, noise)
        trick = None
        if start is not None and request.residual is not None:
            trick = SkipResidual(start, noise, schedule, request.residual)
        dilated = stage.size == request.size and request.dilation > 1
        with (
            save_memory(pipe.unet, self.plan.savings, self.plan.chunk_tokens),
            dilated_convolutions(pipe.unet, request.dilation) if dilated else nullcontext(),
        ):
            told = self.told(shown(stage.size))
            return denoise(pipe.unet, self.guide(stage.size), schedule, latents, generator, told, trick)

    def guide(self, size: Size) -> Guide:
        """What the UNet is told at this size."""
        ids = torch.tensor([[*size, 0, 0, *size]], device=self.pipe.unet.device, dtype=self.pipe.unet.dtype)
        sized = [{**c, **({"time_ids": ids} if "pooled" in c else {})} for c in (self.positive, self.negative)]
        control = self.control
        if control is not None:
            control = replace(control, image=F.interpolate(control.image, size, mode="bilinear", antialias=True))
        return Guide(sized[0], sized[1], self.request.guidance, "guidance" in self.plan.savings, control)

    def enlarged(self, latents: Tensor, size: Size) -> Tensor:
        """Latents of a smaller image as those of one of `size`; as they are where the size is theirs already."""
        factor = pixels_a_place(self.pipe)
        if tuple(latents.shape[-2:]) == (size[0] // factor, size[1] // factor):
            return latents
        if self.request.enlarge == "latents":
            return F.interpolate(latents, (size[0] // factor, size[1] // factor), mode="bicubic")
        small = autoencoder.decode(self.pipe.vae, latents, self.plan.tiling)
        return _encoded(self.pipe, Image.fromarray(small.numpy()), size, self.plan)


class _Store:
    """The latents of finished stages on disk; without a folder, nothing."""

    def __init__(self, folder: Path | None, pipe: Any, request: Request, *given: Any) -> None:
        self.folder, self.key = folder, ""
        if folder is None:
            return
        # What a stage depends on, so that another request's stages, or another model's, are not taken for this one's.
        depends = [asdict(request), dict(pipe.scheduler.config), [_essence(part) for part in (pipe.unet, *given)]]
        self.key = hashlib.sha256(json.dumps(depends, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def latest(self, stages: Sequence[Stage]) -> tuple[Tensor | None, int]:
        """The latents of the last stage that is there, and the number of the stage after it."""
        for number in reversed(range(len(stages))):
            path = self._path(stages[number])
            if path is not None and path.is_file():
                try:
                    with safe_open(path, framework="pt") as file:
                        return file.get_tensor("latents"), number + 1
                except SafetensorError:
                    continue  # damaged: the one before will do
        return None, 0

    def keep(self, stage: Stage, latents: Tensor) -> None:
        """Write a stage's latents, in one stroke."""
        path = self._path(stage)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_suffix(".partial")
            save_file({"latents": latents.cpu().contiguous()}, aside)
            aside.replace(path)

    def _path(self, stage: Stage) -> Path | None:
        name = f"{self.key}-{stage.size[0]}x{stage.size[1]}.safetensors"
        return None if self.folder is None else self.folder / name


def _essence(given: Any) -> Any:
    """What tells one input of an image from another: of a network some of every weight, of a picture all of it."""
    if isinstance(given, Control):
        return [_essence(part) for part in (given.network, given.image, given.scale)]
    if isinstance(given, nn.Module):
        return [(name, str(p.dtype), p.flatten()[:: max(1, p.numel() // 16)].tolist()) for name, p in _state(given)]
    if isinstance(given, Tensor):
        return hashlib.sha256(given.detach().float().cpu().numpy().tobytes()).hexdigest()
    return hashlib.sha256(given.convert("RGB").tobytes()).hexdigest() if isinstance(given, Image.Image) else given


def _state(network: nn.Module) -> list[tuple[str, Tensor]]:
    return [*network.named_parameters(), *network.named_buffers()]


def _stages(pipe: Any, request: Request, given: Image.Image | None) -> tuple[Stage, ...]:
    """The stages to run; with a given image, those larger than it, after one that it stands for."""
    unit = latent_unit(pipe)
    check_size(request.size, unit)
    if request.mode == "direct":
        if given is not None:
            raise ValueError("An image is made larger stage by stage: leave mode at progressive, or give a strength.")
        return (Stage(request.size, 1.0),)
    stages = ladder(request.size, request.base or native_side(pipe), unit, request.strengths)
    if given is None:
        return stages
    larger = [stage for stage in stages if stage.size[0] * stage.size[1] > given.width * given.height]
    if not larger:
        raise ValueError(
            f"The image has {shown((given.height, given.width))} pixels already: give a larger size than that, or a "
            "strength to change it by."
        )
    return (replace(stages[len(stages) - len(larger) - 1], strength=1.0), *larger)


def _plan(pipe: Any, request: Request, memory: int | None) -> Plan:
    return make_plan(
        pipe,
        request.size,
        budget=memory,
        base=request.base,
        strengths=request.strengths,
        steps=request.steps,
        guidance=request.guidance,
        direct=request.mode == "direct",
    )


def _encoded(pipe: Any, image: Image.Image, size: Size, plan: Plan) -> Tensor:
    """The latents of an image brought to `size`."""
    resized = image.convert("RGB").resize((size[1], size[0]), Image.Resampling.BICUBIC)
    pixels = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8).view(size[0], size[1], 3)
    return autoencoder.encode(pipe.vae, pixels, plan.tiling).to(pipe.unet.device, pipe.unet.dtype)


def _noise(pipe: Any, size: Size, generator: torch.Generator) -> Tensor:
    factor = pixels_a_place(pipe)
    shape = (1, pipe.vae.config.latent_channels, size[0] // factor, size[1] // factor)
    return torch.randn(shape, generator=generator).to(pipe.unet.device, pipe.unet.dtype)


def _conditions(pipe: Any, request: Request) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """What the pipeline's text encoders make of the prompt and of the negative one."""
    with torch.no_grad():
        found = pipe.encode_prompt(
            request.prompt,
            device=pipe.unet.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
            negative_prompt=request.negative_prompt,
        )
    if len(found) == 2:
        return {"text": found[0]}, {"text": found[1]}
    return {"text": found[0], "pooled": found[2]}, {"text": found[1], "pooled": found[3]}
