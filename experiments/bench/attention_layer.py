"""One self-attention layer, with stock attention and with mixers mounted, timed on the same tokens."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import Transformer2DModel, UNet2DConditionModel
from torch import nn

from experiments.core.timing import Clock, time_interleaved
from experiments.teacher import load
from mixers.suggest import unknown_name
from unet_adapters import MixerAdapter
from unet_adapters.hosts import find_host
from unet_adapters.mounted_layer import call_layer

BATCH = 2  # one image under classifier-free guidance
STOCK = "stock attention"
SITE = "transformer.transformer_blocks.0.attn1"
EMBEDDED = "embedded"


@dataclass(frozen=True, order=True)
class SiteShape:
    """The shape of a self-attention layer.

    Attributes:
        dim: width of its tokens.
        heads: number of heads.

    Raises:
        ValueError: the heads do not divide the width.
    """

    dim: int
    heads: int

    def __post_init__(self) -> None:
        if self.heads < 1 or self.dim < 1 or self.dim % self.heads:
            raise ValueError(f"Cannot split a width of {self.dim} into {self.heads} heads: expected a divisor.")

    def __str__(self) -> str:
        return f"dim {self.dim}, heads {self.heads}"


SITE_SHAPES: dict[str, tuple[SiteShape, ...]] = {
    "sd15": (SiteShape(320, 8), SiteShape(640, 8), SiteShape(1280, 8)),
    "sd21": (SiteShape(320, 5), SiteShape(640, 10), SiteShape(1280, 20)),
    "sdxl": (SiteShape(640, 10), SiteShape(1280, 20)),
}
"""The shapes of the sites of published UNets."""


def site_shapes(unet: nn.Module) -> tuple[SiteShape, ...]:
    """Return the distinct shapes of a UNet's sites, narrow ones first."""
    return tuple(sorted({SiteShape(site.dim, site.heads) for site in find_host(unet).sites()}))


def choose_site_shapes(
    profile: str = EMBEDDED, dim: int | None = None, heads: int | None = None
) -> tuple[SiteShape, ...]:
    """Return the site shapes of a profile, or the single one that `dim` and `heads` describe.

    Args:
        profile: "embedded" or one of `SITE_SHAPES`.
        dim: width of the tokens; with `heads`, instead of a profile.
        heads: number of heads.

    Raises:
        ValueError: no such profile, only one of `dim` and `heads`, or heads that do not divide the width.
    """
    if (dim is None) != (heads is None):
        raise ValueError("Cannot describe a site by one number: give both a dim and heads.")
    if dim is not None and heads is not None:
        return (SiteShape(dim, heads),)
    if profile == EMBEDDED:
        config = UNet2DConditionModel.load_config(str(load.EMBEDDED), subfolder="unet")
        return site_shapes(UNet2DConditionModel.from_config(config))
    if profile not in SITE_SHAPES:
        raise ValueError(unknown_name("profile", profile, (EMBEDDED, *SITE_SHAPES)))
    return SITE_SHAPES[profile]


class MixerCannotRun(Exception):
    """A mixer that cannot be built, mounted or run at a site of some shape."""

    def __init__(self, mixer: str, error: Exception) -> None:
        super().__init__(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        self.mixer = mixer


class TimeIsUp(Exception):
    """The time budget does not allow the next call."""


class AttentionLayerTimer:
    """Times one attention layer with random weights, batch 2 and no gradients, stock and with mixers mounted.

    Args:
        dtype: of weights and tokens.
        device: "cpu" or "cuda", optionally with an index.
        repeats: number of turns.
        deadline: a time on the clock; no call is started after it, nor turns that are expected to end later.
        clock: source of the time, in seconds.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        device: str,
        repeats: int,
        deadline: float = math.inf,
        clock: Clock = time.perf_counter,
    ) -> None:
        self.dtype = dtype
        self.device = device
        self.repeats = repeats
        self.deadline = deadline
        self.clock = clock
        self._layers: dict[tuple[SiteShape, str], nn.Module] = {}

    @torch.no_grad()
    def __call__(self, shape: SiteShape, tokens: int, names: Sequence[str]) -> dict[str, list[float]]:
        """Time one call of every layer in alternation.

        Args:
            shape: of the site.
            tokens: number of tokens; a power of two.
            names: of the mixers.

        Returns:
            Seconds per call, one value per turn, by mixer and for `STOCK`.

        Raises:
            MixerCannotRun: a mixer raises; the error names it.
            TimeIsUp: the time left does not suffice for a warm-up and one turn of all layers.
        """
        x = torch.randn(BATCH, tokens, shape.dim, device=self.device).to(self.dtype)
        height = 1 << (int(math.log2(tokens)) // 2)
        grid = (height, tokens // height)
        runs: dict[str, Callable[[], object]] = {}
        turn_seconds = 0.0
        for name in (STOCK, *names):
            runs[name] = partial(call_layer, self.layer(shape, name), x, grid)
            turn_seconds += self._try(name, runs[name], turn_seconds)
        left = self.deadline - self.clock()
        if 2 * turn_seconds > left:
            raise TimeIsUp
        return time_interleaved(
            runs,
            self.repeats,
            warmup=1,
            max_seconds=min(10 * len(runs), left - 2 * turn_seconds),
            min_turns=3 if 4 * turn_seconds <= left else 1,
            device=self.device,
            clock=self.clock,
        )

    def _try(self, name: str, run: Callable[[], object], turn_seconds: float) -> float:
        """Call a layer once; returns the seconds it took.

        Raises:
            MixerCannotRun: it raises.
            TimeIsUp: the time left does not suffice for a warm-up and one turn of the layers before it.
        """
        start = self.clock()
        if start + 2 * turn_seconds > self.deadline:
            raise TimeIsUp
        try:
            run()
        except Exception as error:  # whatever a mixer raises, the others go on
            if name == STOCK:
                raise
            raise MixerCannotRun(name, error) from error
        return self.clock() - start

    def layer(self, shape: SiteShape, name: str) -> nn.Module:
        """Return the layer with a mixer mounted, in its plain form and with the host's projections.

        Args:
            shape: of the site.
            name: of the mixer; for `STOCK`, the layer is as diffusers builds it.

        Raises:
            MixerCannotRun: the mixer cannot be built or mounted.
        """
        if (shape, STOCK) not in self._layers:
            self._layers.clear()  # of the previous shape
            self._layers[shape, STOCK] = _build_host(shape).to(self.device, self.dtype)
        if (shape, name) not in self._layers:
            stock = self._layers[shape, STOCK]
            host = copy.deepcopy(stock, {id(p): p for p in stock.parameters()})  # the same weights, not copies
            try:
                MixerAdapter.build(host, name, train_projections=False).mount()
            except Exception as error:
                raise MixerCannotRun(name, error) from error
            self._layers[shape, name] = host
        return self._layers[shape, name].get_submodule(SITE)


def _build_host(shape: SiteShape) -> nn.Module:
    """Build the smallest network that an adapter accepts as a UNet: a transformer of one block."""
    transformer = Transformer2DModel(
        num_attention_heads=shape.heads,
        attention_head_dim=shape.dim // shape.heads,
        in_channels=shape.dim,
        norm_num_groups=1,
        cross_attention_dim=8,
    )
    block = transformer.transformer_blocks[0]
    block.attn2 = None  # neither is called
    block.ff = nn.Identity()
    return nn.ModuleDict({"transformer": transformer}).requires_grad_(False).eval()
