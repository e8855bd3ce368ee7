"""A large image, or its plan, from plain words: what `mixlab generate` and `mixlab plan` do."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from rich.table import Table

from experiments.config import Frozen
from experiments.highres.models import mount, open_model
from unet_adapters.highres import Plan, Result, generate, make_plan
from unet_adapters.highres.generate import Report, Request
from unet_adapters.highres.ladder import Size
from unet_adapters.highres.plan import foresee_step, pixels_a_place, told

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Where(Frozen):
    """The model, what is mounted in it, and where it runs.

    Attributes:
        model: `embedded`, a folder, a Hub id, or `random:SD-1.5` for an architecture with random weights.
        adapter: folder or Hub id of a distilled student, ours or LinFusion's.
        mixer: mounted as it is, untrained, where there is no adapter.
        device, dtype: None takes a GPU where there is one, and bfloat16 there, else float32.
    """

    model: str = "embedded"
    adapter: str | None = None
    mixer: str | None = None
    device: str | None = None
    dtype: str | None = None


@contextmanager
def opened(where: Where, filled: bool = True) -> Iterator[Any]:
    """The pipeline with its mixer in it; unmounted at the end.

    Raises:
        ValueError, FileNotFoundError: no such model, adapter, mixer, device or dtype.
    """
    device = where.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.partition(":")[0] not in ("cpu", "cuda") or (device != "cpu" and not torch.cuda.is_available()):
        raise ValueError(
            f"No device {device!r} here: expected cpu" + (" or cuda." if torch.cuda.is_available() else ".")
        )
    name = where.dtype or ("float32" if device == "cpu" else "bfloat16")
    if name not in DTYPES:
        raise ValueError(f"No dtype {name!r}: expected one of {', '.join(DTYPES)}.")
    pipe = open_model(where.model, DTYPES[name], device, filled=filled)
    mounted = mount(pipe, where.adapter, where.mixer)
    try:
        yield pipe
    finally:
        if mounted is not None:
            mounted.unmount()


def plan(where: Where, request: Request, budget: int | None = None) -> Plan:
    """What an image will need, without making it; of memory that nobody touches, so that any machine can tell.

    Raises:
        TooLittleMemory: the budget is too small.
        ValueError: as `opened`, or a size the model cannot have.
    """
    with opened(where, filled=False) as pipe:
        return planned(pipe, request, budget)


def planned(pipe: Any, request: Request, budget: int | None) -> Plan:
    """The plan of a request, without times."""
    return make_plan(
        pipe,
        request.size,
        budget=budget,
        base=request.base,
        strengths=request.strengths,
        steps=request.steps,
        guidance=request.guidance,
        direct=request.mode == "direct",
    )


def timed(chosen: Plan, rate: float) -> Plan:
    """The plan with the seconds of its stages, at a rate in operations a second."""
    return replace(chosen, stages=tuple(replace(stage, seconds=stage.flops / rate) for stage in chosen.stages))


def measure_rate(pipe: Any, size: Size) -> float:
    """Floating-point operations a second of the UNet on a small image, measured: the faster of two calls."""
    unet, places = pipe.unet, [side // pixels_a_place(pipe) for side in size]
    flops = foresee_step(pipe, size, (), 1.0).flops

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).to(unet.device, unet.dtype)

    added: dict[str, Any] = {}
    if unet.config.addition_embed_type == "text_time":
        width = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        added = {"added_cond_kwargs": {"text_embeds": normal(1, width), "time_ids": normal(1, 6)}}
    given = (
        normal(1, unet.config.in_channels, *places),
        torch.tensor(500),
        normal(1, 77, unet.config.cross_attention_dim),
    )
    times = []
    for _ in range(2):
        start = time.perf_counter()
        with torch.no_grad():
            float(unet(*given, return_dict=False, **added)[0].sum())  # which waits for a GPU
        times.append(time.perf_counter() - start)
    return flops / min(times)


def read_picture(path: Path | None, strength: float | None) -> Image.Image | None:
    """The picture to start from, if any.

    Raises:
        ValueError: it cannot be read, or a strength has no picture.
    """
    if path is None:
        if strength is not None:
            raise ValueError("--strength says how much a given picture is changed: give one with --image.")
        return None
    try:
        with Image.open(path) as file:
            return file.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"Cannot read the picture {path}: {error}.") from error


def make(pipe: Any, request: Request, chosen: Plan, keep: Path, report: Report, **start: Any) -> Result:
    """Generate as planned; `start` is an image and a strength, as of `generate`."""
    options = {name: getattr(request, name) for name in Request.__dataclass_fields__ if name not in ("prompt", "size")}
    return generate(pipe, request.prompt, request.size, plan=chosen, keep=keep, report=report, **options, **start)


def plan_table(chosen: Plan) -> Table:
    """A row a stage; the savings below."""
    savings = ", ".join(chosen.savings) or "none needed"
    total = "" if chosen.seconds is None else f" About {chosen.seconds:,.0f} s of denoising."
    below = f"Memory at the peak, with the weights: {told(chosen.peak)}. Savings: {savings}; "
    below += f"autoencoder in tiles of {chosen.tiling.tile} places.{total}"
    table = Table("stage", "denoises", "steps", "denoising", "decoding", "time", caption=below)
    for stage in chosen.stages:
        height, width = stage.stage.size
        seconds = "–" if stage.seconds is None else f"{stage.seconds:,.0f} s"
        share = "from noise" if stage.stage.strength == 1 else f"the last {stage.stage.strength:.0%}"
        memory = told(stage.denoising), told(stage.decoding)
        table.add_row(f"{width} × {height}", share, str(stage.steps), *memory, seconds)
    return table
