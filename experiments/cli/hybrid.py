"""`mixlab hybrid`: which sites keep softmax attention, selected by measurement."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from experiments.cli.app import (
    Out,
    Plugins,
    Settings,
    WeightVariant,
    app,
    clean_errors,
    console,
    load_plugins,
    progress,
)


@app.command()
def hybrid(
    mixers: Annotated[list[str], typer.Argument(help="names of the candidate mixers")],
    keep: Annotated[str | None, typer.Option(help="largest share of sites that stay softmax, as in 25%")] = None,
    budget: Annotated[
        str | None, typer.Option(help="longest forward pass at the largest size, in times of the fastest: 1.5x")
    ] = None,
    sizes: Annotated[list[int] | None, typer.Option("--size", help="side of the images in pixels; repeat")] = None,
    teacher: Annotated[str, typer.Option(help="'embedded', a folder in diffusers format, or a Hub id")] = "embedded",
    variant: WeightVariant = None,
    data: Annotated[str, typer.Option(help="images with captions: 'scenes', or as in docs/howto/data.md")] = "scenes",
    out: Out = Path("runs/hybrid"),
    settings: Settings = [],  # noqa: B006 - typer reads the default and never changes it
    plugins: Plugins = [],  # noqa: B006
) -> None:
    """Select by measurement which sites get a mixer and which stay softmax. Run it again after a stop to continue."""
    from experiments.config import apply_overrides, validate_config
    from experiments.studies.hybrid_selection import (
        HybridConfig,
        parse_goal,
        plot_selection,
        print_selection,
        run_selection,
    )

    load_plugins(plugins)
    with clean_errors():
        goal = parse_goal(keep, budget)
        tree = {"mixers": mixers, "teacher": teacher, "teacher_variant": variant, "data": data}
        config = validate_config(HybridConfig, tree)
        if sizes:
            settings = [f"evaluation.sizes={sorted(sizes)}", f"distillation.image_size={min(sizes)}", *settings]
        config = apply_overrides(config, settings)
        with progress() as display:
            result = run_selection(out, config, goal, display.update)
        plot_selection(result, out / "hybrid.png")
    print_selection(result, console)
    console.print(f"Adapter, results and figure: {out.resolve()}", soft_wrap=True)
