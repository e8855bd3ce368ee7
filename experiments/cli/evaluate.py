"""`mixlab evaluate` and `export`: measure an adapter, and generate images for external benchmarks."""

from __future__ import annotations

import json
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
def evaluate(
    adapter: Annotated[str, typer.Argument(help="folder or Hub id of an adapter, ours or LinFusion's")],
    out: Out = Path("runs/evaluation"),
    teacher: Annotated[str, typer.Option(help="'embedded', a folder in diffusers format, or a Hub id")] = "embedded",
    variant: WeightVariant = None,
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
            path = evaluate_adapter(adapter, teacher, data, plan, out, display.callback("evaluation"), variant)
        record = json.loads(path.read_text(encoding="utf-8"))
        measurements = Measurements(protocol=record["protocol"], metrics=record["metrics"])
    for table in measurement_tables(measurements):
        console.print(table)
    console.print(f"Record: {path.resolve()}", soft_wrap=True)


@app.command()
def export(
    prompts: Annotated[Path, typer.Argument(help="geneval's evaluation_metadata.jsonl, or DPG's folder of .txt files")],
    layout: Annotated[str, typer.Option(help="geneval or dpg")],
    out: Out = Path("runs/export"),
    adapter: Annotated[str | None, typer.Option(help="folder or Hub id of an adapter; default: the teacher")] = None,
    teacher: Annotated[str, typer.Option(help="'embedded', a folder in diffusers format, or a Hub id")] = "embedded",
    variant: WeightVariant = None,
    size: Annotated[int, typer.Option(min=8, help="side of the images in pixels")] = 64,
    settings: Settings = [],  # noqa: B006 - typer reads the default and never changes it
    plugins: Plugins = [],  # noqa: B006
) -> None:
    """Generate images for an external benchmark, in the folders that it expects; start again to continue."""
    from experiments.config import EvaluationConfig, apply_overrides
    from experiments.evaluate.export_images import export_images
    from experiments.teacher.load import open_teacher
    from unet_adapters import load_adapter

    load_plugins(plugins)
    with clean_errors():
        plan = apply_overrides(EvaluationConfig(), settings)
        pipe = open_teacher(teacher, variant=variant).pipe
        student = None if adapter is None else load_adapter(adapter, pipe).mount()
        with progress() as display:
            count = export_images(pipe, layout, prompts, size, plan, out, display.callback("export"))
        if student is not None:
            student.unmount()
    console.print(f"{count} prompts: {out.resolve()}", soft_wrap=True)
