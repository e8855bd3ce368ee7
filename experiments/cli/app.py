"""What every verb shares: the app, the console, progress bars, clean errors, common options."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from mixers.allocator import keep_freed_tensors

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Ablations of linear token mixers for image diffusion."
)
console = Console()

Out = Annotated[Path, typer.Option("--out", help="folder that receives everything")]
Settings = Annotated[list[str], typer.Option("--set", help="override, as dotted.key=value; repeat as needed")]
Plugins = Annotated[list[Path], typer.Option("--plugin", help="a .py file that registers mixers; repeat as needed")]


def main() -> None:
    """The console script."""
    _quiet()
    keep_freed_tensors()
    app()


def load(plugins: list[Path]) -> None:
    """Run the plug-ins, which register their mixers; a broken one is one sentence."""
    from mixers.registry import load_plugin

    with clean_errors():
        for path in plugins:
            load_plugin(path)


@contextmanager
def progress() -> Iterator[Progress]:
    """Bars with counts, the time spent and the time left."""
    columns = (TextColumn("{task.description:<48}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console) as bars:
        yield bars


@contextmanager
def clean_errors() -> Iterator[None]:
    """What a user can mend is one sentence, not a traceback."""
    try:
        yield
    except (ValueError, FloatingPointError, OSError, ModuleNotFoundError) as error:
        console.print(f"[red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        console.print("Stopped. Start the same command again to go on.")
        raise typer.Exit(130) from None


def _quiet() -> None:
    """Libraries' start-up chatter is not ours to show."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
