"""`mixlab evaluate`: an adapter of one's own, measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from experiments.cli.app import Out, Plugins, Settings, app, clean_errors, console, load_plugins, progress


@app.command()
def evaluate(
    adapter: Annotated[Path, typer.Argument(help="an adapter's folder")],
    out: Out = Path("runs/evaluation"),
    teacher: Annotated[str, typer.Option(help="'embedded', a folder in diffusers format, or a Hub id")] = "embedded",
    data: Annotated[str, typer.Option(help="held-out pictures: 'emoji', or as in docs/howto/data.md")] = "emoji",
    settings: Settings = [],  # noqa: B006 - typer reads the default and never changes it
    plugins: Plugins = [],  # noqa: B006
) -> None:
    """Measure a student and its teacher: agreement, distances of pictures, time, memory, operations, state."""
    import json

    from experiments.config import EvaluationConfig, apply_overrides
    from experiments.evaluate.measure import evaluate as run
    from experiments.evaluate.tables import fidelity_table, sweep_table

    load_plugins(plugins)
    with clean_errors():
        plan = apply_overrides(EvaluationConfig(), settings)
        with progress() as display:
            path = run(
                adapter,
                teacher,
                data,
                plan,
                out,
                display.callback("evaluate"),
            )
    record = json.loads(path.read_text(encoding="utf-8"))
    console.print(fidelity_table(record["fidelity"]))
    if record["images"]:
        console.print(sweep_table(record["images"]))
    console.print(f"Record: {path.resolve()}", soft_wrap=True)
