"""Peak memory of a call on a CPU or a GPU, and how the C library treats freed memory."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

# Options of mallopt, from glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_MMAP_MAX = -4

_DEFAULT_MMAP_MAX = 65536
_LARGEST_TRIM_THRESHOLD = 2**26  # the most that glibc reaches by adjusting the threshold itself


def measure_peak_bytes(run: Callable[[], object], device: str = "cpu") -> int | None:
    """Call `run` and return the bytes that it needs at its peak, above what is in use before the call.

    On a GPU this is the allocator's peak, on a CPU under Linux the peak of the resident set. Call `run` once before,
    unless the buffers that libraries allocate on a first call should be included.

    Args:
        run: the call to measure.
        device: "cpu" or "cuda", optionally with an index.

    Returns:
        Bytes, or None where the resident set cannot be measured: on other systems than Linux, and in containers that
        forbid resetting the peak.
    """
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return int(torch.cuda.max_memory_allocated(device) - before)
    resident = reset_peak_resident_bytes()
    run()
    return None if resident is None else max(0, peak_resident_bytes() - resident)


def reset_peak_resident_bytes() -> int | None:
    """Reset the recorded peak of the resident set.

    Returns:
        Bytes that are resident now, or None where the peak cannot be reset (see `measure_peak_bytes`).
    """
    if not sys.platform.startswith("linux"):
        return None
    _trim_heap()  # or freed pages of an earlier peak hide the next one
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to the current resident set
    except OSError:
        return None
    return _status_bytes("VmRSS")


def peak_resident_bytes() -> int:
    """Return the peak of the resident set since the last reset, in bytes; Linux only."""
    return _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"Cannot read the memory in use: /proc/self/status has no line {field!r}.")


@contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Let the C library keep freed memory inside, instead of returning it to the system.

    By default every tensor beyond 32 MB is mapped when it is allocated, and the system clears its pages at the first
    touch: at 262,144 tokens this took up to half of a mixer's time. Other programs get the same effect from the
    environment: MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1.

    On exit the kept memory is returned and large tensors are mapped again. The C library cannot report its limits, so
    they become glibc's own rather than those from before. Without glibc this does nothing.
    """
    _set_malloc_options({_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1})
    try:
        yield
    finally:
        _set_malloc_options({_M_MMAP_MAX: _DEFAULT_MMAP_MAX, _M_TRIM_THRESHOLD: _LARGEST_TRIM_THRESHOLD})
        gc.collect()
        _trim_heap()


@contextmanager
def existing_objects_uncollected() -> Iterator[None]:
    """Leave everything that exists at the start out of the garbage collections inside.

    A collection walks through every object of every imported module, which takes a third of a second; one that only
    looks at what a measurement has created takes milliseconds. On exit the objects are collected as before, unless the
    caller had frozen some himself.
    """
    were_frozen = gc.get_freeze_count() > 0
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        if not were_frozen:
            gc.unfreeze()


def return_freed_memory() -> None:
    """Let the C library return freed memory to the system at once, for the rest of this process.

    By default it keeps tensors of up to 32 MB in a heap that fragments: a guided call of SD-1.5 at 1024 px left 300 MB
    in it that no tensor used. The cost is that the system clears the pages of every new tensor beyond 1 MB. Without
    glibc this does nothing.
    """
    _set_malloc_options({_M_MMAP_THRESHOLD: 2**20, _M_TRIM_THRESHOLD: 2**21})


def _trim_heap() -> None:
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def _set_malloc_options(options: dict[int, int]) -> None:
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        for option, value in options.items():
            library.mallopt(option, value)
