"""THE flow: tokens -> projections -> feature map -> operator -> normalisation -> output."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from mixers.stages.projections import Projections, call_output
from mixers.traits import Causality, Traits


@dataclass(frozen=True)
class MixerConfig:
    """Base of every mixer's configuration; the defaults are the published ones. JSON-able."""

    causality: Causality = "noncausal"
    normalize: bool = True

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON values."""
        return asdict(self)


class TokenMixer(nn.Module):
    """Tokens (b, l, d) -> tokens (b, l, d). Subclasses choose the stages.

    The four projections are called, never copied: they are the mixer's own module `projections`,
    or the host's, handed to `forward`. What a mixer adds to them is its own.
    """

    Config: ClassVar[Any] = MixerConfig
    tiny: ClassVar[dict[str, Any]] = {}

    def __init__(self, config: Any, dim: int, heads: int, *, own_projections: bool = True) -> None:
        super().__init__()
        self.config, self.dim, self.heads = config, dim, heads
        self.projections = Projections(dim) if own_projections else None

    @property
    def head_dim(self) -> int:
        """Channels a head, k = v = d / h."""
        return self.dim // self.heads

    def forward(self, x: Tensor, *, grid: tuple[int, int] | None = None, projections: Any = None) -> Tensor:
        """Mix tokens.

        Args:
            x: (b, l, d).
            grid: (height, width) with height · width = l, for mixers that scan in two dimensions.
            projections: anything with to_q, to_k, to_v and to_out; needed where the mixer has none of its own.

        Raises:
            ValueError: x is not (b, l, d), the grid does not fit, or there are no projections.
        """
        if x.ndim != 3 or x.shape[-1] != self.dim or x.shape[1] == 0:
            raise ValueError(f"Expected tokens (b, l ≥ 1, {self.dim}), got {tuple(x.shape)}.")
        if grid is not None and grid[0] * grid[1] != x.shape[1]:
            raise ValueError(f"The grid {grid} has {grid[0] * grid[1]} places for {x.shape[1]} tokens.")
        host = self.host(projections)
        q, k = self.queries_keys(x, host)
        v = self.split(host.to_v(x))
        y = self.mix(q, k, v)
        return call_output(host.to_out, rearrange(y, "b l h v -> b l (h v)"))

    def host(self, projections: Any) -> Any:
        """The projections to call: those handed over, else the mixer's own."""
        chosen = self.projections if projections is None else projections
        if chosen is None:
            raise ValueError(
                f"{type(self).__name__} was built with own_projections=False: hand its forward `projections`, "
                "a module with to_q, to_k, to_v and to_out."
            )
        return chosen

    def split(self, x: Tensor) -> Tensor:
        """(b, l, h·c) -> (b, l, h, c)."""
        return rearrange(x, "b l (h c) -> b l h c", h=self.heads)

    def inputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What to_q and to_k see, (b, l, d) each; the tokens themselves unless a mixer adds to them."""
        return x, x

    def queries_keys(self, x: Tensor, host: Any) -> tuple[Tensor, Tensor]:
        """Queries and keys before the feature map, (b, l, h, k) each."""
        for_q, for_k = self.inputs(x)
        return self.split(host.to_q(for_q)), self.split(host.to_k(for_k))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Feature map, operator and normalisation: (b, l, h, k), (b, l, h, k), (b, l, h, v) -> (b, l, h, v)."""
        raise NotImplementedError

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """The matrix (b, h, l, l) that `mix` applies to the values, from its formula. Costs l² memory."""
        raise NotImplementedError

    @property
    def traits(self) -> Traits:
        """What this mixer, as configured, promises."""
        raise NotImplementedError

    def state_size(self, length: int) -> int:
        """Numbers a causal pass carries from token to token after `length` tokens."""
        raise NotImplementedError

    def flops(self, length: int) -> int:
        """Multiply-adds × 2 of one forward over `length` tokens, batch 1; elementwise work is not counted."""
        return 8 * length * self.dim**2 + self.mixing_flops(length)

    def mixing_flops(self, length: int) -> int:
        """The share of `flops` that is not the four projections."""
        raise NotImplementedError


def upcast(dtype: torch.dtype) -> torch.dtype:
    """State and sums are float32 at least."""
    return torch.promote_types(dtype, torch.float32)
