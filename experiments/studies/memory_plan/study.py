"""Is the memory that a plan foresees what is used? Measured on this CPU.

    python -m experiments.studies.memory_plan --mixer linfusion

Every row is a process of its own: one guided call of a UNet with random weights, or one decoding. Measured is the peak
of the resident set above what was resident before the call, which is the weights and a first call at the smallest size.
The last column compares what a plan tells and a budget is held against: the weights and what comes on top of them.
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
from experiments.highres.commands import parse_size
from experiments.highres.models import mount, open_model
from unet_adapters.highres import SAVINGS, Tiling, decode, save_memory
from unet_adapters.highres.denoise import Guide
from unet_adapters.highres.plan import foresee_decoding, foresee_step, latent_unit, pixels_a_place, told
from unet_adapters.hosts import find_host

SIZES = ("512x512", "768x768", "1024x1024", "1536x1024", "2048x2048")
WAYS = {"plain": (), "saving": tuple(name for name in SAVINGS if name != "skips"), "pixels": ()}


def measure(model: str, mixer: str, size: str, way: str) -> dict[str, Any]:
    """Bytes foreseen and measured, in this process."""
    return_freed_memory()  # as `mixlab generate --memory` has it
    side, savings = parse_size(size), WAYS[way]
    pipe = open_model(model, torch.float32, "cpu")
    mount(pipe, None, mixer)
    unit = latent_unit(pipe)
    run: Any = _decoding if way == "pixels" else _step
    found = foresee_decoding(pipe, side, Tiling()) if way == "pixels" else foresee_step(pipe, side, savings, 7.5)
    run(pipe, (unit, unit), savings)
    measured = measure_peak_bytes(lambda: run(pipe, side, savings))
    weights = sum(p.numel() * p.element_size() for part in (pipe.unet, pipe.vae) for p in part.parameters())
    return {"size": size, "way": way, "weights": weights, "foreseen": found.peak, "measured": measured}


@torch.no_grad()
def _step(pipe: Any, size: tuple[int, int], savings: tuple[str, ...]) -> None:
    unet, places = pipe.unet, [side // pixels_a_place(pipe) for side in size]
    conditions = find_host(unet).dummy_conditions()
    guidance = Guide(conditions, conditions, 7.5, "guidance" in savings)
    with save_memory(unet, savings):
        guidance.predict(unet, torch.randn(1, unet.config.in_channels, *places), torch.tensor(500))


def _decoding(pipe: Any, size: tuple[int, int], savings: tuple[str, ...]) -> None:
    decode(pipe.vae, torch.randn(1, 4, *(side // pixels_a_place(pipe) for side in size)))


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Print foreseen beside measured."""
    table = Table("pixels", "what", "weights", "foreseen", "measured", "ratio", "ratio with the weights")
    for row in rows:
        weights, foreseen, measured = (row[key] for key in ("weights", "foreseen", "measured"))
        ratios = (f"{foreseen / measured:.3f}", f"{(weights + foreseen) / (weights + measured):.3f}")
        table.add_row(row["size"], row["way"], told(weights), told(foreseen), told(measured), *ratios)
    console.print(table)


def main() -> None:
    """Measure every size and way, and print a table; `--one SIZE WAY` is one of its processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="random:SD-1.5")
    parser.add_argument("--mixer", required=True, help="to mount, untrained")
    parser.add_argument("--sizes", nargs="+", default=SIZES)
    parser.add_argument("--ways", nargs="+", default=tuple(WAYS), choices=tuple(WAYS))
    parser.add_argument("--one", nargs=2, metavar=("SIZE", "WAY"))
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.model, given.mixer, *given.one)))
        return
    rows = []
    for size in given.sizes:
        for way in given.ways:
            command = [sys.executable, "-m", "experiments.studies.memory_plan", "--model", given.model]
            done = subprocess.run(
                [*command, "--mixer", given.mixer, "--one", size, way], stdout=subprocess.PIPE, text=True, check=True
            )
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    show(rows, Console())


if __name__ == "__main__":
    main()
