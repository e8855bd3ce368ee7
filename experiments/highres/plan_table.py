"""Print a memory plan."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from unet_adapters.highres import MemoryPlan
from unet_adapters.highres.memory import format_bytes
from unet_adapters.highres.plan import StageEstimate
from unet_adapters.highres.stages import format_size


def print_plan(plan: MemoryPlan, console: Console) -> None:
    """Print one row per stage, then the peak, the savings and, if it is estimated, the time."""
    columns = ["stage", "runs", "steps", "denoising", "pixels", "largest", "TFLOP"]
    if plan.seconds is not None:
        columns.append("time")
    table = Table(*columns, padding=(0, 0))
    for stage in plan.stages:
        table.add_row(*_cells(stage))
    console.print(table)
    console.print(
        "denoising, pixels: peak memory with the weights. largest: elements of the largest tensor.",
        style="dim",
        soft_wrap=True,
    )
    time = "" if plan.seconds is None else f" Denoising takes about {format_duration(plan.seconds)}."
    console.print(
        f"Peak {format_bytes(plan.peak_bytes)}. Savings: {', '.join(plan.savings)}; pixels in tiles of "
        f"{plan.tiling.tile} latent pixels.{time}",
        soft_wrap=True,
    )


def format_duration(seconds: float) -> str:
    """Format seconds below 100 s, minutes otherwise."""
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:,.0f} min"


def _cells(estimate: StageEstimate) -> list[str]:
    stage = estimate.stage
    cells = [
        format_size(stage.size),
        "from noise" if stage.strength == 1 else f"last {stage.strength:g}",
        str(estimate.steps),
        format_bytes(estimate.denoising_bytes),
        format_bytes(estimate.decoding_bytes),
        f"{_three_digits(estimate.largest_tensor / 1e6)} M",
        _three_digits(estimate.flops / 1e12),
    ]
    return cells if estimate.seconds is None else [*cells, format_duration(estimate.seconds)]


def _three_digits(value: float) -> str:
    """Format three digits, without an exponent if there are more before the decimal point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
