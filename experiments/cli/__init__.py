"""`mixlab`: every verb is also a function; these files only parse, show progress and print. One file a room."""

from experiments.cli import ablate, bench, distill, evaluate, highres, mixers, report, teacher  # noqa: F401 - they add their verbs
from experiments.cli.app import app, main

__all__ = ["app", "main"]
