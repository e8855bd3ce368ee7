"""Peak memory of a call, on a CPU or a GPU."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path

import torch

_MMAP_MAX, _MMAP_THRESHOLD, _TRIM_THRESHOLD = -4, -3, -1  # of malloc.h


def peak_bytes(run: Callable[[], object], device: str = "cpu") -> int | None:
    """What a call needs above what is there before it: the allocator's peak on a GPU, the peak resident set on Linux.

    None elsewhere, and where a container forbids to reset the peak. A call that was made before has its libraries'
    buffers already; make one first, or count them in.
    """
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return int(torch.cuda.max_memory_allocated(device) - before)
    resident = reset_resident_peak()
    run()
    return None if resident is None else max(0, resident_peak() - resident)


def reset_resident_peak() -> int | None:
    """Forget the peak of the resident set so far; bytes resident now, or None where that cannot be done."""
    if not sys.platform.startswith("linux"):
        return None
    ctypes.CDLL(None).malloc_trim(0)  # give freed pages back, or an earlier peak hides the next
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the present resident set
    except OSError:
        return None
    return _status_bytes("VmRSS")


def resident_peak() -> int:
    """Bytes of the resident set at its peak since the last reset; Linux only."""
    return _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"Cannot read the memory in use: /proc/self/status has no {field}.")


def keep_freed_memory() -> None:
    """Have the C library keep what is freed, for all of this process, instead of giving it back to the system.

    A tensor beyond 32 MB is mapped anew each time, and the system clears its pages at every first touch: at 262,144
    tokens that was up to half of a mixer's time. Programs that work on large images gain the same by the environment:
    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1. Does nothing where the C library is not GNU's.
    """
    _tell_allocator({_MMAP_MAX: 0, _TRIM_THRESHOLD: -1})


def return_freed_memory() -> None:
    """Have the C library give freed memory back to the system at once, for all of this process.

    By itself it keeps tensors of up to 32 MB in a heap that falls into pieces: a guided call of SD-1.5 at 1024 px had
    300 MB in it that no tensor held. The price is that pages are cleared anew for each tensor beyond 1 MB. Does nothing
    where the C library is not GNU's.
    """
    _tell_allocator({_MMAP_THRESHOLD: 2**20, _TRIM_THRESHOLD: 2**21})


def _tell_allocator(settings: dict[int, int]) -> None:
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        for option, value in settings.items():
            library.mallopt(option, value)
