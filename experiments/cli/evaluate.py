"""`mixlab evaluate`: measure an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from experiments.cli.app import Out, Plugins, Settings, app, clean_errors, console, load_plugins, progress


@app.command()
def evaluate(
    adapter: Annotated[str, typer.Argument(help="folder or Hub id of an adapter, ours or LinFusion's")],
    out: Out = Path("runs/evaluation"),
    teacher: Annotated[str, typer.Option(help="'embedded', a folder in diffusers format, or a Hub id")] = "embedded",
    data: Annotated[str, typer.Option(help="held-out images: 'emoji', or as in docs/howto/data.md")] = "emoji",
    settings: Settings = [],  # noqa: B006 - typer reads the default and never changes it
    plugins: Plugins = [],  # noqa: B006
) -> None:
    """Measure a student and its teacher: agreement, image distances, time, memory, operations, state."""
    from experiments.config import EvaluationConfig, apply_overrides
    from experiments.evaluate.measure import evaluate_adapter
    from experiments.evaluate.measurements import Measurements
    from experiments.evaluate.tables import measurement_tables

    load_plugins(plugins)
    with clean_errors():
        plan = apply_overrides(EvaluationConfig(), settings)
        with progress() as display:
            path = evaluate_adapter(adapter, teacher, data, plan, out, display.callback("evaluation"))
        record = json.loads(path.read_text(encoding="utf-8"))
        measurements = Measurements(protocol=record["protocol"], metrics=record["metrics"])
    for table in measurement_tables(measurements):
        console.print(table)
    console.print(f"Record: {path.resolve()}", soft_wrap=True)
