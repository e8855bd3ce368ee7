"""Grids of variants × seeds: cells that run, resume and record.

What defines a grid is here; what runs one is in `run`, `executors`, `budget` and `status`, which import diffusers.
"""

from experiments.ablation.grid import list_grids, load_grid
from experiments.ablation.variants import combine_variants, is_distinct

__all__ = ["combine_variants", "is_distinct", "list_grids", "load_grid"]
