"""What the parts of a large image take, from the reports of `generate`."""

from __future__ import annotations

import time
from typing import Any

import torch

from experiments.core.memory import peak_resident_bytes, reset_peak_resident_bytes


class Watch:
    """Seconds and peak memory of every part: a stage's denoising, or `pixels`.

    Attributes:
        parts: by name: steps, seconds, and bytes at the peak; on a GPU all that is allocated, weights included, on a
            CPU what is above the resident set before the part, or None where that is not to be had.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device, self.parts = torch.device(device), dict[str, dict[str, Any]]()
        self._began, self._resident = 0.0, 0

    def __call__(self, what: str, done: int, total: int) -> None:
        """A report: the first of a part starts its clock, the last stops it."""
        if what not in self.parts:
            self.parts[what] = {"steps": total}
            self._start()
        if done == total:
            self.parts[what] |= self._stop()

    def _start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._resident = reset_peak_resident_bytes() or 0
        self._began = time.perf_counter()

    def _stop(self) -> dict[str, Any]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            peak: int | None = torch.cuda.max_memory_allocated(self.device)
        else:
            peak = peak_resident_bytes() - self._resident if self._resident else None
        return {"seconds": time.perf_counter() - self._began, "bytes": peak}
