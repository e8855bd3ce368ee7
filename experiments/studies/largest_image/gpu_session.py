"""Images of 16384 × 8192 pixels on one GPU, with and without a budget of 24 GB, and softmax attention at smaller sizes.

experiments/bench/gpu_16k.sh [FOLDER] [--budget SECONDS] [--archive FILE.tar.gz] [--dry-run]

SDXL and SD-1.5 have random weights: time and memory do not depend on their values.
"""

from __future__ import annotations

import sys
from pathlib import Path

from experiments.bench.gpu_session import run_gpu_command
from experiments.bench.session import SessionStep

STUDY = ("-m", "experiments.studies.largest_image", "{out}/results.jsonl")
DRY_RUN = ("--model", "embedded", "--device", "cpu", "--dtype", "float32", "--steps", "1", "--size", "64x64")
SDXL = "random:SDXL base"
LINEAR = "linfusion"


def image_step(
    max_seconds: float, model: str, size: str, mixer: str | None = None, memory: str | None = None
) -> SessionStep:
    """Return a step that measures one image; a dry run makes a small one with the embedded model.

    Args:
        max_seconds: of the step.
        model: as in `mixlab plan`.
        size: "WIDTHxHEIGHT" in pixels.
        mixer: an untrained mixer; None: softmax attention.
        memory: the budget, such as "24GB"; None: no limit.
    """
    options = (*(("--mixer", mixer) if mixer else ()), *(("--memory", memory) if memory else ()))
    attention = mixer or "softmax attention"
    name = f"{model.removeprefix('random:')}, {attention}, {size}" + (f", {memory}" if memory else "")
    run = (*STUDY, *options, "--model", model, "--size", size)
    return SessionStep(name, max_seconds, run, (*STUDY, *options, *DRY_RUN))


STEPS = (
    image_step(150, SDXL, "16384x8192", LINEAR),
    image_step(150, SDXL, "16384x8192", LINEAR, "24GB"),
    image_step(60, "random:SD-1.5", "16384x8192", LINEAR),
    image_step(30, SDXL, "4096x2048", LINEAR),
    image_step(30, SDXL, "4096x2048"),
    image_step(60, SDXL, "8192x4096", LINEAR),
    image_step(110, SDXL, "8192x4096"),
    SessionStep("table", 30, (*STUDY, "--print"), (*STUDY, "--print")),
)
"""In order of value; every step but the last appends a line to the results."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    description = (__doc__ or "").splitlines()[0]
    return run_gpu_command("gpu_16k.sh", description, STEPS, Path("runs/gpu_16k"), arguments)


if __name__ == "__main__":
    sys.exit(main())
