"""This project's Triton kernels, where there are no better ones: without an order, and both directions with decay."""

from __future__ import annotations

from torch import Tensor

from mixers.operators.choice import Problem
from mixers.operators.linear.call import Call

LARGEST_HEAD = 256


def refuses(problem: Problem) -> str | None:
    """Why the kernels cannot compute this, or None."""
    q, v = problem.tensors["q"], problem.tensors["v"]
    assert q is not None and v is not None
    if problem.causality == "causal":
        return "it has no kernel for causality='causal'; fla has"
    if max(q.shape[-1], v.shape[-1]) > LARGEST_HEAD:
        return f"heads of {max(q.shape[-1], v.shape[-1])} channels are wider than its {LARGEST_HEAD}"
    return None


def noncausal(call: Call) -> tuple[Tensor, None]:
    """The result (b, l, h, v): two reads of the tokens, the feature map fused in. First derivatives only."""
    from mixers.operators.linear.kernels.noncausal import noncausal_attention

    call = call if call.log_decay is None else call.mapped()  # gates are weights of the keys' features
    y = noncausal_attention(
        call.q,
        call.k,
        call.v,
        feature_map=call.feature_map,
        normalize=call.normalize,
        eps=call.eps,
        scale=call.scale,
    )
    return y, None


def bidirectional(call: Call) -> tuple[Tensor, None]:
    """The result (b, l, h, v): both directions in one go over the tokens. Without decay there is no direction."""
    if call.log_decay is None:
        return noncausal(call)
    from mixers.operators.linear.kernels.bidirectional import bidirectional_attention

    gates = call.log_decay
    call = call if call.feature_map == "identity" else call.mapped()  # features are float32, which is slower
    y = bidirectional_attention(call.q, call.k, call.v, gates, normalize=call.normalize, eps=call.eps, scale=call.scale)
    return y, None
