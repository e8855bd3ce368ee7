"""Which self-attention sites keep softmax attention and which get a mixer, selected by measurement.

The command is `mixlab hybrid`.
"""

from experiments.studies.hybrid_selection.config import HybridConfig, SelectionGoal, parse_goal
from experiments.studies.hybrid_selection.report import plot_selection, print_selection
from experiments.studies.hybrid_selection.run import run_selection

__all__ = ["HybridConfig", "SelectionGoal", "parse_goal", "plot_selection", "print_selection", "run_selection"]
