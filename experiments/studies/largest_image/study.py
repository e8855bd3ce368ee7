"""Measure the largest image that one machine can make, and how fast: random weights, timed part by part.

    python -m experiments.studies.largest_image RESULTS.jsonl --size 16384x8192 [--memory 24GB] [--mixer linfusion]
    python -m experiments.studies.largest_image RESULTS.jsonl --print

Every call appends a line to RESULTS, even if the memory was not enough. Time and memory do not depend on the values of
weights.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.highres.memory_monitor import MemoryMonitor
from experiments.highres.options import parse_bytes, parse_size
from experiments.highres.pipelines import DTYPES, mount, open_pipeline
from experiments.highres.plan_table import format_duration
from unet_adapters.highres import generate, plan_memory
from unet_adapters.highres.memory import format_bytes
from unet_adapters.highres.pipeline import size_multiple

PROMPT = "a city at night"


@dataclass(frozen=True)
class LargeImageCase:
    """One image to measure.

    Attributes:
        model: as in `mixlab plan`.
        mixer: an untrained mixer; None: the model's own softmax attention.
        size: "WIDTHxHEIGHT" in pixels.
        memory: the budget, such as "24GB"; None: no limit.
        steps: scheduler steps.
        device, dtype: where and in which precision.
    """

    model: str
    mixer: str | None
    size: str
    memory: str | None
    steps: int
    device: str
    dtype: str


def measure(case: LargeImageCase) -> dict[str, Any]:
    """Return the seconds in total and of every part, and the peak beside the estimate; or the reason for a failure.

    A small image comes first, so that initializations do not count.
    """
    pipe = open_pipeline(case.model, DTYPES[case.dtype], case.device)
    mount(pipe, None, case.mixer)
    memory_budget = None if case.memory is None else parse_bytes(case.memory)
    size = parse_size(case.size)
    multiple = size_multiple(pipe)
    monitor = MemoryMonitor(case.device)
    row: dict[str, Any] = asdict(case)
    try:
        generate(pipe, PROMPT, (2 * multiple, 2 * multiple), steps=2, base_size=multiple)
        plan = plan_memory(pipe, size, memory_budget=memory_budget, steps=case.steps)
        start = time.perf_counter()
        generate(pipe, PROMPT, size, plan=plan, progress=monitor, steps=case.steps)
    except (RuntimeError, MemoryError, ValueError) as error:
        return {**row, "error": str(error).splitlines()[0], "parts": monitor.parts}
    return {
        **row,
        "seconds": time.perf_counter() - start,
        "parts": monitor.parts,
        "estimated_bytes": plan.peak_bytes,
        "savings": plan.savings,
    }


def print_rows(rows: list[dict[str, Any]], console: Console) -> None:
    """Print one line per image."""
    table = Table("model", "mixer", "pixels", "budget", "seconds", "last stage", "pixels out", "peak", "estimated")
    for row in rows:
        cells = [row["model"], row["mixer"] or "its own", row["size"], row["memory"] or "none"]
        if "error" in row:
            table.add_row(*cells, row["error"][:60])
            continue
        parts = [part for part in row["parts"].values() if "seconds" in part]
        last_stage, decoding = (format_duration(part["seconds"]) for part in parts[-2:])
        peak = max(part["bytes"] or 0 for part in parts)
        table.add_row(
            *cells,
            format_duration(row["seconds"]),
            last_stage,
            decoding,
            format_bytes(peak),
            format_bytes(row["estimated_bytes"]),
        )
    console.print(table)


def main() -> None:
    """Measure one image and append it to the results, or print all results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="file of results, one JSON object per line")
    parser.add_argument("--print", action="store_true", help="print the results and measure nothing")
    parser.add_argument("--model", default="random:SDXL base", help="as in mixlab plan")
    parser.add_argument("--mixer", help="untrained mixer to mount; default: the model's own attention")
    parser.add_argument("--size", default="16384x8192", help="width x height in pixels")
    parser.add_argument("--memory", help="memory budget, such as 24GB")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=tuple(DTYPES))
    arguments = vars(parser.parse_args())
    results: Path = arguments.pop("results")
    if arguments.pop("print"):
        lines = results.read_text().splitlines() if results.is_file() else []
        print_rows([json.loads(line) for line in lines], Console())
        return
    row = measure(LargeImageCase(**arguments))
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print_rows([row], Console())


if __name__ == "__main__":
    main()
