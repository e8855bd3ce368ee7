"""Mixing matrices of all mixers on one small image, as numbers and figures; the command is `mixlab structure`."""

from experiments.studies.structure.analysis import (
    MatrixAnalysis,
    analyze_mixer,
    analyze_mixers,
    choose_scan_mixer,
)
from experiments.studies.structure.figures import draw_figures

__all__ = ["MatrixAnalysis", "analyze_mixer", "analyze_mixers", "choose_scan_mixer", "draw_figures"]
