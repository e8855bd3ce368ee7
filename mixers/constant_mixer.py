"""Mixers whose matrix does not depend on the tokens: controls, which show what an ablation owes to mixing."""

from __future__ import annotations

from torch import Tensor

from mixers.context import Rotation
from mixers.image_grid import ImageGrid
from mixers.mixer import TokenMixer
from mixers.stages.projections import ProjectionLayers, Projections
from mixers.streams import Streams


class ConstantMixer(TokenMixer):
    """Projects values only: of a host's projections, to_q and to_k are not called; an own mixer has none."""

    @classmethod
    def refuses_normalizer(cls, name: str) -> str | None:
        """A constant matrix has no scores to normalize."""
        return "its rows do not depend on scores"

    def create_projections(self) -> Projections:
        """Create to_v and to_out."""
        projections = super().create_projections()
        del projections.to_q, projections.to_k
        return projections

    def compute_streams(self, x: Tensor, projections: ProjectionLayers, grid: ImageGrid | None = None) -> Streams:
        """Compute the values, which also stand for the queries and keys that do not exist."""
        v = projections.to_v(x)
        v = self.split_heads(v if self.short_conv is None else self.short_conv(v, grid))
        return Streams(x=x, q=v, k=v, v=v, grid=grid)

    def rotate(self, streams: Streams, rotation: Rotation) -> Streams:
        """Return the streams as they are: there are no queries and keys to rotate."""
        return streams

    @property
    def convolved_width(self) -> int:
        """Channels of the short convolution: those of the values."""
        return self.value_width

    @property
    def positive(self) -> bool:
        """Whether no entry of the mixing matrix is negative."""
        return True

    def projection_flops(self, length: int) -> int:
        """Return the share of `flops` of to_v and to_out."""
        return 4 * length * self.dim * self.value_width

    def operator_flops(self, length: int) -> int:
        """Return 0: all work is elementwise."""
        return 0
