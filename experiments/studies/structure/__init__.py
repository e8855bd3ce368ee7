"""Mixers as matrices: their numbers and their pictures."""

from experiments.studies.structure.examine import Record, decaying, examine, records
from experiments.studies.structure.figures import draw

__all__ = ["Record", "decaying", "draw", "examine", "records"]
