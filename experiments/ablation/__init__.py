"""Grids of variants × seeds: cells that run, resume and record."""

from experiments.ablation.budget import fit_budget, parse_duration
from experiments.ablation.executors import run_in_processes, run_serially
from experiments.ablation.grid import list_grids, load_grid
from experiments.ablation.run import run_grid, select_cells
from experiments.ablation.status import read_status
from experiments.ablation.variants import combine_variants, is_distinct

__all__ = [
    "combine_variants",
    "fit_budget",
    "is_distinct",
    "list_grids",
    "load_grid",
    "parse_duration",
    "read_status",
    "run_grid",
    "run_in_processes",
    "run_serially",
    "select_cells",
]
