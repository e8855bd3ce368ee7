"""Sparse and linear attention in one site: SLA (Zhang et al. 2025, 2509.24006)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixers.config import MixerConfig
from mixers.context import RotaryPlacement, TextTokens
from mixers.entries import UNBOUNDED_SUMS, register_mixer
from mixers.feature_maps import FEATURE_MAPS
from mixers.image_grid import ImageGrid
from mixers.mixer import TokenMixer
from mixers.operators.sparse import (
    AttentionSums,
    exact_sums,
    join_blocks,
    linear_sums,
    select_key_blocks,
    selected_key_mask,
)
from mixers.precision import accumulation_dtype, no_autocast
from mixers.stages.projections import FullPrecisionLinear, ProjectionLayers
from mixers.streams import Streams, with_values
from mixers.suggest import unknown_name
from mixers.traits import Traits

Combination = Literal["project", "shared"]
"""How the exact and the linear part are added: the latter through a learned layer, or under one denominator."""

LinearKeys = Literal["rest", "all"]
"""The keys of the linear part: those outside the selected blocks, or all."""

POSITIVE_MAPS = ("softmax", *(name for name, feature_map in FEATURE_MAPS.items() if feature_map.positive))


@dataclass(frozen=True)
class SparseLinearConfig(MixerConfig):
    """Options of `sparse_linear`.

    Attributes:
        block_size: B, tokens per block of queries and of keys.
        topk: share of the key blocks that each query block sees exactly, rounded down, but at least one block.
        kept_blocks: number of key blocks instead of a share, which makes the exact part linear in the number of tokens.
        combine: `project`: the linear part is normalized by itself and added through a layer per head that starts at
            zero. `shared`: both parts have one denominator (Attention Surgery, 2509.24899).
        linear_over: `rest`: the linear part is over the keys that are not seen exactly, as in the paper. `all`: over
            all keys, as in the present code; for combine="project".
        feature_map: φ of the linear part: `softmax` over the channels, or a positive map.
        eps: added to the linear part's denominator, as a mean weight over all tokens.
    """

    block_size: int = 64
    topk: float = 0.2
    kept_blocks: int | None = None
    combine: Combination = "project"
    linear_over: LinearKeys = "rest"
    feature_map: str = "softmax"
    eps: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size < 1 or not 0 < self.topk <= 1 or self.eps <= 0:
            raise ValueError(
                f"Expected block_size ≥ 1, 0 < topk ≤ 1 and eps > 0, got {self.block_size}, {self.topk} and {self.eps}."
            )
        if self.kept_blocks is not None and self.kept_blocks < 1:
            raise ValueError(f"Expected kept_blocks ≥ 1, or None for the share topk; got {self.kept_blocks}.")
        for option, value, values in (
            ("combine", self.combine, get_args(Combination)),
            ("linear_over", self.linear_over, get_args(LinearKeys)),
            ("feature_map", self.feature_map, POSITIVE_MAPS),
        ):
            if value not in values:
                raise ValueError(unknown_name(option, value, values))
        if self.combine == "shared" and self.linear_over == "all":
            raise ValueError(
                "combine='shared' with linear_over='all' would count the selected keys twice in one denominator: use "
                "linear_over='rest', or combine='project'."
            )


class ProjectedSum(nn.Module):
    """Output stage that adds the linear part to the exact one through a layer, which all heads share.

    Parameters, as published: `proj_l.weight` (v, v) and `proj_l.bias` (v,), initially zero, so that a new mixer is the
    exact part alone.

    Args:
        output: the output stage that follows.
        head_dim: v, value channels per head.
    """

    def __init__(self, output: nn.Module, head_dim: int) -> None:
        super().__init__()
        self.output = output
        self.proj_l = FullPrecisionLinear(head_dim, head_dim)
        nn.init.zeros_(self.proj_l.weight)
        nn.init.zeros_(self.proj_l.bias)

    def forward(self, y: Tensor, streams: Streams) -> Tensor:
        """Map both parts, (b, l, h, 2v), to (b, l, h, v)."""
        exact, linear = y.chunk(2, dim=-1)
        total = exact + self.proj_l(linear).to(y.dtype)
        result: Tensor = self.output(total, with_values(streams, streams.v.chunk(2, dim=-1)[0]))
        return result


@register_mixer(
    "sparse_linear",
    causalities=("noncausal",),
    normalizations=(True,),
    unsupported={
        "causal": "blocks are selected by means over their tokens, of which some come later than the query",
        "bidirectional": "a kernel without an order makes two passes the non-causal form",
        "False": UNBOUNDED_SUMS,
    },
)
class SparseLinear(TokenMixer):
    """SLA (2509.24006): Y = S V + proj_l(L V): exact softmax S on selected key blocks, linear attention L elsewhere.

    Every block of B queries selects the key blocks whose mean key has the largest product with its mean query. S_ij =
    exp(q_i·k_j/√k) on these, L_ij = φ(q_i)·φ(k_j) on the others, rows of both normalized; φ is softmax over the
    channels, and proj_l starts at zero. As a matrix per value channel, the values are repeated: S applies to the first
    copy and L to the second. combine="shared" divides by one sum instead, W_ij = exp(q_i·k_j/√k) or φ(q_i)·φ(k_j), and
    has no layer.

    Blocks are consecutive in scan order, so scan="hilbert" makes them compact areas of the image. The selection depends
    on all tokens and is piecewise constant: W does not depend on the values, but no entry is a function of two tokens
    alone, the selection has no gradient, and tokens at a tie between two blocks make the output jump.

    Cost: with kept_blocks, O(l·B·kept_blocks) time and memory, and 2·(l / B)²·k operations for the selection, as many
    as for the exact part at l = 2·kept_blocks·B³; with a share topk, O(l²).

    Deviations from the published block: at least one block is selected; eps is added to the mean weight instead of the
    sum; the paper's negligible blocks, which neither part sees, are left out, as in its code.
    """

    Config: ClassVar[type[MixerConfig]] = SparseLinearConfig
    tiny_options: ClassVar[Mapping[str, Any]] = {"block_size": 4}

    config: SparseLinearConfig

    def __init__(self, config: SparseLinearConfig, dim: int, heads: int, *, own_projections: bool = True) -> None:
        super().__init__(config, dim, heads, own_projections=own_projections)
        if config.combine == "project":
            self.output = ProjectedSum(self.output, self.head_dim)

    def compute_streams(self, x: Tensor, projections: ProjectionLayers, grid: ImageGrid | None = None) -> Streams:
        """Compute q, k and v; with combine="project" the values twice, once for each part."""
        streams = super().compute_streams(x, projections, grid)
        if self.config.combine == "shared":
            return streams
        return with_values(streams, torch.cat([streams.v, streams.v], dim=-1))

    def mix_with_text(self, streams: Streams, text: TextTokens) -> Tensor:
        """See the base; with a layer for the linear part, which comes second, the text has no such part."""
        if self.config.combine == "project":
            text = replace(text, v=F.pad(text.v, (0, text.v.shape[-1])))
        return super().mix_with_text(streams, text)

    @property
    def rotary_placements(self) -> dict[RotaryPlacement, str | None]:
        """For every value of `rope`: None if it is supported, otherwise the reason."""
        return {"after_map": "its linear part maps what its exact part rotates", "before_map": None}

    def mix(self, streams: Streams) -> Tensor:
        """Compute W v, (b, l, h, v) or both parts (b, l, h, 2v), in float32 at least."""
        with no_autocast(streams.q):
            return self._mix(streams)

    def _mix(self, streams: Streams) -> Tensor:
        if self.config.combine == "project":
            v_exact, v_linear = streams.v.chunk(2, dim=-1)
        else:
            v_exact = v_linear = streams.v
        length = streams.x.shape[1]
        selected = self._select_blocks(streams)
        exact = exact_sums(streams.q, streams.k, v_exact, selected, self.config.block_size)
        linear = None
        if self._has_linear_part(length):
            excluded = None if self.config.linear_over == "all" else selected
            q = self.apply_feature_map(streams.q)
            k = self.apply_feature_map(streams.k)
            linear = linear_sums(q, k, v_linear, self.config.block_size, excluded)
        combine = _normalize_each if self.config.combine == "project" else _share_denominator
        return join_blocks(combine(exact, linear, self.config.eps * length), length)

    def mixing_matrix(self, streams: Streams) -> Tensor:
        """Compute W from its formula: (b, h, l, l), or (b, h, 2v, l, l) with combine="project"."""
        config = self.config
        length = streams.x.shape[1]
        visible = selected_key_mask(self._select_blocks(streams), config.block_size, length)
        dtype = accumulation_dtype(streams.q)
        scores = torch.einsum("bihk,bjhk->bhij", streams.q.to(dtype), streams.k.to(dtype)) * self.key_dim**-0.5
        exact_scores = scores.masked_fill(~visible, -torch.inf)
        linear = torch.einsum("bihk,bjhk->bhij", *map(self.apply_feature_map, (streams.q, streams.k)))
        linear = linear if config.linear_over == "all" else linear.masked_fill(visible, 0)
        eps = config.eps * length
        if config.combine == "project":
            exact = exact_scores.softmax(-1)
            linear = linear / (linear.sum(-1, keepdim=True) + eps)
            return torch.stack([exact, linear], dim=2).repeat_interleave(self.head_dim, dim=2)
        if not self._has_linear_part(length):
            return exact_scores.softmax(-1)
        top = exact_scores.amax(-1, keepdim=True).clamp(min=0)
        weights = torch.where(visible, (scores - top).exp(), linear * (-top).exp())
        return weights / (weights.sum(-1, keepdim=True) + eps * (-top).exp())

    def apply_feature_map(self, x: Tensor) -> Tensor:
        """Compute φ of queries or keys (b, l, h, k), float32 at least."""
        x = x.to(accumulation_dtype(x))
        return x.softmax(-1) if self.config.feature_map == "softmax" else FEATURE_MAPS[self.config.feature_map].apply(x)

    def count_kept_blocks(self, length: int) -> int:
        """Return how many key blocks each query block sees exactly, among `length` tokens."""
        blocks = self._count_blocks(length)
        if self.config.kept_blocks is not None:
            return min(self.config.kept_blocks, blocks)
        return max(1, int(self.config.topk * blocks))

    def _count_blocks(self, length: int) -> int:
        return -(-length // self.config.block_size)

    def _has_linear_part(self, length: int) -> bool:
        """Return whether there are keys for the linear part: all, or blocks that are not selected."""
        return self.config.linear_over == "all" or self.count_kept_blocks(length) < self._count_blocks(length)

    def _select_blocks(self, streams: Streams) -> Tensor:
        count = self.count_kept_blocks(streams.x.shape[1])
        return select_key_blocks(streams.q, streams.k, self.config.block_size, count)

    @property
    def permutation_equivariant(self) -> bool:
        """False: blocks are consecutive tokens."""
        return False

    @property
    def positive(self) -> bool:
        """Exponentials and the features are positive."""
        return True

    @property
    def traits(self) -> Traits:
        """The properties of this mixer as configured; the selection compares all pairs of blocks."""
        selects_all = self.config.kept_blocks is None and self.config.topk == 1
        return replace(super().traits, linear=False, pairwise=False, continuous=selects_all)

    def operator_state_size(self, length: int) -> int:
        """Return the numbers in the keys and values of all tokens, which any block may select."""
        return length * (self.key_width + self.value_width)

    def mixing_flops(self, length: int) -> int:
        """Add the operations of the layer that adds the linear part."""
        layer = 2 * length * self.head_dim * self.value_width if self.config.combine == "project" else 0
        return super().mixing_flops(length) + layer

    def selection_flops(self, length: int) -> int:
        """Return the share of `operator_flops` of the selection, the one that is quadratic in the number of blocks."""
        return 2 * self._count_blocks(length) ** 2 * self.key_width

    def operator_flops(self, length: int) -> int:
        """Return the operations of the selection, the exact part and the linear part, in whole blocks."""
        padded = self._count_blocks(length) * self.config.block_size
        keys = self.count_kept_blocks(length) * self.config.block_size
        linear = 4 * padded * self.key_dim * self.value_width if self._has_linear_part(length) else 0
        exact = 2 * padded * keys * (self.key_width + self.value_width)
        return self.selection_flops(length) + exact + linear


def _normalize_each(exact: AttentionSums, linear: AttentionSums | None, eps: float) -> Tensor:
    """Divide each sum by its own total, and return them as channels of one tensor."""
    means = torch.zeros_like(exact.values) if linear is None else linear.values / (linear.weights + eps)
    return torch.cat([exact.values / exact.weights, means], dim=-1)


def _share_denominator(exact: AttentionSums, linear: AttentionSums | None, eps: float) -> Tensor:
    """Add both sums and divide by both totals, scaled by exp(−largest score) or by 1 so that none overflows."""
    if linear is None:
        return exact.values / exact.weights
    assert exact.maxima is not None
    top = exact.maxima.clamp(min=0)
    exact_factor = (exact.maxima - top).exp()
    linear_factor = (-top).exp()
    values = exact.values * exact_factor + linear.values * linear_factor
    return values / (exact.weights * exact_factor + (linear.weights + eps) * linear_factor)
