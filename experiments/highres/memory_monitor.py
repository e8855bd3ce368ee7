"""Measure the time and peak memory of the parts of a large image."""

from __future__ import annotations

import time
from typing import Any

import torch

from experiments.core.memory import peak_resident_bytes, reset_peak_resident_bytes


class MemoryMonitor:
    """A progress callback of `generate` that measures every part: each stage's denoising, and `pixels`.

    Attributes:
        parts: by name: `steps`, `seconds`, and `bytes` at the peak. On a GPU these are all allocated bytes, the weights
            included; on a CPU the growth of the resident set, or None where the system cannot report it.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self.parts: dict[str, dict[str, Any]] = {}
        self._start_time = 0.0
        self._start_bytes = 0

    def __call__(self, part: str, completed: int, total: int) -> None:
        """Start measuring a part at its first call, and stop when it is complete."""
        if part not in self.parts:
            self.parts[part] = {"steps": total}
            self._start()
        if completed == total:
            self.parts[part] |= self._stop()

    def _start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._start_bytes = reset_peak_resident_bytes() or 0
        self._start_time = time.perf_counter()

    def _stop(self) -> dict[str, Any]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            peak: int | None = torch.cuda.max_memory_allocated(self.device)
        else:
            peak = peak_resident_bytes() - self._start_bytes if self._start_bytes else None
        return {"seconds": time.perf_counter() - self._start_time, "bytes": peak}
