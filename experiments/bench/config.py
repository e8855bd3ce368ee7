"""The problem sizes, device and dtype of a benchmark, and how they are read from command-line options."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from experiments.core.devices import check_device
from mixers.operators import backends
from mixers.operators.backend import kernel_names
from mixers.suggest import unknown_name

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


@dataclass(frozen=True)
class BenchmarkConfig:
    """What operators and layers are benchmarked with.

    Attributes:
        device: "cpu" or "cuda", optionally with an index.
        dtype: of the inputs and the parameters.
        batch: batch size.
        heads: (number of heads, width of each); operators are measured for every pair.
        lengths: numbers of tokens, in increasing order.
        backward: whether the forward and backward passes together are measured too.
    """

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    batch: int = 2
    heads: tuple[tuple[int, int], ...] = ((8, 40),)
    lengths: tuple[int, ...] = (4096, 16384, 65536, 262144)
    backward: bool = True

    @property
    def max_recurrent_tokens(self) -> int:
        """The largest number of tokens at which the recurrent formulation, a loop over tokens, is measured."""
        return 16384 if self.device == "cpu" else 1024

    def randn(self, *shape: int) -> Tensor:
        """Return normal random numbers on the device, in the dtype."""
        return torch.randn(*shape, device=self.device).to(self.dtype)

    def available_kernels(self) -> list[str]:
        """Return the names of the backends that can run on the device, besides the plain formulations."""
        availability = backends(torch.device(self.device).type)
        return [name for name in kernel_names() if availability[name] == "available"]


QUICK = BenchmarkConfig(batch=1, heads=((2, 8),), lengths=(64, 128))
"""Sizes that take seconds, to check that a benchmark runs."""


def parse_config(
    device: str, dtype: str, quick: bool, max_tokens: int | None, heads: str | None, batch: int | None
) -> BenchmarkConfig:
    """Build the configuration that command-line options describe.

    Args:
        device: "cpu" or "cuda", optionally with an index.
        dtype: one of `DTYPES`.
        quick: start from `QUICK` instead of the defaults.
        max_tokens: the largest number of tokens; None: the default.
        heads: pairs of number and width, as in "8x40,8x80"; None: the default.
        batch: batch size; None: the default.

    Raises:
        ValueError: an unknown device or dtype, a missing GPU, or malformed heads.
    """
    check_device(device)
    if dtype not in DTYPES:
        raise ValueError(unknown_name("dtype", dtype, DTYPES))
    config = replace(QUICK if quick else BenchmarkConfig(), device=device, dtype=DTYPES[dtype])
    if heads is not None:
        config = replace(config, heads=_parse_heads(heads))
    if max_tokens is not None:
        lengths = {max_tokens, *(length for length in config.lengths if length < max_tokens)}
        config = replace(config, lengths=tuple(sorted(lengths)))
    if batch is not None:
        config = replace(config, batch=batch)
    return config


def _parse_heads(text: str) -> tuple[tuple[int, int], ...]:
    pairs = [pair.split("x") for pair in text.split(",")]
    try:
        heads = tuple((int(number), int(width)) for number, width in pairs)
    except ValueError:
        heads = ()
    if not heads or min(map(min, heads)) < 1:
        raise ValueError(f"Cannot read --heads {text!r}: expected number x width, as in 8x40,8x80.")
    return heads
