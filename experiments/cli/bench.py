"""`mixlab bench` and `mixlab crossover`: what mixers cost on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from experiments.cli.app import Out, Plugins, app, clean_errors, console, load_plugins, progress
from experiments.cli.option_checks import check_file, check_finite

if TYPE_CHECKING:
    from experiments.bench.config import BenchmarkConfig


@app.command()
def crossover(
    pattern: Annotated[str, typer.Argument(help="wildcard pattern of mixers' names")] = "*",
    profile: Annotated[str, typer.Option(help="the UNet's sites: embedded, sd15, sd21 or sdxl")] = "embedded",
    dim: Annotated[int | None, typer.Option(min=1, help="width of a single site, instead of a profile")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="number of heads of that site")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="largest number of tokens")] = 65536,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    repeats: Annotated[int, typer.Option(min=1, help="turns that medians are taken over")] = 7,
    budget: Annotated[float, typer.Option(min=1, help="seconds for all of it", callback=check_finite)] = 7200,
    out: Out = Path("runs/crossover"),
    plugins: Plugins = [],  # noqa: B006 - typer reads the default and never changes it
) -> None:
    """Measure from how many tokens each mixer is as fast as softmax attention here: the `min_tokens` to use."""
    from experiments.bench.attention_layer import choose_site_shapes
    from experiments.bench.crossover import measure_crossovers
    from experiments.bench.crossover_report import plot_crossovers, print_crossovers, save_crossovers

    load_plugins(plugins)
    with clean_errors():
        shapes = choose_site_shapes(profile, dim, heads)
        with progress() as display:
            result = measure_crossovers(
                pattern,
                shapes,
                max_tokens=max_tokens,
                dtype=dtype,
                device=device,
                repeats=repeats,
                budget_seconds=budget,
                progress=display.callback("crossover"),
            )
        path = save_crossovers(result, out)
        plot_crossovers(result, out / "crossover.png")
    print_crossovers(result, console)
    console.print(f"\nResults and figure: {path.parent.resolve()}", soft_wrap=True)


@app.command()
def bench(
    suite: Annotated[str | None, typer.Argument(help="operators, layers, growth, unet, memory or crossover")] = None,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="rewrite this machine's table of backends")] = False,
    table: Annotated[
        Path | None, typer.Option(help="of --calibrate; default: where `auto` looks", callback=check_file)
    ] = None,
    only: Annotated[str, typer.Option(help="only benchmarks whose name matches this pattern")] = "*",
    against: Annotated[str, typer.Option(help="only baselines whose name matches this pattern")] = "*",
    out: Out = Path("runs/bench"),
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    threads: Annotated[int | None, typer.Option(min=1, max=4096, help="number of torch's threads on a CPU")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="turns that medians are taken over")] = 7,
    budget: Annotated[float, typer.Option(min=1, help="seconds for all of it", callback=check_finite)] = 1800,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="largest number of tokens")] = None,
    heads: Annotated[str | None, typer.Option(help="number x width of heads, as in 8x40,8x80")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="batch size")] = None,
    profile: Annotated[str, typer.Option(help="of unet: embedded, sd15, sd21 or sdxl")] = "embedded",
    mixer: Annotated[str | None, typer.Option(help="of unet; default: LinFusion")] = None,
    min_tokens: Annotated[int, typer.Option(min=1, help="of unet's hybrid")] = 512,
    sizes: Annotated[list[int] | None, typer.Option("--size", help="of unet: sides in pixels; repeat")] = None,
    no_plots: Annotated[bool, typer.Option("--no-plots", help="write tables only")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="tiny sizes, to check that it runs")] = False,
    plugins: Plugins = [],  # noqa: B006
) -> None:
    """Measure what mixers cost here, against other implementations and against the machine's limits."""
    import torch

    from experiments.bench.benchmark import BenchmarkLimits
    from experiments.bench.config import parse_config
    from experiments.bench.model_benchmarks import DEFAULT_MIXER, UNetBenchmarkConfig
    from experiments.bench.suites import SUITES, run_suite, suite_benchmarks

    load_plugins(plugins)
    with clean_errors():
        if threads is not None:
            torch.set_num_threads(threads)
        config = parse_config(device, dtype, quick, max_tokens, heads, batch)
        repeats = 1 if quick else repeats
        if calibrate:
            _calibrate(config, table, quick, budget)
            return
        if suite is None:
            raise ValueError(f"Expected a benchmark, one of {', '.join((*SUITES, 'crossover'))}, or --calibrate.")
        if suite == "crossover":
            tokens = max_tokens or (128 if quick else 65536)
            crossover(max_tokens=tokens, dtype=dtype, device=device, repeats=repeats, budget=budget, out=out)
            return
        default_sizes = UNetBenchmarkConfig().sizes[: 1 if quick else None]
        unet_config = UNetBenchmarkConfig(profile, mixer or DEFAULT_MIXER, min_tokens, tuple(sizes or default_sizes))
        benchmarks = suite_benchmarks(suite, config, unet_config, only, against)
        limits = BenchmarkLimits(repeats, budget_seconds=budget)
        with progress() as display:
            run_suite(suite, benchmarks, config, limits, out, console, display.callback(suite), not no_plots)
        console.print(f"Tables and plots: {(out / suite).resolve()}.md", soft_wrap=True)


def _calibrate(config: BenchmarkConfig, path: Path | None, quick: bool, budget: float) -> None:
    """Measure the table of backends, write it and print it."""
    from rich.table import Table

    from experiments.bench.calibrate import LENGTHS, calibrate_backends, call_kinds

    if quick and path is None:
        raise ValueError("Cannot replace this machine's table with --quick, which hardly measures: pass --table PATH.")
    with progress() as display:
        path, rows = calibrate_backends(
            config, path, (16, 64) if quick else LENGTHS, budget, display.callback("backends")
        )
    kinds = len(list(call_kinds()))
    if len(rows) < kinds:
        console.print(f"The time budget allowed {len(rows)} of {kinds} kinds of calls.")
    table = Table("operator", "causality", "decay", "backends and the largest number of tokens for each")
    for row in rows:
        order = ", then ".join(f"{name}{'' if bound is None else f' ≤ {bound:,}'}" for name, bound in row.order)
        table.add_row(row.operator, row.causality, row.decay, order)
    console.print(table)
    console.print(f'Written to {path.resolve()}, which backend="auto" follows from now on.', soft_wrap=True)
