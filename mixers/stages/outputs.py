"""The output stage: what happens to the operator's result: skip, local convolution, norm and gate."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixers.inplace import addcmul_reusing, multiply_reusing
from mixers.precision import accumulation_dtype
from mixers.stages.convolutions import LocalConvolution
from mixers.streams import Streams
from mixers.suggest import unknown_name


class RMSNorm(nn.Module):
    """x / √(mean x² + eps) · weight over the channels, or over each of several equal groups: (…, channels).

    Computed in float32 at least, returned in the dtype of x. `weight` (channels,), initially ones, is None if not
    affine. groups > 1 is Mamba-2's norm under tensor parallelism (2405.21060).

    Args:
        channels: c.
        eps: added to the mean square.
        groups: number of groups; divides c.
        affine: whether there is a weight.

    Raises:
        ValueError: groups does not divide channels.
    """

    def __init__(self, channels: int, eps: float = 1e-5, *, groups: int = 1, affine: bool = True) -> None:
        super().__init__()
        if groups < 1 or channels % groups:
            raise ValueError(f"RMSNorm: {channels} channels cannot be split into {groups} equal groups.")
        self.eps = eps
        self.groups = groups
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (…, channels)."""
        parts = x.to(accumulation_dtype(x)).unflatten(-1, (self.groups, -1))
        mean_square = parts.square().mean(-1, keepdim=True)
        y = (parts * torch.rsqrt(mean_square + self.eps)).flatten(-2)
        return (y if self.weight is None else multiply_reusing(y, self.weight.to(y.dtype))).to(x.dtype)


