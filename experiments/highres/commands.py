"""`mixlab generate` and `mixlab plan`: from options as people write them to images and tables."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from experiments.core.memory import return_freed_memory
from experiments.core.progress import ProgressDisplay
from experiments.highres.models import mount, open_model
from experiments.highres.rate import measure_rate
from unet_adapters.highres import Control, Plan, Request, Result, generate, make_plan
from unet_adapters.highres.ladder import Size, shown
from unet_adapters.highres.plan import told

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Bars = Callable[[], AbstractContextManager[ProgressDisplay]]


@dataclass(frozen=True)
class Model:
    """What makes the image, as the command line names it.

    Attributes:
        model: embedded, a folder, a Hub id, or random:SD-1.5 for an architecture alone.
        adapter: folder or Hub id of a distilled adapter, ours or LinFusion's; None is none.
        mixer: one to mount as it is, untrained; None is none.
        device, dtype: None: a GPU where there is one; float32 on a CPU, else bfloat16.
    """

    model: str = "embedded"
    adapter: str | None = None
    mixer: str | None = None
    device: str | None = None
    dtype: str | None = None

    @contextmanager
    def opened(self, *, planned: bool = False) -> Iterator[tuple[Any, str]]:
        """The pipeline with its mixer in it, and the device of the work: with `planned`, perhaps one not at hand."""
        device, dtype = place(self.device, self.dtype, planned=planned)
        if self.adapter is not None and self.mixer is not None:
            raise ValueError("Give --adapter, which is trained, or --mixer, which is not; not both.")
        pipe = open_model(self.model, dtype, device if torch.cuda.is_available() else "cpu", filled=not planned)
        mounted = mount(pipe, self.adapter, self.mixer)
        try:
            yield pipe, device
        finally:
            if mounted is not None:
                mounted.unmount()


def place(device: str | None, dtype: str | None, *, planned: bool = False) -> tuple[str, torch.dtype]:
    """The device and the dtype of the work; with `planned`, perhaps a GPU that is not there.

    Raises:
        ValueError: an unknown device or dtype, or a GPU that is not there.
    """
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    name = dtype or ("float32" if chosen == "cpu" else "bfloat16")
    if name not in DTYPES:
        raise ValueError(f"--dtype {name!r}: expected one of {', '.join(DTYPES)}.")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", chosen):
        raise ValueError(f"--device {chosen!r}: expected cpu or cuda.")
    if chosen != "cpu" and not torch.cuda.is_available() and not planned:
        raise ValueError(f"--device {chosen}: torch finds no GPU here; use cpu.")
    return chosen, DTYPES[name]


def parse_size(text: str) -> Size:
    """ "WIDTHxHEIGHT" -> (height, width).

    Raises:
        ValueError: not two numbers.
    """
    found = re.fullmatch(r"\s*(\d+)\s*[x×]\s*(\d+)\s*", text)
    if not found:
        raise ValueError(f"--size {text!r} is no size: expected width x height in pixels, as in 2048x1024.")
    return int(found[2]), int(found[1])


def parse_bytes(text: str) -> int:
    """ "24GB", "800 MiB" -> bytes; GB and GiB are both 2³⁰.

    Raises:
        ValueError: not an amount of memory.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([KMGT])i?B?\s*", text, re.IGNORECASE)
    if not found:
        raise ValueError(f"--memory {text!r} is no amount of memory: expected a number and a unit, as in 24GB.")
    return int(float(found[1]) * 1024 ** ("KMGT".index(found[2].upper()) + 1))


