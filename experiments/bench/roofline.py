"""The roofline: the least time that a computation can take on a machine with measured bandwidth and matrix rate."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from experiments.core.timing import time_interleaved


@dataclass(frozen=True)
class Workload:
    """The least that a computation has to do.

    Attributes:
        bytes_moved: bytes to read and write.
        flops: floating-point operations; a multiply-add counts as two.
    """

    bytes_moved: int
    flops: int


@dataclass(frozen=True)
class Roofline:
    """The limits of a machine.

    Attributes:
        bytes_per_second: bandwidth of a copy, reads and writes counted.
        flops_per_second: rate of a large matrix product.
    """

    bytes_per_second: float
    flops_per_second: float

    def seconds(self, workload: Workload) -> float:
        """Return the least time that a workload takes: for its bytes or for its operations, whichever is longer."""
        return max(workload.bytes_moved / self.bytes_per_second, workload.flops / self.flops_per_second)


def measure_roofline(device: str, dtype: torch.dtype, repeats: int = 5) -> Roofline:
    """Measure a machine's limits: the best of several repeats, on tensors larger than any cache."""
    is_gpu = device.startswith("cuda")
    source = torch.randn((1 << 28) if is_gpu else (1 << 24), device=device)
    target = torch.empty_like(source)
    side = 8192 if is_gpu else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    runs = {"copy": lambda: target.copy_(source), "product": lambda: a @ b}
    times = time_interleaved(runs, repeats, device=device)
    copied_bytes = 2 * source.numel() * source.element_size()
    return Roofline(copied_bytes / min(times["copy"]), 2 * side**3 / min(times["product"]))
