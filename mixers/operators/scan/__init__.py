"""selective_scan: W_ij = Σ_n C_i B_j dt_j ∏ exp(dt_t A), one matrix for every value channel."""

from mixers.operators.scan.backend import SelectiveScanBackend, SelectiveScanCall
from mixers.operators.scan.operator import selective_scan, selective_scan_matrix

__all__ = ["SelectiveScanBackend", "SelectiveScanCall", "selective_scan", "selective_scan_matrix"]
