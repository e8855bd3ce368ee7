"""This project's Triton kernels, for the passes that fla has none for: non-causal, and both directions with decay."""

from __future__ import annotations

from torch import Tensor

from mixers.operators.backend import register_backend, triton_unavailable
from mixers.operators.linear.backend import LinearAttentionBackend, LinearAttentionCall

WIDEST_HEAD = 256


@register_backend("triton")
class TritonLinearAttention(LinearAttentionBackend):
    """Fused Triton kernels; first derivatives only."""

    package = "triton"

    def unavailable(self, device: str) -> str | None:
        """Return why the kernels cannot run on this type of device, or None if they can."""
        return triton_unavailable(device)

    def refuses(self, call: LinearAttentionCall) -> str | None:
        """Return why the kernels cannot compute a call, or None if they can."""
        if call.causality == "causal":
            return "it has no kernel for causality='causal'; fla has"
        width = max(call.q.shape[-1], call.v.shape[-1])
        return f"heads of {width} channels are wider than its {WIDEST_HEAD}" if width > WIDEST_HEAD else None

    def run(self, call: LinearAttentionCall) -> tuple[Tensor, None]:
        """Return the result (b, l, h, v)."""
        call = call.with_all_heads()
        return (_run_ordered(call) if call.has_order else _run_noncausal(call)), None


def _run_noncausal(call: LinearAttentionCall) -> Tensor:
    """Read the tokens twice, with the feature map fused in."""
    from mixers.operators.linear.kernels.noncausal import noncausal_attention

    call = call if call.log_decay is None else call.with_features()  # gates are weights of the keys' features
    return noncausal_attention(
        call.q,
        call.k,
        call.v,
        feature_map=call.feature_map,
        normalize=call.normalize,
        eps=call.eps,
        scale=call.scale,
    )


def _run_ordered(call: LinearAttentionCall) -> Tensor:
    """Compute both directions in one pass over the tokens."""
    from mixers.operators.linear.kernels.bidirectional import bidirectional_attention

    assert call.log_decay is not None
    mapped = call if call.feature_map == "identity" else call.with_features()  # features are float32, which is slower
    return bidirectional_attention(
        mapped.q,
        mapped.k,
        mapped.v,
        call.log_decay,
        normalize=call.normalize,
        eps=call.eps,
        scale=call.scale,
    )
