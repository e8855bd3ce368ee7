"""Progressive stages: they double up to the requested size, with the published strengths."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unet_adapters.highres.stages import ImageSize, enlarging_stages, progressive_stages


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


def area(size: ImageSize) -> int:
    return size[0] * size[1]


@given(
    rows=st.integers(1, 64),
    columns=st.integers(1, 64),
    base=st.integers(1, 40),
    multiple=st.sampled_from([8, 16, 64]),
    image_size=st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
)
def test_an_image_of_any_size_is_the_first_stage_and_only_grows(
    rows: int, columns: int, base: int, multiple: int, image_size: ImageSize
) -> None:
    size = (rows * multiple, columns * multiple)
    try:
        image, *later = enlarging_stages(size, image_size, base * multiple, multiple)
    except ValueError as error:
        assert area(image_size) >= area(size) or min(*size, *image_size) < 2 * multiple, error
        return
    sizes = [image.size, *(stage.size for stage in later)]
    assert later and sizes[-1] == size
    assert all(side % multiple == 0 for one in sizes for side in one)
    assert area(image.size) <= area(image_size) or min(image.size) == multiple
    assert all(area(small) < area(large) for small, large in pairwise(sizes[1:]))
    assert all(stage.strength < 1 for stage in later), "a stage from noise would lose the image"
    for small, large in pairwise(sizes):
        assert all(b <= 2 * a + 2 * multiple for a, b in zip(small, large, strict=True))


@pytest.mark.parametrize(
    ("side", "stages"),
    [
        (256, [(256, 1.0), (512, 0.4), (1024, 0.4)]),  # smaller than the first stage
        (700, [(696, 1.0), (1024, 0.4)]),  # between two stages: not made smaller
        (512, [(512, 1.0), (1024, 0.4)]),
    ],
)
def test_an_image_keeps_its_size(side: int, stages: list[tuple[int, float]]) -> None:
    actual = enlarging_stages((1024, 1024), (side, side), 512, 8)
    assert [(stage.size[0], stage.strength) for stage in actual] == stages


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
