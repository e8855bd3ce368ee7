"""What is done with the operator's result: skip, local convolution, norm and gate."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixers.inplace import addcmul_reusing, multiply_reusing
from mixers.precision import accumulation_dtype
from mixers.stages.convolutions import LocalConvolution
from mixers.suggest import hint


class RMSNorm(nn.Module):
    """x / √(mean x² + eps) · weight over the channels, or over each of some equal groups of them: (…, channels).

    Computed in float32 at least, given back in the dtype of x. `weight` (channels,), ones at first, is None where not
    affine. groups > 1 is Mamba-2's norm under tensor parallelism (2405.21060).
    """

    def __init__(self, channels: int, eps: float = 1e-5, *, groups: int = 1, affine: bool = True) -> None:
        super().__init__()
        if groups < 1 or channels % groups:
            raise ValueError(f"{channels} channels cannot be split into {groups} equal groups.")
        self.eps, self.groups = eps, groups
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """(…, channels) -> (…, channels)."""
        parts = x.to(accumulation_dtype(x)).unflatten(-1, (self.groups, -1))
        power = torch.linalg.vector_norm(parts, dim=-1, keepdim=True).square() / parts.shape[-1]
        y = (parts * torch.rsqrt(power + self.eps)).flatten(-2)
        return (y if self.weight is None else multiply_reusing(y, self.weight.to(y.dtype))).to(x.dtype)


class HeadGroupNorm(nn.Module):
    """(x − mean) / √(variance + eps) · weight + bias, one group a head: (…, h·v).

    nn.GroupNorm over the heads, with the channels last; `weight` and `bias` (h·v,) are its own, None where not affine.
    Computed in float32 at least, given back in the dtype of x.
    """

    def __init__(self, heads: int, head_dim: int, eps: float = 1e-5, *, affine: bool = True) -> None:
        super().__init__()
        self.heads, self.eps = heads, eps
        self.weight = nn.Parameter(torch.ones(heads * head_dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(heads * head_dim)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """(…, h·v) -> (…, h·v)."""
        parts = x.to(accumulation_dtype(x)).unflatten(-1, (self.heads, -1))
        y = F.layer_norm(parts, parts.shape[-1:], eps=self.eps).flatten(-2)
        if self.weight is not None and self.bias is not None:
            y = torch.addcmul(self.bias.to(y.dtype), y, self.weight.to(y.dtype))
        return y.to(x.dtype)


NORMS = ("head_rms", "rms", "head_group", "layer")


class _Streams(Protocol):
    """What an output looks at, of everything that a mixer computes from its tokens."""

    @property
    def x(self) -> Tensor: ...
    @property
    def v(self) -> Tensor: ...
    @property
    def grid(self) -> tuple[int, int] | None: ...


class Output(nn.Module):
    """The operator's result (b, l, h, v) -> the same, each part a switch of its own, in this order:

        y ← y + D · v + local(v)
        y ← norm(y) · SiLU(z), or norm(y · SiLU(z)) where `gate_first`;    z = to_gate(x)

    | paper | style |
    |---|---|
    | Mamba-2 (2405.21060) | norm_kind="rms", gate_first=True |
    | GLA (2312.06635), Gated DeltaNet (2412.06464), RetNet in fla | norm_kind="head_rms" |
    | RetNet (2307.08621) | norm_kind="head_rms", affine=False |
    | RWKV-6 (2404.05892) | norm_kind="head_group", eps=64e-5 |
    | VSSD (2407.18559), its code | norm_kind="layer", linear_gate=True |
    | FLatten (2308.00442), MILA (2405.16605) | local_conv_size, no norm |

    Computed in float32 at least, but for the convolution and to_gate; given back in the dtype of y. With everything
    off it gives back y itself.

    Parameters: `D` (h,), or (h, v) with `skip_channels`, ones at first; `to_gate.weight` (h·v, d); `norm.weight`
    (v,) shared by the heads for head_rms, (h·v,) for rms, head_group and layer, of which the last two have
    `norm.bias` as well;
    `local.conv.weight` and `local.conv.bias`.

    Args:
        dim: d, width of the tokens x.
        head_dim: v, value channels a head.
        skip, norm, gate: which parts there are.
        local_conv_size: side of the window, odd; 0 is none. It needs the grid, and streams in raster order.
        norm_kind: `head_rms`, `rms` (over the whole width, in `groups`), `head_group` or `layer` (LayerNorm over the
            whole width).
        gate_first: the gate comes before the norm.
        linear_gate: the gate is z itself, not SiLU(z).
        groups: of `rms`.
        affine: whether the norm has a weight (and bias).
        skip_channels: D is one number a channel, as in Mamba (2312.00752), else one a head.
        zero_init: the local convolution starts at zero.

    Raises:
        ValueError: unknown norm_kind, or groups for a norm that has none.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int,
        *,
        skip: bool = False,
        norm: bool = False,
        gate: bool = False,
        local_conv_size: int = 0,
        norm_kind: str = "head_rms",
        gate_first: bool = False,
        linear_gate: bool = False,
        groups: int = 1,
        affine: bool = True,
        eps: float = 1e-5,
        skip_channels: bool = False,
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        width = heads * head_dim
        self.gate_first, self.linear_gate = gate_first, linear_gate
        self.D = nn.Parameter(torch.ones((heads, head_dim) if skip_channels else (heads,))) if skip else None
        self.local = LocalConvolution(width, local_conv_size, zero_init=zero_init) if local_conv_size else None
        made = _norm(norm_kind, heads, head_dim, groups, affine, eps)
        self.norm = made if norm else None
        self.norm_axes = 1 if norm_kind == "head_rms" else 2
        self.to_gate = nn.Linear(dim, width, bias=False) if gate else None

    def forward(self, y: Tensor, streams: _Streams) -> Tensor:
        """(b, l, h, v) -> (b, l, h, v).

        Args:
            y: the operator's result, a new tensor: without gradients it is overwritten.
            streams: has the tokens `x` (b, l, d), the values `v` (b, l, h, v) and the `grid`, or None.

        Raises:
            ValueError: there is a local convolution and no grid.
        """
        dtype, result = accumulation_dtype(y), y
        if self.D is not None:
            D = self.D.to(dtype)
            result = addcmul_reusing(result.to(dtype), D if D.ndim == 2 else D[:, None], streams.v.to(dtype))
        if self.local is not None:
            result = result.to(dtype) + self.local(streams.v.flatten(-2), streams.grid).view_as(y)
        steps = (self._gated, self._normed) if self.gate_first else (self._normed, self._gated)
        for step in steps:
            result = step(result, streams.x)
        return result.to(y.dtype)

    def _normed(self, y: Tensor, x: Tensor) -> Tensor:
        if self.norm is None:
            return y
        wide = y.to(accumulation_dtype(y))
        return self.norm(wide) if self.norm_axes == 1 else self.norm(wide.flatten(-2)).view_as(y)

    def _gated(self, y: Tensor, x: Tensor) -> Tensor:
        if self.to_gate is None:
            return y
        dtype = accumulation_dtype(y)
        z = self.to_gate(x).to(dtype).view_as(y)
        gate = z if self.linear_gate else F.silu(z, inplace=not torch.is_grad_enabled())
        return multiply_reusing(gate, y.to(dtype))


def _norm(kind: str, heads: int, head_dim: int, groups: int, affine: bool, eps: float) -> nn.Module:
    if kind not in NORMS:
        raise ValueError(f"Unknown norm {kind!r}: expected one of {', '.join(NORMS)}.{hint(kind, NORMS)}")
    if groups != 1 and kind != "rms":
        raise ValueError(f"groups={groups} is for norm_kind='rms'; the groups of {kind!r} are the heads.")
    if kind == "rms":
        return RMSNorm(heads * head_dim, eps, groups=groups, affine=affine)
    if kind == "head_rms":
        return RMSNorm(head_dim, eps, affine=affine)
    if kind == "layer":
        return HeadGroupNorm(1, heads * head_dim, eps, affine=affine)
    return HeadGroupNorm(heads, head_dim, eps, affine=affine)