class HeadGroupNorm(nn.Module):
    """(x − mean) / √(variance + eps) · weight + bias with one group per head: (…, h·v).

    nn.GroupNorm over the heads, for channels in the last axis. Computed in float32 at least, returned in the dtype of
    x. `weight` and `bias` are (h·v,), or None if not affine.

    Args:
        heads: number of groups h.
        head_dim: v, channels per group.
        eps: added to the variance.
        affine: whether there are a weight and a bias.
    """

    def __init__(self, heads: int, head_dim: int, eps: float = 1e-5, *, affine: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(heads * head_dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(heads * head_dim)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (…, h·v)."""
        parts = x.to(accumulation_dtype(x)).unflatten(-1, (self.heads, -1))
        y = F.layer_norm(parts, parts.shape[-1:], eps=self.eps).flatten(-2)
        if self.weight is not None and self.bias is not None:
            y = torch.addcmul(self.bias.to(y.dtype), y, self.weight.to(y.dtype))
        return y.to(x.dtype)


GATE_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor] | None] = {
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "identity": None,
}
"""Functions of the gate by name; None leaves it as it is."""

NORM_KINDS = ("head_rms", "rms", "head_group", "layer")


class Output(nn.Module):
    """Maps the operator's result (b, l, h, v) to the same shape; each part is optional, in this order:

        y ← y + D · v + local_conv(v)
        y ← norm(y) · σ(z), or norm(y · σ(z)) if `gate_first`;    z = to_gate(x), σ = SiLU by default

    | paper | options |
    |---|---|
    | Mamba-2 (2405.21060) | norm_kind="rms", gate_first=True |
    | GLA (2312.06635), Gated DeltaNet (2412.06464), RetNet in fla | norm_kind="head_rms" |
    | RetNet (2307.08621) | norm_kind="head_rms", affine=False |
    | RWKV-6 (2404.05892) | norm_kind="head_group", eps=64e-5 |
    | VSSD (2407.18559), its code | norm_kind="layer", gate_activation="identity" |
    | KDA (2510.26692) | norm_kind="head_rms", gate_activation="sigmoid" |
    | FLatten (2308.00442) | local_conv_size=5, local_conv_shared=True |
    | MILA (2405.16605) | local_conv_size=3, gate_bias=True |

    Computed in float32 at least, except for the convolution and to_gate; returned in the dtype of y. With every part
    off, y itself is returned.

    Parameters: `D` (h,), or (h, v) with `skip_per_channel`, initially ones; `to_gate.weight` (h·v, d); `norm.weight`,
    (v,) shared by the heads for head_rms and (h·v,) for the other norms, of which head_group and layer also have
    `norm.bias`; `local_conv.weight` and `local_conv.bias`.

    Args:
        dim: d, width of the tokens x.
        heads: number of heads h.
        head_dim: v, value channels per head.
        skip, norm, gate: which parts there are.
        local_conv_size: side of the window, odd; 0: none. The local convolution needs the grid and raster order.
        local_conv_shared: heads share the weights of the local convolution.
        norm_kind: `head_rms`, `rms` (over the full width, in `groups`), `head_group`, or `layer` (LayerNorm over the
            full width).
        gate_first: gate before the norm.
        gate_activation: σ, a key of `GATE_ACTIVATIONS`: `silu`, `sigmoid` or `identity`.
        groups: number of groups of the norm `rms`.
        affine: whether the norm has a weight (and a bias).
        eps: of the norm.
        skip_per_channel: one D per channel, as in Mamba (2312.00752), instead of one per head.
        gate_bias: whether to_gate has a bias.

    Raises:
        ValueError: norm_kind or gate_activation is unknown, or groups is set for a norm without groups.
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
        local_conv_shared: bool = False,
        norm_kind: str = "head_rms",
        gate_first: bool = False,
        gate_activation: str = "silu",
        groups: int = 1,
        affine: bool = True,
        eps: float = 1e-5,
        skip_per_channel: bool = False,
        gate_bias: bool = False,
    ) -> None:
        super().__init__()
        width = heads * head_dim
        self.gate_first = gate_first
        if gate_activation not in GATE_ACTIVATIONS:
            raise ValueError(unknown_name("gate activation", gate_activation, GATE_ACTIVATIONS))
        self.gate_activation = gate_activation
        self.norm_per_head = norm_kind == "head_rms"
        self.D = nn.Parameter(torch.ones((heads, head_dim) if skip_per_channel else (heads,))) if skip else None
        channels = head_dim if local_conv_shared else width
        self.local_conv = LocalConvolution(channels, local_conv_size) if local_conv_size else None
        norm_layer = _create_norm(norm_kind, heads, head_dim, groups, affine, eps)
        self.norm = norm_layer if norm else None
        self.to_gate = nn.Linear(dim, width, bias=gate_bias) if gate else None

    def forward(self, y: Tensor, streams: Streams) -> Tensor:
        """Apply the parts that are on.

        Args:
            y: the operator's result (b, l, h, v), a new tensor, which is overwritten when no gradient is needed.
            streams: provides the tokens `x` (b, l, d), the values `v` (b, l, h, v) and the `grid`.

        Raises:
            ValueError: There is a local convolution, and no grid.
        """
        result = y
        if self.D is not None:
            dtype = accumulation_dtype(y)
            D = self.D.to(dtype)
            result = addcmul_reusing(result.to(dtype), D if D.ndim == 2 else D[:, None], streams.v.to(dtype))
        if self.local_conv is not None:
            local = self.local_conv(streams.v.flatten(-2), streams.grid).view_as(y)
            result = result.to(accumulation_dtype(y)) + local
        if self.gate_first:
            result = self._apply_norm(self._apply_gate(result, streams.x))
        else:
            result = self._apply_gate(self._apply_norm(result), streams.x)
        return result.to(y.dtype)

    def _apply_norm(self, y: Tensor) -> Tensor:
        if self.norm is None:
            return y
        wide = y.to(accumulation_dtype(y))
        return self.norm(wide) if self.norm_per_head else self.norm(wide.flatten(-2)).view_as(y)

    def _apply_gate(self, y: Tensor, x: Tensor) -> Tensor:
        if self.to_gate is None:
            return y
        dtype = accumulation_dtype(y)
        z = self.to_gate(x).to(dtype).view_as(y)
        activation = GATE_ACTIVATIONS[self.gate_activation]
        # Results of layers are never overwritten, because a forward hook may keep them; those of functions are ours.
        return z * y.to(dtype) if activation is None else multiply_reusing(activation(z), y.to(dtype))


def _create_norm(kind: str, heads: int, head_dim: int, groups: int, affine: bool, eps: float) -> nn.Module:
    if kind not in NORM_KINDS:
        raise ValueError(unknown_name("norm", kind, NORM_KINDS))
    if groups != 1 and kind != "rms":
        raise ValueError(f"groups={groups} is an option of norm_kind='rms'; the groups of {kind!r} are the heads.")
    if kind == "rms":
        return RMSNorm(heads * head_dim, eps, groups=groups, affine=affine)
    if kind == "head_rms":
        return RMSNorm(head_dim, eps, affine=affine)
    if kind == "layer":
        return HeadGroupNorm(1, heads * head_dim, eps, affine=affine)
    return HeadGroupNorm(heads, head_dim, eps, affine=affine)
