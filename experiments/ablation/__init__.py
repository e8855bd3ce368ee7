"""Grids of variants × seeds: cells that run, resume and record."""

from experiments.ablation.grid import load_grid
from experiments.ablation.run import run_grid

__all__ = ["load_grid", "run_grid"]
