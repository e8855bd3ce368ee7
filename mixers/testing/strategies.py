"""Hypothesis strategies: well-conditioned float64 inputs of awkward shapes. Needs hypothesis (the extra `test`)."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from mixers.registry import list_mixers
from mixers.testing.inputs import CheckInputs
from mixers.testing.runner import ConformanceCase, conformance_cases


@st.composite
def linear_inputs(draw: Any, max_length: int = 150) -> tuple[Tensor, Tensor, Tensor]:
    """Draw positive q and k (b, l, h, k) and normal v (b, l, h, v); k, v and h are drawn independently."""
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, max_length)), draw(st.integers(1, 3)))
    key = draw(st.integers(1, 6))
    value = draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    q, k, v = (torch.randn(*shape, width, generator=generator, dtype=torch.float64) for width in (key, key, value))
    return q.exp(), k.exp(), v


@st.composite
def inputs(draw: Any, max_length: int = 70) -> CheckInputs:
    """Draw the inputs of a check of a mixer or an operator: any length, batch size and seed."""
    return CheckInputs((draw(st.integers(1, max_length)),), draw(st.integers(1, 3)), draw(st.integers(0, 2**31 - 1)))


def cuts(length: int, most: int = 4) -> st.SearchStrategy[list[int]]:
    """Draw positions at which to cut a sequence of `length` tokens: sorted edges, 0 and `length` among them."""
    inner = st.lists(st.integers(1, max(1, length - 1)), max_size=most)
    return inner.map(lambda positions: sorted({0, length, *(p for p in positions if p < length)}))


def registered(pattern: str = "*") -> st.SearchStrategy[ConformanceCase]:
    """Draw a legal configuration of a registered mixer; calling it builds the mixer."""
    return st.sampled_from(conformance_cases(list_mixers(pattern)))
