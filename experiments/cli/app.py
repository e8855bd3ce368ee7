"""What every verb shares: the app, the consoles, progress, error messages, common options."""

from __future__ import annotations

import logging
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from experiments.cli.option_checks import check_folder
from experiments.core.errors import first_line, is_out_of_memory
from experiments.core.progress import ProgressDisplay, show_progress
from experiments.core.signals import Interrupted, raise_on_sigterm
from mixers.allocator import keep_freed_tensors

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Ablations of linear token mixers for image diffusion."
)
console = Console(markup=False)  # names, questions and errors may have brackets; styled parts are `Text`
error_console = Console(stderr=True, markup=False)

Out = Annotated[Path, typer.Option("--out", help="folder that receives everything", callback=check_folder)]
Settings = Annotated[list[str], typer.Option("--set", help="override, as dotted.key=value; repeat as needed")]
Plugins = Annotated[
    list[Path], typer.Option("--plugin", help="a .py file that registers mixers, objectives …; repeat as needed")
]

WeightVariant = Annotated[
    str | None,
    typer.Option("--variant", help="weight files of the model to read, such as fp16; default: the plain ones"),
]


def main() -> None:
    """Run the console script."""
    _silence_libraries()
    keep_freed_tensors()
    if threading.current_thread() is threading.main_thread():
        raise_on_sigterm()
    app()


def load_plugins(paths: list[Path]) -> None:
    """Run the plug-ins, which register their mixers and so on; a broken one is reported in one sentence."""
    if not paths:
        return  # importing everything that plug-ins can register takes seconds
    from experiments.core.plugins import load_plugin

    with clean_errors():
        for path in paths:
            load_plugin(path)


def progress() -> AbstractContextManager[ProgressDisplay]:
    """Show progress on the console: bars if it is a terminal, otherwise lines."""
    return show_progress(console)


def print_error(message: str) -> None:
    """Print an error message to stderr."""
    error_console.print(Text.assemble(("error:", "red"), f" {message}"), soft_wrap=True, highlight=False)


def print_titled(title: str, text: str, style: str = "bold", *, to: Console = console) -> None:
    """Print "title: text" with the title in a style."""
    to.print(Text.assemble((title, style), f": {text}"), soft_wrap=True, highlight=False)


@contextmanager
def clean_errors() -> Iterator[None]:
    """Report what a user can fix in one sentence on stderr, without a traceback, and exit with a fitting code."""
    try:
        yield
    except (ValueError, FloatingPointError, OSError, ModuleNotFoundError, RecursionError) as error:
        print_error(str(error))
        raise typer.Exit(2) from None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print_error(f"Out of memory: {first_line(error)} Use smaller sizes or batches, or another device.")
        raise typer.Exit(2) from None
    except Interrupted as interruption:
        error_console.print(str(interruption), soft_wrap=True, highlight=False)
        raise typer.Exit(interruption.exit_code) from None
    except KeyboardInterrupt:
        error_console.print("Interrupted.")
        raise typer.Exit(130) from None


def _silence_libraries() -> None:
    """Hide the start-up messages of libraries."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks.*")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
