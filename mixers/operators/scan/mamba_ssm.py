"""The selective scan by mamba_ssm (state-spaces/mamba), whose recent releases build the CUDA kernel on request only."""

from __future__ import annotations

import torch
from torch import Tensor

from mixers.operators.backend import register_backend
from mixers.operators.external import first_derivatives_only, refuses_size
from mixers.operators.scan.backend import SelectiveScanBackend, SelectiveScanCall

LARGEST_STATE = 256


@register_backend("mamba_ssm")
class MambaSsmSelectiveScan(SelectiveScanBackend):
    """mamba_ssm's selective_scan_fn."""

    package = "mamba_ssm"
    takes_half_precision = True

    def refuses(self, call: SelectiveScanCall) -> str | None:
        """Return why mamba_ssm cannot compute a call, or None if it can."""
        if call.causality == "noncausal":
            return "there is no order to scan over; use chunked"
        if call.initial_state is not None:
            return "it starts from an empty state only"
        if call.output_final_state and call.requires_grad:
            return "it has no gradient of the final state"
        if call.A.shape[-1] > LARGEST_STATE:
            return f"states of {call.A.shape[-1]} are larger than its {LARGEST_STATE}"
        if call.u.dtype == torch.float64:
            return "it has no float64"
        return _missing_extension() or refuses_size(call)

    def causal(self, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, u: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Return decayed sums over tokens 0 … i, (b, l, h, v), and the final memory; `memory` is that of no tokens."""
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        dt, A, B, C, u = first_derivatives_only(dt, A, B, C, u)
        channels = [t.permute(0, 2, 3, 1).flatten(1, 2).contiguous() for t in (u, dt)]  # (b, h·v, l)
        states = [t.permute(0, 2, 3, 1).contiguous() for t in (B, C)]  # (b, h, n, l): one group per head
        rates = A.flatten(0, 1).float().contiguous()
        y, memory = selective_scan_fn(channels[0], channels[1].to(u.dtype), rates, *states, return_last_state=True)
        return y.unflatten(1, A.shape[:2]).permute(0, 3, 1, 2), memory.unflatten(1, A.shape[:2])

    def bidirectional(self, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, u: Tensor) -> Tensor:
        """Return sums over all tokens, decayed in both directions, (b, l, h, v).

        Both passes include the token itself; one of its two contributions is subtracted, in float32.
        """
        dt = dt.to(u.dtype)  # as the kernel takes it
        memory = A.new_zeros(u.shape[0], *A.shape)
        forward, _ = self.causal(dt, A, B, C, u, memory)
        reverse, _ = self.causal(dt.flip(1), A, B.flip(1), C.flip(1), u.flip(1), memory)
        own = (C.float() * B.float()).sum(-1, keepdim=True) * dt.float() * u.float()
        return (forward.float() + reverse.flip(1).float() - own).to(u.dtype)


def _missing_extension() -> str | None:
    try:
        import selective_scan_cuda  # type: ignore[import-not-found]  # noqa: F401
    except ImportError:
        return "this build of mamba_ssm has no selective_scan_cuda; install it with MAMBA_FORCE_BUILD=TRUE"
    return None
