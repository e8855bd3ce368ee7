"""Measurements as JSON, as a Markdown page, and as tables on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.bench.benchmark import Measurement
from experiments.bench.roofline import Roofline
from experiments.bench.scaling import MIN_SIZE, scaling_exponents
from experiments.core.files import write_json, write_text

COLUMNS = ("implementation", "size", "ms", "quartiles", "turns", "peak MiB", "× roofline", "faster than")


@dataclass(frozen=True)
class BenchmarkConditions:
    """What the numbers hold for.

    Attributes:
        command: the command line.
        machine: device, threads, versions and dtype.
        roofline: limits of the machine; None if not measured.
        has_plots: whether the page shows plots.
    """

    command: str
    machine: Mapping[str, Any]
    roofline: Roofline | None = None
    has_plots: bool = True


def write_results(
    measurements: Sequence[Measurement], conditions: BenchmarkConditions, directory: Path, name: str
) -> Path:
    """Write `<name>.json` and `<name>.md` into a folder, replacing those of an earlier call.

    Unless `conditions` say otherwise, the page embeds the plots `<name>-<number>.png`, one per benchmark; see
    `plot_path`.

    Returns:
        The path of the page.
    """
    write_json(directory / f"{name}.json", as_json(measurements, conditions))
    page = directory / f"{name}.md"
    write_text(page, _format_page(measurements, conditions, name))
    return page


def as_json(measurements: Sequence[Measurement], conditions: BenchmarkConditions) -> dict[str, Any]:
    """Return everything that was measured as plain values."""
    exponents = scaling_exponents(measurements)
    return {
        "command": conditions.command,
        "machine": dict(conditions.machine),
        "roofline": None if conditions.roofline is None else asdict(conditions.roofline),
        "exponents": [{"benchmark": b, "implementation": i, "exponent": p} for (b, i), p in exponents.items()],
        "measurements": [{**asdict(m), "times_roofline": m.times_roofline} for m in measurements],
    }


def print_table(measurements: Sequence[Measurement], console: Console) -> None:
    """Print one table per benchmark, and below it why implementations were not measured."""
    for benchmark in benchmark_names(measurements):
        table = Table(*COLUMNS, title=benchmark, title_justify="left")
        of_benchmark = [m for m in measurements if m.benchmark == benchmark]
        for m in of_benchmark:
            if m.time is not None:
                table.add_row(*format_row(m))
        if table.row_count:
            console.print(table)
        else:
            console.print(benchmark)
        reasons: dict[str | None, list[str]] = {}
        for m in of_benchmark:
            if m.time is None:
                reasons.setdefault(m.error, []).append(f"{m.implementation}, {m.size:,}")
        for reason, rows in reasons.items():
            console.print(f"{'; '.join(rows)}: {reason}", soft_wrap=True, highlight=False, markup=False)


def format_row(m: Measurement) -> tuple[str, ...]:
    """Return a measurement as text, in the order of `COLUMNS`."""
    if m.time is None:
        return (m.implementation, f"{m.size:,}", "–", "", "", "", "", (m.error or "").replace("|", "/"))
    return (
        m.implementation,
        f"{m.size:,}",
        f"{1e3 * m.time.median:,.2f}",
        f"{1e3 * m.time.low:,.2f} – {1e3 * m.time.high:,.2f}",
        f"{m.turns}",
        "–" if m.peak_bytes is None else f"{m.peak_bytes / 2**20:,.1f}",
        "–" if m.times_roofline is None else f"{m.times_roofline:.2f}",
        ", ".join(f"{name} × {speedup:.2f}" for name, speedup in m.speedups.items()),
    )


def benchmark_names(measurements: Sequence[Measurement]) -> list[str]:
    """Return the names of the benchmarks, in the order in which they ran."""
    return list(dict.fromkeys(m.benchmark for m in measurements))


def plot_path(directory: Path, name: str, number: int) -> Path:
    """Return the path of the plot of a page's benchmark number `number`."""
    return directory / f"{name}-{number}.png"


def _format_page(measurements: Sequence[Measurement], conditions: BenchmarkConditions, name: str) -> str:
    machine = ", ".join(f"{key}: {value}" for key, value in conditions.machine.items())
    lines = [f"# {name}", "", f"`{conditions.command}`", "", f"{machine}.", ""]
    roofline = conditions.roofline
    if roofline is not None:
        bandwidth = f"{roofline.bytes_per_second / 1e9:.1f} GB/s"
        lines += [f"Measured: copies {bandwidth}, products {roofline.flops_per_second / 1e9:,.0f} GFLOP/s.", ""]
    exponents = scaling_exponents(measurements)
    for number, benchmark in enumerate(benchmark_names(measurements)):
        plot = plot_path(Path(), name, number)
        lines += [f"## {benchmark}", ""]
        has_times = any(m.time is not None for m in measurements if m.benchmark == benchmark)
        if has_times and conditions.has_plots:
            lines += [f"![{benchmark}]({plot})", ""]
        lines += ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
        lines += ["| " + " | ".join(format_row(m)) + " |" for m in measurements if m.benchmark == benchmark]
        slopes = [f"{implementation} {p:.2f}" for (b, implementation), p in exponents.items() if b == benchmark]
        growth = f"Growth from {MIN_SIZE:,} on, time ~ size^p: {', '.join(slopes)}." if slopes else ""
        lines += ["", growth, ""]
    return "\n".join(lines)
