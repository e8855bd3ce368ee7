"""Grids of variants × seeds: cells that run, resume and record."""

from experiments.ablation.grid import load_grid
from experiments.ablation.product import distinct, product
from experiments.ablation.run import run_grid
from experiments.ablation.spread import in_processes, in_turn
from experiments.ablation.status import read_status

__all__ = ["distinct", "in_processes", "in_turn", "load_grid", "product", "read_status", "run_grid"]
