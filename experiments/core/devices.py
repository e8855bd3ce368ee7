"""The devices and cores that this process may use."""

from __future__ import annotations

import os

import torch

from mixers.suggest import unknown_name

DEVICES = ("cpu", "cuda")


def best_device() -> str:
    """Return "cuda" if there is a GPU that torch can use, otherwise "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(device: str) -> None:
    """Check that a device exists, before work that would be lost.

    Args:
        device: "cpu" or "cuda", optionally with an index.

    Raises:
        ValueError: the device is neither a CPU nor a GPU, or torch finds no such GPU.
    """
    kind, separator, index = device.partition(":")
    if kind not in DEVICES or (separator and (kind == "cpu" or not index.isdecimal())):
        raise ValueError(unknown_name("device", device, DEVICES))
    if kind == "cpu":
        return
    if not torch.cuda.is_available():
        raise ValueError(f"Cannot use device {device!r}: torch finds no GPU here. Use cpu.")
    if int(index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ValueError(f"Cannot use device {device!r}: torch finds {count} GPUs here, cuda:0 to cuda:{count - 1}.")


def available_cores() -> int:
    """Return how many CPU cores this process may run on, which can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads_per_process(processes: int) -> int:
    """Return each process's share of the available cores, at least one."""
    return max(1, available_cores() // processes)
