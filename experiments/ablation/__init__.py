"""Grids of variants × seeds: cells that run, resume and record."""

from experiments.ablation.budget import fit_budget, parse_duration
from experiments.ablation.grid import load_grid
from experiments.ablation.product import distinct, product
from experiments.ablation.run import chosen, run_grid
from experiments.ablation.spread import in_processes, in_turn
from experiments.ablation.status import read_status

__all__ = [
    "chosen",
    "distinct",
    "fit_budget",
    "in_processes",
    "in_turn",
    "load_grid",
    "parse_duration",
    "product",
    "read_status",
    "run_grid",
]
