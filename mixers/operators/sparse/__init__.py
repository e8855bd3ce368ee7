"""Exact softmax over a part of the keys: blocks that the data select, or a window of the image."""

from mixers.operators.sparse.blocks import (
    AttentionSums,
    exact_sums,
    join_blocks,
    linear_sums,
    select_key_blocks,
    selected_key_mask,
)
from mixers.operators.sparse.window import window_attention, window_attention_matrix

__all__ = [
    "AttentionSums",
    "exact_sums",
    "join_blocks",
    "linear_sums",
    "select_key_blocks",
    "selected_key_mask",
    "window_attention",
    "window_attention_matrix",
]
