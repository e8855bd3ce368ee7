"""Mixers as matrices: their numbers and their pictures."""

from experiments.structure.examine import Record, decaying, examine, records
from experiments.structure.figures import draw

__all__ = ["Record", "decaying", "draw", "examine", "records"]
