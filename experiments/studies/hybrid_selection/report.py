"""The results of a selection as terminal tables and as a figure: the Pareto front and the rules of thumb."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from experiments.core.figures import GRAY, PALETTE, RC

MARKERS = ("s", "^", "v", "D", "P", "X")


def print_selection(result: dict[str, Any], console: Console) -> None:
    """Print the sites, the comparison with rules of thumb, and the lines to copy."""
    console.print(_site_table(result))
    console.print(_comparison_table(result))
    measured = result["selections"][0]
    lines = [f"goal: {result['goal']}.", _additivity(measured)]
    machine = result["machine"]
    threads = f", threads: {machine['threads']}" if machine["threads"] else ""
    lines.append(f"{machine['device']}{threads}, torch {machine['torch']}, batch 2.")
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def _additivity(row: dict[str, Any]) -> str:
    if not row["summed_error"] > 0:
        return "The errors of single sites sum to 0."
    ratio = row["error"]["mean"] / row["summed_error"]
    return (
        f"Additivity: all sites of the measured selection together have {ratio:.2f} × the summed error of single sites."
    )


def _site_table(result: dict[str, Any]) -> Table:
    sizes = result["sizes"]
    table = Table("site", "mixer", caption="error when this site alone is replaced [95 %], and time / softmax's time")
    for size in sizes:
        table.add_column(f"{size} px", justify="right")
    selected = result["selections"][0]["assignment"]
    for row in result["sites"]:
        cells = []
        for size in sizes:
            numbers = row["sizes"][str(size)]
            cells.append(f"{_format_interval(numbers['error'])}  {numbers['seconds'] / numbers['stock_seconds']:.2f}×")
        mark = "● " if selected.get(row["site"]) == row["mixer"] else ""
        table.add_row(_short_site(row["site"]), mark + row["mixer"], *cells)
    return table


def _comparison_table(result: dict[str, Any]) -> Table:
    size = str(result["sizes"][-1])
    stock = result["stock_seconds"][size]
    table = Table(
        "selection",
        "softmax sites",
        "min_tokens",
        f"time, {size} px",
        "summed error",
        "error together",
        "minus measured",
        caption="errors: means over sizes [95 % over images]; time of a forward pass / stock, predicted",
    )
    for row in result["selections"]:
        table.add_row(
            row["name"],
            str(row["softmax_sites"]),
            f"{row['min_tokens']:,}",
            f"{row['sizes'][size]['seconds'] / stock:.2f}×",
            f"{row['summed_error']:.4f}",
            _format_interval(row["error"]),
            "–" if row is result["selections"][0] else _format_interval(row["excess"]),
        )
    return table


def _format_interval(interval: dict[str, float]) -> str:
    text = f"{interval['mean']:.4f}"
    if math.isfinite(interval["low"]):
        text += f" [{interval['low']:.4f}, {interval['high']:.4f}]"
    return text


def _short_site(site: str) -> str:
    """Return a site's name without the parts that all sites of a UNet share."""
    return site.replace(".transformer_blocks", "").replace("attentions.", "").removesuffix(".attn1")


def plot_selection(result: dict[str, Any], path: Path) -> None:
    """Plot error against time at the largest size: the front of the summed errors, and the measured selections."""
    size = str(result["sizes"][-1])
    with rc_context(RC):
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.add_subplot()
        seconds = [1e3 * point["seconds"] for point in result["front"]]
        errors = [point["summed_error"] for point in result["front"]]
        axes.step(seconds, errors, where="post", color=PALETTE[0], label="optimal, summed errors of single sites")
        axes.axvline(1e3 * result["stock_seconds"][size], color=GRAY, linestyle=":", label="stock attention")
        for number, row in enumerate(result["selections"]):
            is_measured = number == 0
            error = row["error"]
            bars = (
                None if math.isnan(error["low"]) else [[error["mean"] - error["low"]], [error["high"] - error["mean"]]]
            )
            axes.errorbar(
                1e3 * row["sizes"][size]["seconds"],
                error["mean"],
                yerr=bars,
                color=PALETTE[1] if is_measured else PALETTE[2 + (number - 1) % (len(PALETTE) - 2)],
                marker="*" if is_measured else MARKERS[(number - 1) % len(MARKERS)],
                markersize=12 if is_measured else 5,
                linestyle="none",
                label="selected by measurement" if is_measured else row["name"],
            )
        axes.set_xlabel(f"predicted time of a forward pass at {size} px, batch 2 (ms)")
        axes.set_ylabel("squared error / the teacher's mean square")
        axes.legend(fontsize=7)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, metadata={"Software": None})