def parse_strengths(text: str) -> tuple[float, ...]:
    """ "0.4,0.3" -> numbers.

    Raises:
        ValueError: not numbers.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--strengths {text!r}: expected numbers with commas between them, as in 0.4,0.3.") from None


def open_picture(path: Path, option: str) -> Image.Image:
    """A picture in RGB.

    Raises:
        ValueError: none there.
    """
    try:
        return Image.open(path).convert("RGB")
    except OSError as error:
        raise ValueError(f"{option} {path}: cannot be read as a picture ({error}).") from error


def plan(model: Model, request: Request, memory: str | None, tflops: float | None, console: Console) -> Plan:
    """Foresee an image and print what it needs.

    Args:
        tflops: 10¹² operations a second to reckon with; None measures them here, where the work is to be done here.
    """
    budget = None if memory is None else parse_bytes(memory)
    with model.opened(planned=True) as (pipe, device):
        rate = None if tflops is None else tflops * 1e12
        if rate is None and torch.device(device).type == pipe.unet.device.type:
            rate = measure_rate(pipe)
        found = make_plan(pipe, request.size, **_asked(request), budget=budget, rate=rate, device=device)
    show_plan(found, console)
    return found


def _asked(request: Request) -> dict[str, Any]:
    of_plan = {name: getattr(request, name) for name in ("base", "strengths", "steps", "guidance")}
    return {**of_plan, "direct": request.mode == "direct"}


def show_plan(plan: Plan, console: Console) -> None:
    """Print a row a stage, and the savings."""
    table = Table("stage", "runs", "steps", "denoising", "pixels", "largest", "TFLOP", "time", padding=(0, 0))
    for stage in plan.stages:
        seconds = "–" if stage.seconds is None else duration(stage.seconds)
        share = "from noise" if stage.stage.strength == 1 else f"last {stage.stage.strength:g}"
        cells = (
            told(stage.denoising),
            told(stage.decoding),
            f"{_three(stage.largest / 1e6)} M",
            _three(stage.flops / 1e12),
        )
        table.add_row(shown(stage.stage.size), share, str(stage.steps), *cells, seconds)
    console.print(table)
    console.print("Memory at the peak, the weights included; elements of the largest tensor.", style="dim")
    total = "" if plan.seconds is None else f" Denoising takes about {duration(plan.seconds)}."
    console.print(
        f"Peak {told(plan.peak)}. Savings: {', '.join(plan.savings)}; pixels in tiles of "
        f"{plan.tiling.tile} latent places.{total}",
        soft_wrap=True,
    )


def _three(value: float) -> str:
    """Three digits, without an exponent where there are more before the point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Seconds as people read them."""
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:,.0f} min"


def make(
    model: Model,
    request: Request,
    out: Path,
    bars: Bars,
    console: Console,
    *,
    memory: str | None = None,
    image: Path | None = None,
    strength: float | None = None,
    control: tuple[str, Path, float] | None = None,
    keep: Path | None = None,
) -> Result:
    """Make one image and write it as a PNG that tells how it was made; a bar for every stage.

    Args:
        image, strength: a picture to make larger or to change.
        control: a ControlNet's folder or Hub id, its picture and its scale.
        keep: folder for finished stages; None: beside the image, `NAME.stages`.
    """
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out {out}: expected a name that ends in .png, which holds the metadata.")
    if strength is not None and (image is None or not 0 < strength <= 1):
        raise ValueError(f"--strength {strength}: expected a number above 0 and up to 1, beside an --image to change.")
    budget = None if memory is None else parse_bytes(memory)
    given = None if image is None else open_picture(image, "--image")
    if budget is not None:
        return_freed_memory()  # or what a CPU holds is more than what tensors do
    out.parent.mkdir(parents=True, exist_ok=True)
    with _memory_told(), model.opened() as (pipe, _), bars() as display:
        found = make_plan(pipe, request.size, **_asked(request), budget=budget)
        show_plan(found, console)
        result = generate(
            pipe,
            **vars(request),
            plan=found,
            image=given,
            strength=strength,
            control=None if control is None else _control(pipe, *control),
            keep=keep or out.with_suffix(".stages"),
            report=display.update,
        )
    made_with = {"model": model.model, "adapter": model.adapter, "mixer": model.mixer}
    aside = out.with_suffix(".partial")
    result.save(aside, **made_with)
    aside.replace(out)
    if result.resumed:
        console.print(f"Went on after {result.resumed} of {len(result.stages)} stages, which were there already.")
    return result


def _control(pipe: Any, source: str, picture: Path, scale: float) -> Control:
    from diffusers import ControlNetModel

    seen = torch.from_numpy(np.asarray(open_picture(picture, "--control-image")).copy())
    pixels = seen.permute(2, 0, 1)[None] / 255
    network = ControlNetModel.from_pretrained(source, dtype=pipe.unet.dtype).to(pipe.unet.device)
    return Control(network.requires_grad_(False).eval(), pixels.to(pipe.unet.device), scale)


@contextmanager
def _memory_told() -> Iterator[None]:
    """Too little memory is one sentence."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "allocate memory" not in str(error):
            raise
        raise ValueError(
            "The memory was not enough. Give --memory what there is, and savings are chosen so that it holds; finished "
            "stages are kept."
        ) from error
