"""`mixlab plan` and `mixlab generate`, from parsed options to a table and an image."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from experiments.core.errors import is_out_of_memory
from experiments.core.memory import return_freed_memory
from experiments.core.progress import ProgressDisplay
from experiments.core.signals import Interrupted
from experiments.highres.controlnet import load_controlnet
from experiments.highres.options import open_image, parse_bytes
from experiments.highres.pipelines import PipelineOptions
from experiments.highres.plan_table import print_plan
from experiments.highres.throughput import measure_throughput
from mixers.files import atomic_path
from unet_adapters.highres import (
    ControlNetCondition,
    GenerationRequest,
    GenerationResult,
    MemoryPlan,
    generate,
)
from unet_adapters.highres.generation import plan_request
from unet_adapters.highres.pipeline import denoiser

DisplayFactory = Callable[[], AbstractContextManager[ProgressDisplay]]


@dataclass(frozen=True)
class ControlNetOptions:
    """A ControlNet as the command line names it.

    Attributes:
        source: folder or Hub id.
        image: its input image.
        scale: factor of its residuals.
        variant: of its weights, as `load_controlnet` takes it.
    """

    source: str
    image: Path
    scale: float = 1.0
    variant: str | None = None

    @classmethod
    def from_options(
        cls, source: str | None, image: Path | None, scale: float, variant: str | None = None
    ) -> ControlNetOptions | None:
        """Return the options, or None if neither the network nor the image is named.

        Raises:
            ValueError: If only one of the two is named.
        """
        if source is None and image is None:
            return None
        if source is None or image is None:
            raise ValueError("A ControlNet needs both --control (the network) and --control-image (its input).")
        return cls(source, image, scale, variant)

    def open(self, pipe: Any) -> ControlNetCondition:
        """Load the network and the image for `pipe`.

        Raises:
            ValueError: If there is no ControlNet for this model, or the image cannot be read.
        """
        values = torch.from_numpy(np.asarray(open_image(self.image, "--control-image")).copy())
        image = values.permute(2, 0, 1)[None] / 255
        network = load_controlnet(self.source, pipe.unet, self.variant)
        return ControlNetCondition(network, image.to(pipe.unet.device), self.scale)


def plan_image(
    options: PipelineOptions,
    request: GenerationRequest,
    memory: str | None,
    tflops: float | None,
    console: Console,
) -> MemoryPlan:
    """Plan an image and print what it needs.

    Args:
        options: the pipeline.
        request: the image.
        memory: the budget, such as "24GB"; None: no limit.
        tflops: throughput in 10¹² operations per second; None: measured, if the device is present.
        console: where the plan is printed.
    """
    memory_budget = None if memory is None else parse_bytes(memory)
    with options.open(for_plan=True) as (pipe, device):
        throughput = None if tflops is None else tflops * 1e12
        if throughput is None and torch.device(device).type == denoiser(pipe).device.type:
            throughput = measure_throughput(pipe)
        plan = plan_request(pipe, request, memory_budget=memory_budget, throughput=throughput, device=device)
    print_plan(plan, console)
    return plan


def generate_image(
    options: PipelineOptions,
    request: GenerationRequest,
    out: Path,
    show: DisplayFactory,
    console: Console,
    *,
    memory: str | None = None,
    image: Path | None = None,
    strength: float | None = None,
    control: ControlNetOptions | None = None,
    stage_dir: Path | None = None,
) -> GenerationResult:
    """Generate one image and write it as a PNG whose metadata says how it was made.

    Args:
        options: the pipeline.
        request: the image.
        out: the PNG to write.
        show: opens the display of progress.
        console: where the plan is printed.
        memory: the budget, such as "24GB"; None: no limit.
        image: an image to enlarge, or to change with `strength`.
        strength: share of the schedule that runs on `image`.
        control: a ControlNet and its image.
        stage_dir: folder for finished stages; None: `NAME.stages` beside the image.
    """
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out {out}: expected a file name that ends in .png, because the metadata needs a PNG.")
    if strength is not None and (image is None or not 0 < strength <= 1):
        raise ValueError(f"--strength {strength}: expected a number above 0 and up to 1, together with --image.")
    memory_budget = None if memory is None else parse_bytes(memory)
    start_image = None if image is None else open_image(image, "--image")
    if memory_budget is not None:
        return_freed_memory()  # otherwise the process holds more than its tensors on a CPU
    out.parent.mkdir(parents=True, exist_ok=True)  # fails early
    stage_dir = stage_dir or out.with_suffix(".stages")
    with _explain_interruption(stage_dir), _explain_out_of_memory(), options.open() as (pipe, _), show() as display:
        plan = plan_request(pipe, request, memory_budget=memory_budget, with_control=control is not None)
        print_plan(plan, console)
        result = generate(
            pipe,
            **vars(request),
            plan=plan,
            image=start_image,
            strength=strength,
            control=None if control is None else control.open(pipe),
            stage_dir=stage_dir,
            progress=display.update,
        )
    with atomic_path(out) as partial:
        result.save(partial, model=options.model, adapter=options.adapter, mixer=options.mixer)
    if result.restored_stages:
        console.print(f"Resumed after {result.restored_stages} of {len(result.stages)} stages, restored from files.")
    console.print(f"Image: {out.resolve()}", soft_wrap=True)
    return result


@contextmanager
def _explain_out_of_memory() -> Iterator[None]:
    """Report an out-of-memory error as one line that says what to do."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ValueError(
            "Out of memory. Pass --memory with the available amount, so that savings are chosen with which the image "
            "fits; finished stages are kept."
        ) from error


@contextmanager
def _explain_interruption(stage_dir: Path) -> Iterator[None]:
    """Add to an interruption what was saved and how to resume."""
    try:
        yield
    except KeyboardInterrupt as interruption:
        number = interruption.signal_number if isinstance(interruption, Interrupted) else signal.SIGINT
        count = len(list(stage_dir.glob("*.safetensors")))
        saved = "No stage was finished." if count == 0 else f"Finished stages are kept in {stage_dir}."
        message = f"Interrupted. {saved} Start the same command again to {'resume' if count else 'generate the image'}."
        raise Interrupted(message, number) from None
