"""`mixlab bench` and `crossover`: what mixers cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from experiments.cli.app import Out, Plugins, app, clean_errors, console, load_plugins, progress


@app.command()
def crossover(
    pattern: Annotated[str, typer.Argument(help="wildcard pattern of mixers' names")] = "*",
    profile: Annotated[str, typer.Option(help="whose sites: embedded, sd15, sd21 or sdxl")] = "embedded",
    dim: Annotated[int | None, typer.Option(min=1, help="width of one kind of site, instead of a profile")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="its number of heads")] = None,
    max_tokens: Annotated[int, typer.Option(help="largest number of tokens")] = 65536,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    repeats: Annotated[int, typer.Option(min=1, help="turns that the medians are over")] = 7,
    out: Out = Path("runs/crossover"),
    plugins: Plugins = [],  # noqa: B006 - typer reads the default and never changes it
) -> None:
    """Measure from how many tokens on each mixer is as fast as softmax attention here: the `min_tokens` to use."""
    from experiments.bench import crossover as bench

    load_plugins(plugins)
    with clean_errors():
        kinds = bench.choose_kinds(profile, dim, heads)
        with progress() as display:
            result = bench.measure_crossovers(
                pattern,
                kinds,
                max_tokens=max_tokens,
                dtype=dtype,
                device=device,
                repeats=repeats,
                report=lambda n, of, what: display.update("crossover", n, of, what),
            )
        record = bench.save(result, out)
        bench.draw(result, out / "crossover.png")
    bench.show(result, console)
    console.print(f"\nRecord and figure: {record.parent.resolve()}", soft_wrap=True)


@app.command()
def bench(
    verb: Annotated[str | None, typer.Argument(help="operators, layers, growth, unet, memory or crossover")] = None,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="rewrite this machine's table of backends")] = False,
    table: Annotated[Path | None, typer.Option(help="of --calibrate; default: where `auto` looks")] = None,
    against: Annotated[str, typer.Option(help="only baselines whose name matches this pattern")] = "*",
    out: Out = Path("runs/bench"),
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    threads: Annotated[int | None, typer.Option(min=1, help="of torch on a CPU")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="turns; medians are over these")] = 7,
    budget: Annotated[float, typer.Option(min=1, help="seconds for all of it, about")] = 1800,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="the ladder ends here")] = None,
    heads: Annotated[str | None, typer.Option(help="heads x width, as in 8x40,8x80")] = None,
    batch: Annotated[int | None, typer.Option(min=1)] = None,
    profile: Annotated[str, typer.Option(help="of unet: embedded, sd15, sd21 or sdxl")] = "embedded",
    mixer: Annotated[str | None, typer.Option(help="of unet; default: LinFusion")] = None,
    min_tokens: Annotated[int, typer.Option(min=1, help="of unet's hybrid")] = 512,
    sizes: Annotated[list[int] | None, typer.Option("--size", help="of unet: sides in pixels; repeat")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="tiny sizes, to see that it runs")] = False,
) -> None:
    """Measure what mixers cost here: against others' implementations, and against what the machine can do."""
    import torch

    from experiments.bench import commands
    from experiments.bench.contest import Limits

    with clean_errors():
        if threads is not None:
            torch.set_num_threads(threads)
        setup = commands.make_setup(device, dtype, quick, max_tokens, heads, batch)
        limits = Limits(1 if quick else repeats, budget=budget)
        if calibrate and quick and table is None:
            raise ValueError("--quick measures next to nothing: give the table a --table of its own.")
        if calibrate:
            commands.calibrate(setup, table, console, progress, (16, 64) if quick else commands.LADDER)
        elif verb == "crossover":
            tokens = max_tokens or (128 if quick else 65536)
            crossover(max_tokens=tokens, dtype=dtype, device=device, repeats=limits.repeats, out=out)
        elif verb is None:
            raise ValueError(f"Expected a benchmark: {', '.join((*commands.VERBS, 'crossover'))}; or --calibrate.")
        else:
            sides = tuple(sizes or commands.SIZES[: 1 if quick else None])
            chosen = {"profile": profile, "mixer": mixer or commands.MOUNTED, "min_tokens": min_tokens, "sizes": sides}
            commands.bench(verb, out, against, setup, limits, chosen, console, progress)
