"""Progressive stages: they double up to the requested size, with the published strengths."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unet_adapters.highres.stages import progressive_stages


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 40), st.sampled_from([8, 16, 64]))
def test_stages_double_up_to_the_size(rows: int, columns: int, base: int, multiple: int) -> None:
    size = (rows * multiple, columns * multiple)
    stages = progressive_stages(size, base * multiple, multiple)
    assert stages[-1].size == size and stages[0].strength == 1
    assert all(side % multiple == 0 for stage in stages for side in stage.size)
    for small, large in pairwise(stages):
        for a, b in zip(small.size, large.size, strict=True):
            assert a < b <= 2 * a + multiple or a == b == multiple
    first = stages[0].size
    assert first[0] * first[1] <= (base * multiple) ** 2 or min(first) < 2 * multiple


def test_the_last_strength_applies_to_all_further_stages() -> None:
    strengths = [stage.strength for stage in progressive_stages((2048, 2048), 64, 64)]
    assert strengths == [1, 0.4, 0.3, 0.2, 0.1, 0.1]


@pytest.mark.parametrize(
    ("size", "message"),
    [((100, 64), "The nearest size is 64 × 128"), ((0, 64), "The nearest size is 64 × 64")],
)
def test_an_invalid_size_names_the_nearest(size: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        progressive_stages(size, 64, 64)
