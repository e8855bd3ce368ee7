"""What came out of contests: JSON, a table on the screen, a page and plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, NullLocator
from rich.console import Console
from rich.table import Table

from experiments.bench.contest import Rates, Row, as_json, exponents
from experiments.core.files import write_json
from experiments.report import style

COLUMNS = ("contender", "size", "ms", "quartiles", "peak MiB", "× floor", "faster than")


def cells(row: Row) -> tuple[str, ...]:
    """A row as text, in the order of COLUMNS."""
    if row.time is None:
        return (row.contender, f"{row.size:,}", "–", "", "", "", f"failed: {row.error}".replace("|", "/"))
    low, high = 1e3 * row.time.low, 1e3 * row.time.high
    peak = "–" if row.peak is None else f"{row.peak / 2**20:,.1f}"
    over = "–" if row.over_floor is None else f"{row.over_floor:.2f}"
    ratios = ", ".join(f"{name} × {ratio:.2f}" for name, ratio in row.ratios.items())
    return (
        row.contender,
        f"{row.size:,}",
        f"{1e3 * row.time.median:,.2f}",
        f"{low:,.2f} – {high:,.2f}",
        peak,
        over,
        ratios,
    )


def show(rows: Sequence[Row], console: Console) -> None:
    """Print a table a contest."""
    for contest in dict.fromkeys(row.contest for row in rows):
        table = Table(*COLUMNS, title=contest, title_justify="left")
        for row in (row for row in rows if row.contest == contest):
            table.add_row(*cells(row))
        console.print(table)


def write(
    rows: Sequence[Row], rates: Rates | None, machine: Mapping[str, Any], command: str, directory: Path, name: str
) -> Path:
    """Write `<name>.json`, `<name>.md` and a plot a contest into a directory; returns the page's path.

    A plot takes a second or two.
    """
    write_json(directory / f"{name}.json", as_json(rows, rates, machine, command))
    page = directory / f"{name}.md"
    page.write_text(_page(rows, rates, machine, command, name), encoding="utf-8")
    for number, contest in enumerate(dict.fromkeys(row.contest for row in rows)):
        draw([row for row in rows if row.contest == contest], directory / f"{name}-{number}.png")
    return page


def _page(rows: Sequence[Row], rates: Rates | None, machine: Mapping[str, Any], command: str, name: str) -> str:
    told = ", ".join(f"{key}: {value}" for key, value in machine.items())
    lines = [f"# {name}", "", f"`{command}`", "", f"{told}.", ""]
    if rates is not None:
        lines += [f"Copies {rates.bandwidth / 1e9:.1f} GB/s, products {rates.flops / 1e9:,.0f} GFLOP/s, measured.", ""]
    grown = exponents(rows)
    for number, contest in enumerate(dict.fromkeys(row.contest for row in rows)):
        lines += [f"## {contest}", "", f"![{contest}]({name}-{number}.png)", ""]
        lines += ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
        lines += ["| " + " | ".join(cells(row)) + " |" for row in rows if row.contest == contest]
        slopes = [f"{who} {p:.2f}" for (c, who), p in grown.items() if c == contest]
        lines += ["", f"Growth from 4,096 on, time ~ size^p: {', '.join(slopes)}." if slopes else "", ""]
    return "\n".join(lines)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Time against size, a line a contender, the floor dotted."""
    with rc_context(style.RC):
        canvas = Canvas(figsize=(5.4, 3.6), layout="constrained")
        axes = canvas.add_subplot()
        axes.set(xscale="log", yscale="log", xlabel="size", ylabel="ms a call")
        axes.set_title(rows[0].contest, fontsize=8)
        for name, color in zip(dict.fromkeys(row.contender for row in rows), cycle(style.PALETTE)):
            timed = [row for row in rows if row.contender == name and row.time is not None]
            points = [(row.size, row.time) for row in timed if row.time is not None]
            if not points:
                continue
            sizes = [size for size, _ in points]
            axes.plot(sizes, [1e3 * t.median for _, t in points], "o-", color=color, label=name, markersize=3)
            bounds = [1e3 * t.low for _, t in points], [1e3 * t.high for _, t in points]
            axes.fill_between(sizes, *bounds, color=color, alpha=0.15, linewidth=0)
        floors = {row.size: row.floor for row in rows if row.floor is not None}
        if floors:
            axes.plot(list(floors), [1e3 * f for f in floors.values()], ":", color="gray", label="floor")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)
        canvas.savefig(path, dpi=130, metadata={"Software": None})
