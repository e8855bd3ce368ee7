"""How far one machine gets, and how fast: one large image of a model with random weights, timed part by part.

    python -m experiments.studies.largest_image RESULTS.jsonl --size 16384x8192 [--memory 24GB] [--mixer linfusion]
    python -m experiments.studies.largest_image RESULTS.jsonl --show

Every call adds a line to RESULTS, also where the memory was not enough. Time and memory do not depend on the values of
weights.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from experiments.highres.commands import duration, parse_bytes, parse_size
from experiments.highres.models import mount, open_model
from experiments.highres.watch import Watch
from unet_adapters.highres import generate, make_plan
from unet_adapters.highres.plan import latent_unit, told


def measure(
    model: str, mixer: str | None, size: str, memory: str | None, steps: int, device: str, dtype: str
) -> dict[str, Any]:
    """Seconds in all, and of every part; the peak beside what the plan foresaw; or why there is none.

    A small image comes first, so that what is set up only once is set up.
    """
    pipe = open_model(model, getattr(torch, dtype), device)
    mount(pipe, None, mixer)
    asked = {"model": model, "mixer": mixer, "size": size, "memory": memory, "steps": steps, "device": device}
    budget = None if memory is None else parse_bytes(memory)
    unit, watch = latent_unit(pipe), Watch(device)
    settings: dict[str, Any] = {"steps": steps}
    try:
        generate(pipe, "a picture", (2 * unit, 2 * unit), steps=2, base=unit)
        plan = make_plan(pipe, parse_size(size), budget=budget, **settings)
        began = time.perf_counter()
        generate(pipe, "a picture", parse_size(size), plan=plan, report=watch, **settings)
    except (RuntimeError, MemoryError, ValueError) as error:
        return {**asked, "error": str(error).splitlines()[0], "parts": watch.parts}
    found = {"seconds": time.perf_counter() - began, "parts": watch.parts}
    return {**asked, **found, "foreseen_bytes": plan.peak, "savings": plan.savings}


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Print a line for each image."""
    table = Table("model", "mixer", "pixels", "allowed", "seconds", "last stage", "pixels out", "peak", "foreseen")
    for row in rows:
        parts = [part for part in row["parts"].values() if "seconds" in part]
        cells = [row["model"], row["mixer"] or "its own", row["size"], row["memory"] or "all"]
        if "error" in row:
            table.add_row(*cells, row["error"][:60])
            continue
        last, out = (duration(part["seconds"]) for part in parts[-2:])
        peak = max(part["bytes"] or 0 for part in parts)
        table.add_row(*cells, duration(row["seconds"]), last, out, told(peak), told(row["foreseen_bytes"]))
    console.print(table)


def main() -> None:
    """Measure one image, or show all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--show", action="store_true", help="print what is there")
    parser.add_argument("--model", default="random:SDXL base")
    parser.add_argument("--mixer", help="to mount, untrained; none leaves the model's own attention")
    parser.add_argument("--size", default="16384x8192")
    parser.add_argument("--memory")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    given = vars(parser.parse_args())
    results, wanted = given.pop("results"), given.pop("show")
    if not wanted:
        row = measure(**given)
        results.parent.mkdir(parents=True, exist_ok=True)
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
    show(rows if wanted else rows[-1:], Console())


if __name__ == "__main__":
    main()
