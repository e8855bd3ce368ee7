"""`mixlab bench`: what mixers cost here, against others and against the machine's own limits."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from experiments.bench import calibrate as calibration
from experiments.bench.contest import Contest, Limits, as_json, measure_rates, run_contest
from experiments.bench.contests import (
    MOUNTED,
    Setup,
    growth_contests,
    layer_contests,
    matching,
    operator_contests,
    unet_contests,
)
from experiments.bench.crossover import DTYPES
from experiments.bench.results import show, write
from experiments.bench.timing import machine
from experiments.core.files import write_json
from experiments.core.memory import keep_freed_memory
from experiments.core.progress import ProgressDisplay

LADDER = calibration.LADDER
__all__ = ["LADDER", "MOUNTED", "SIZES", "VERBS", "bench", "calibrate", "make_setup"]
VERBS = ("operators", "layers", "growth", "unet", "memory")
QUICK = Setup(batch=1, heads=((2, 8),), lengths=(64, 128))
DEFAULT = Setup()
SIZES = (64, 128, 256, 512)

Progress = Callable[[], AbstractContextManager[ProgressDisplay]]


def make_setup(
    device: str, dtype: str, quick: bool, max_tokens: int | None, heads: str | None, batch: int | None
) -> Setup:
    """The sizes and the place of a benchmark, from its options.

    Raises:
        ValueError: an unknown device or dtype, no GPU, or heads that are not `8x40`.
    """
    if dtype not in DTYPES:
        raise ValueError(f"No dtype {dtype!r}: expected one of {', '.join(DTYPES)}.")
    if device.split(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"No device {device!r}: expected cpu or cuda.")
    if device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch finds no GPU here; use cpu.")
    setup = replace(QUICK if quick else DEFAULT, device=device, dtype=DTYPES[dtype])
    if heads is not None:
        try:
            pairs = tuple(tuple(int(n) for n in pair.split("x")) for pair in heads.split(","))
            setup = replace(setup, heads=tuple((h, k) for h, k in pairs))
        except ValueError:
            raise ValueError(f"--heads {heads!r}: expected heads x width, as in 8x40,8x80.") from None
    if max_tokens is not None:
        lengths = {*(n for n in setup.lengths if n < max_tokens), max_tokens}
        setup = replace(setup, lengths=tuple(sorted(lengths)))
    return setup if batch is None else replace(setup, batch=batch)


def contests(
    verb: str, setup: Setup, profile: str, mixer: str, min_tokens: int, sizes: tuple[int, ...]
) -> Iterator[Contest]:
    """The comparisons of a verb.

    Raises:
        ValueError: no such verb.
    """
    made: dict[str, Callable[[], Iterator[Contest]]] = {
        "operators": lambda: operator_contests(setup),
        "memory": lambda: operator_contests(replace(setup, lengths=setup.lengths[-2:])),
        "layers": lambda: layer_contests(setup),
        "growth": lambda: growth_contests(setup),
        "unet": lambda: unet_contests(setup, profile, mixer, min_tokens, sizes),
    }
    if verb not in made:
        raise ValueError(f"No benchmark {verb!r}: expected one of {', '.join((*VERBS, 'crossover'))}.")
    return made[verb]()


def bench(
    verb: str,
    out: Path,
    against: str,
    setup: Setup,
    limits: Limits,
    chosen: dict[str, Any],
    console: Console,
    bars: Progress,
) -> None:
    """Run the comparisons of a verb, print them and write them to a folder."""
    found = matching(contests(verb, setup, **chosen), against)
    rates = measure_rates(setup.device, setup.dtype)
    told = {**machine(setup.device), **versions(), "dtype": str(setup.dtype).removeprefix("torch.")}
    rows, command = [], shlex.join(["mixlab", *sys.argv[1:]])
    with bars() as display, keep_freed_memory() if verb == "growth" else nullcontext():
        for number, contest in enumerate(found):
            share = replace(limits, budget=limits.budget / len(found))
            rows += run_contest(
                contest,
                rates,
                share,
                setup.device,
                lambda what, number=number: display.update(verb, number, len(found), what[:48]),  # type: ignore[misc]
            )
            display.update(verb, number + 1, len(found), contest.name[:48])
            write_json(out / f"{verb}.json", as_json(rows, rates, told, command))  # a stop loses one contest
    write(rows, rates, told, command, out, verb)
    show(rows, console)
    console.print(f"Tables and plots: {(out / verb).resolve()}.md", soft_wrap=True)


def versions() -> dict[str, str]:
    """Of what the numbers may depend on; those that are installed."""
    found = {}
    for name in ("transformers", "diffusers", "triton", "flash-linear-attention", "mamba-ssm"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def calibrate(setup: Setup, path: Path | None, console: Console, bars: Progress, ladder: tuple[int, ...]) -> None:
    """Measure the table of backends and print it."""
    with bars() as display:
        where, rows = calibration.calibrate(setup, path, ladder, lambda what: display.update("backends", 0, 1, what))
    table = Table("operator", "causality", "decay", "backends, up to how many tokens")
    for row in rows:
        order = ", then ".join(f"{name}{'' if bound is None else f' ≤ {bound:,}'}" for name, bound in row.order)
        table.add_row(row.operator, row.causality, row.decay, order)
    console.print(table)
    console.print(f"Written to {where.resolve()}: auto goes by it from now on.", soft_wrap=True)
