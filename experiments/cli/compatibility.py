"""`mixlab compatibility`: do parts that were trained for the softmax UNet work under a student?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from experiments.cli.app import Out, app, clean_errors, console, progress
from experiments.cli.option_checks import check_finite


@app.command()
def compatibility(
    out: Out = Path("runs/compatibility"),
    share: Annotated[
        float, typer.Option("--steps-share", min=0.0, help="train for this share of the steps", callback=check_finite)
    ] = 1.0,
) -> None:
    """Measure whether a ControlNet and an IP-Adapter made for softmax attention work under a distilled student."""
    from experiments.studies.compatibility import default_config, print_summary, run_compatibility, write_page

    with clean_errors():
        with progress() as display:
            result = run_compatibility(out, default_config(share), display.callback("compatibility"))
        page = write_page(out, out / "compatibility.md")
    print_summary(result, console)
    console.print(f"Page: {page.resolve()}", soft_wrap=True)
