"""Compare the memory that a plan estimates with the memory that is used on this CPU.

    python -m experiments.studies.memory_plan --mixer linfusion

Every row is measured in its own process: one guided call of a UNet with random weights, or one decoding. The measured
value is the growth of the resident set's peak over what was resident before the call, after a first call at the
smallest size. The last column compares what a budget limits: the weights plus that growth.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from experiments.core.memory import measure_peak_bytes, return_freed_memory
from experiments.highres.options import parse_size
from experiments.highres.pipelines import mount, open_pipeline
from unet_adapters.highres import SAVINGS, Tiling, decode_tiled, save_memory
from unet_adapters.highres.denoising import ClassifierFreeGuidance
from unet_adapters.highres.estimates import estimate_decoding, estimate_unet_call
from unet_adapters.highres.memory import format_bytes
from unet_adapters.highres.pipeline import size_multiple, vae_scale_factor
from unet_adapters.highres.stages import ImageSize
from unet_adapters.hosts import find_host

SIZES = ("512x512", "768x768", "1024x1024", "1536x1024", "2048x2048")
CPU_SAVINGS = tuple(name for name in SAVINGS if name != "skips")
WORKLOADS = ("plain", "saving", "pixels")
"""A call of the UNet without savings, the same with every saving, and the decoding."""

GUIDANCE = 7.5


def measure(model: str, mixer: str, size: str, workload: str) -> dict[str, Any]:
    """Return the bytes that are estimated and measured for one workload, in this process."""
    return_freed_memory()  # as in `mixlab generate --memory`
    image_size = parse_size(size)
    savings = CPU_SAVINGS if workload == "saving" else ()
    pipe = open_pipeline(model, torch.float32, "cpu")
    mount(pipe, None, mixer)

    def run(run_size: ImageSize) -> None:
        if workload == "pixels":
            _decode(pipe, run_size)
        else:
            _call_unet(pipe, run_size, savings)

    if workload == "pixels":
        estimated = estimate_decoding(pipe, image_size, Tiling()).peak_bytes
    else:
        estimated = estimate_unet_call(pipe, image_size, savings, GUIDANCE).peak_bytes
    multiple = size_multiple(pipe)
    run((multiple, multiple))
    measured = measure_peak_bytes(lambda: run(image_size))
    weights = sum(p.numel() * p.element_size() for part in (pipe.unet, pipe.vae) for p in part.parameters())
    return {"size": size, "workload": workload, "weights": weights, "estimated": estimated, "measured": measured}


@torch.no_grad()
def _call_unet(pipe: Any, size: ImageSize, savings: tuple[str, ...]) -> None:
    host = find_host(pipe)
    height, width = (side // vae_scale_factor(pipe) for side in size)
    conditions = host.dummy_conditions()
    guidance = ClassifierFreeGuidance(conditions, conditions, GUIDANCE, sequential="guidance" in savings)
    with save_memory(pipe.unet, savings):
        guidance.predict(host, torch.randn(host.latent_shape((height, width))), torch.tensor(500))


def _decode(pipe: Any, size: ImageSize) -> None:
    height, width = (side // vae_scale_factor(pipe) for side in size)
    decode_tiled(pipe.vae, torch.randn(1, 4, height, width))


def measure_in_process(model: str, mixer: str, size: str, workload: str) -> dict[str, Any]:
    """Run `measure` in a new process, so that no earlier peak hides its own."""
    command = [sys.executable, "-m", "experiments.studies.memory_plan", "--model", model, "--mixer", mixer]
    command += ["--one", size, workload]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    row: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return row


def print_comparison(rows: list[dict[str, Any]], console: Console) -> None:
    """Print the estimates beside the measurements."""
    table = Table("pixels", "what", "weights", "estimated", "measured", "ratio", "ratio with the weights")
    for row in rows:
        weights = row["weights"]
        estimated = row["estimated"]
        measured = row["measured"]
        table.add_row(
            row["size"],
            row["workload"],
            format_bytes(weights),
            format_bytes(estimated),
            format_bytes(measured),
            f"{estimated / measured:.3f}",
            f"{(weights + estimated) / (weights + measured):.3f}",
        )
    console.print(table)


def main() -> None:
    """Measure every size and workload, and print a table; `--one SIZE WORKLOAD` is one of the processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random:SD-1.5", help="as in mixlab plan")
    parser.add_argument("--mixer", required=True, help="untrained mixer to mount")
    parser.add_argument("--sizes", nargs="+", default=SIZES, help="width x height in pixels")
    parser.add_argument("--workloads", nargs="+", default=WORKLOADS, choices=WORKLOADS)
    parser.add_argument("--one", nargs=2, metavar=("SIZE", "WORKLOAD"), help="measure one workload in this process")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.model, arguments.mixer, *arguments.one)))
        return
    rows = []
    for size in arguments.sizes:
        for workload in arguments.workloads:
            rows.append(measure_in_process(arguments.model, arguments.mixer, size, workload))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    print_comparison(rows, Console())


if __name__ == "__main__":
    main()
