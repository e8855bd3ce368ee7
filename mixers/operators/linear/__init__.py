"""linear_attention: W = (φ(q) φ(k)ᵀ) ⊙ L applied to the values, optionally normalized by its row sums."""

from mixers.operators.linear.backend import LinearAttentionBackend, LinearAttentionCall
from mixers.operators.linear.flops import flops
from mixers.operators.linear.operator import linear_attention, linear_attention_matrix

__all__ = [
    "LinearAttentionBackend",
    "LinearAttentionCall",
    "flops",
    "linear_attention",
    "linear_attention_matrix",
]
