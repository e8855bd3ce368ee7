"""`mixlab`: every command is also a function; these files only parse options, show progress and print."""

from experiments.cli import (  # noqa: F401 - each module adds its commands to the app
    ablate,
    bench,
    compatibility,
    distill,
    evaluate,
    highres,
    hybrid,
    mixers,
    report,
    teacher,
)
from experiments.cli.app import app, main

__all__ = ["app", "main"]
