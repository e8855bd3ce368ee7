"""The devices and cores that this process may use."""

from __future__ import annotations

import os

import torch


def best_device() -> str:
    """Return "cuda" if there is a GPU that torch can use, otherwise "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def available_cores() -> int:
    """Return how many CPU cores this process may run on, which can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads_per_process(processes: int) -> int:
    """Return each process's share of the available cores, at least one."""
    return max(1, available_cores() // processes)
