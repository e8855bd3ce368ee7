"""Timing that a busy machine disturbs as little as possible (in turns, repeated, never too short), and what is timed:
one attention layer, stock and with mixers."""

from __future__ import annotations

import copy
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import Transformer2DModel
from torch import Tensor, nn

from experiments.core.timing import time_interleaved
from unet_adapters import MixerAdapter
from unet_adapters.grid import PLACE

BATCH = 2  # one image under classifier-free guidance
STOCK = "stock attention"
SITE = "transformer.transformer_blocks.0.attn1"


@dataclass(frozen=True, order=True)
class Kind:
    """What sites are told apart by: the width of their tokens and their number of heads."""

    dim: int
    heads: int

    def __post_init__(self) -> None:
        if self.heads < 1 or self.dim < 1 or self.dim % self.heads:
            raise ValueError(f"{self.heads} heads do not divide a width of {self.dim}.")

    def __str__(self) -> str:
        return f"dim {self.dim}, heads {self.heads}"


class CannotRun(Exception):
    """A mixer that cannot be built, mounted or run at this kind of site."""

    def __init__(self, mixer: str, error: Exception) -> None:
        super().__init__(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        self.mixer = mixer


class Bench:
    """Times one attention layer, stock and with mixers mounted, with random weights; batch 2, no gradients."""

    def __init__(self, dtype: torch.dtype, device: str, repeats: int) -> None:
        self.dtype, self.device, self.repeats = dtype, device, repeats
        self._layers: dict[tuple[Kind, str], nn.Module] = {}

    @torch.no_grad()
    def __call__(self, kind: Kind, tokens: int, names: Sequence[str]) -> dict[str, list[float]]:
        """Time one call of every layer, in turns."""
        x = torch.randn(BATCH, tokens, kind.dim, device=self.device).to(self.dtype)
        height = 1 << (int(math.log2(tokens)) // 2)
        grid = (height, tokens // height)
        runs = {name: partial(_call, self.layer(kind, name), x, grid) for name in (STOCK, *names)}
        for name in names:
            try:
                runs[name]()
            except Exception as error:  # whatever a mixer raises, the others go on
                raise CannotRun(name, error) from error
        return time_interleaved(runs, self.repeats, warmup=1, max_seconds=10 * len(runs), device=self.device)

    def layer(self, kind: Kind, name: str) -> nn.Module:
        """The layer with this mixer in it, host projections and drop-in form; for STOCK, as diffusers makes it."""
        if (kind, STOCK) not in self._layers:
            self._layers.clear()  # of the kind before
            self._layers[kind, STOCK] = _host(kind).to(self.device, self.dtype)
        if (kind, name) not in self._layers:
            stock = self._layers[kind, STOCK]
            host = copy.deepcopy(stock, {id(p): p for p in stock.parameters()})  # the same weights, not copies
            try:
                MixerAdapter.build(host, name, train_projections=False).mount()
            except Exception as error:
                raise CannotRun(name, error) from error
            self._layers[kind, name] = host
        return self._layers[kind, name].get_submodule(SITE)


def _host(kind: Kind) -> nn.Module:
    """The least that an adapter takes for a UNet: one transformer of one block."""
    transformer = Transformer2DModel(
        num_attention_heads=kind.heads,
        attention_head_dim=kind.dim // kind.heads,
        in_channels=kind.dim,
        norm_num_groups=1,
        cross_attention_dim=8,
    )
    block = transformer.transformer_blocks[0]
    block.attn2, block.ff = None, nn.Identity()  # nobody calls them
    return nn.ModuleDict({"transformer": transformer}).requires_grad_(False).eval()


def _call(layer: nn.Module, x: Tensor, grid: tuple[int, int]) -> Tensor:
    setattr(layer, PLACE, grid)  # as the UNet's hooks tell it; a stock layer does not look
    return layer(x)


def machine(device: str) -> dict[str, Any]:
    """What the numbers hold for."""
    gpu = device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name(device) if gpu else _cpu(),
        "threads": None if gpu else torch.get_num_threads(),
        "torch": torch.__version__,
        "system": platform.platform(terse=True),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
