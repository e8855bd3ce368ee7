"""Agreement with the teacher, the look inside and the costs: identities, on tiny teachers of three families."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experiments.config import EvaluationConfig, Grid, ImageMetricsConfig
from experiments.distill import DistillationContext, open_context
from experiments.evaluate.fidelity import agreement, teacher_views
from experiments.evaluate.inside import by_offset, look_inside
from experiments.evaluate.speed import cost, speed
from tests.experiments.students import encoded, open_teacher, student
from unet_adapters import MixerAdapter
from unet_adapters.hosts import find_host

PLAN = EvaluationConfig(
    sizes=(64, 128),
    shapes=((64, 96),),
    site_sizes=(128,),
    images=2,
    timesteps=(100, 700),
    speed_sizes=(64,),
    speed_repeats=1,
    metrics=ImageMetricsConfig(images=0),
)


@pytest.fixture
def setting(grid: Grid) -> DistillationContext:
    return open_context(grid.teacher, grid.data, 64, grid.distillation.images)


def test_softmax_untouched_has_no_error_at_all(setting: DistillationContext) -> None:
    found = agreement(setting, MixerAdapter.build(setting.pipe, "softmax"), PLAN)
    assert [(row["height"], row["width"], row["size"]) for row in found["fidelity"]] == [
        (64, 64, 64),
        (128, 128, 128),
        (64, 96, 96),
    ]
    assert {row["error_to_teacher"] for row in found["fidelity"] + found["timesteps"]} == {0.0}
    assert {row["relative_error"] for row in found["sites"]} == {0.0}
    assert {row["error_ratio"] for row in found["fidelity"]} == {1.0}


def test_timesteps_average_to_the_whole(setting: DistillationContext) -> None:
    found = agreement(setting, student(setting.teacher), PLAN)
    assert len(found["timesteps"]) == len(PLAN.timesteps) * len(PLAN.extents)
    for whole in found["fidelity"]:
        parts = [r for r in found["timesteps"] if (r["height"], r["width"]) == (whole["height"], whole["width"])]
        assert [part["timestep"] for part in parts] == list(PLAN.timesteps)
        mean = sum(part["error_to_teacher"] for part in parts) / len(parts)
        assert mean == pytest.approx(whole["error_to_teacher"], rel=1e-12)
        power = sum(p["error_to_teacher"] / p["relative_error_to_teacher"] for p in parts) / len(parts)
        assert mean / power == pytest.approx(whole["relative_error_to_teacher"], rel=1e-9)


def test_sites_are_exact_up_to_the_first_replaced_one(setting: DistillationContext) -> None:
    names = {site.name for site in find_host(setting.pipe.unet).sites()}
    adapter = student(setting.teacher, select="mid_block")
    errors = {row["site"]: row["relative_error"] for row in agreement(setting, adapter, PLAN)["sites"]}
    assert set(errors) == names, "all sites, replaced or not"
    assert len(adapter.sites) < len(names)
    for name, error in errors.items():
        assert (error == 0.0) == name.startswith("down_blocks"), name


def test_a_size_and_a_shape_measure_the_same_where_they_are_the_same(setting: DistillationContext) -> None:
    adapter = student(setting.teacher)
    square = PLAN.model_copy(update={"sizes": (64,), "shapes": ()})
    shape = PLAN.model_copy(update={"sizes": (), "shapes": ((64, 64),)})
    assert agreement(setting, adapter, square)["fidelity"] == agreement(setting, adapter, shape)["fidelity"]


def test_large_sizes_compare_one_picture(setting: DistillationContext) -> None:
    plan = PLAN.model_copy(update={"sizes": (16, 64, 80), "shapes": ((16, 64),), "site_sizes": ()})
    assert [plan.images_at(h, w) for h, w in plan.extents] == [2, 2, 1, 2]
    assert teacher_views(setting, 80, 80, plan)[0].noisy.shape[0] == 1


@pytest.mark.parametrize("kind", ["text-to-image", "SDXL"])
def test_every_family_is_measured(kind: str) -> None:
    teacher = open_teacher(kind, torch.float32)
    setting = DistillationContext(teacher, _Pictures(), encoded(teacher))
    plan = PLAN.model_copy(update={"sizes": (16,), "shapes": ((16, 24),), "site_sizes": (16,), "speed_sizes": (16,)})
    exact = agreement(setting, MixerAdapter.build(teacher.pipe, "softmax"), plan)
    assert {row["error_to_teacher"] for row in exact["fidelity"]} == {0.0}
    adapter = student(teacher)
    assert all(row["error_to_teacher"] > 0 for row in agreement(setting, adapter, plan)["timesteps"])
    assert speed(setting, adapter, plan)[0]["state_size"] > 0
    assert look_inside(setting, adapter, 16)["mixing_matrix"].ndim == 2


class _Pictures:
    """Two captioned pictures of any size."""

    def __len__(self) -> int:
        return 2

    def example(self, index: int, size: object, variation: int = 0):  # type: ignore[no-untyped-def]
        from experiments.data import Example, extent

        generator = torch.Generator().manual_seed(index)
        return Example(torch.rand(3, *extent(size), generator=generator) * 2 - 1, "a b", str(index))


def test_flops_of_the_teacher_itself_are_torch_s_own(setting: DistillationContext) -> None:
    """The softmax mixer's formula stands in for torch's count of the layers: together they are the UNet's."""
    from torch.utils.flop_counter import FlopCounterMode

    from experiments.evaluate.speed import _CPU_ATTENTION, _forward

    forward = _forward(setting, 16)
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        forward()
    with MixerAdapter.build(setting.pipe, "softmax").mounted() as adapter:
        found = cost(adapter, 64, forward)
    assert found["flops"] == counter.get_total_flops()
    linear = MixerAdapter.build(setting.pipe, "linear_attention")
    with linear.mounted():
        small, large = cost(linear, 64, forward), cost(linear, 128, _forward(setting, 32))
    assert large["state_size"] == small["state_size"] > 0
    assert large["flops"] < 4.1 * small["flops"], "linear in the tokens"


def test_the_look_inside_fits_the_matrix(setting: DistillationContext) -> None:
    found = look_inside(setting, MixerAdapter.build(setting.pipe, "softmax"), 64)
    assert found["mixing_matrix"].shape == (256, 256) and found["receptive_field"].shape == (31, 31)
    assert found["receptive_field"].sum() == pytest.approx(1, abs=1e-5)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 10))
def test_shares_by_offset(height: int, width: int, seed: int) -> None:
    length = height * width
    field = by_offset(torch.eye(length), (height, width))
    assert field[height - 1, width - 1] == 1 and field.sum() == 1, "the identity sees itself"
    matrix = torch.randn(length, length, generator=torch.Generator().manual_seed(seed))
    field, expected = by_offset(matrix, (height, width)), torch.zeros(2 * height - 1, 2 * width - 1)
    for i in range(length):
        for j in range(length):
            down, right = j // width - i // width, j % width - i % width
            expected[height - 1 + down, width - 1 + right] += matrix[i, j].abs() / matrix[i].abs().sum() / length
    torch.testing.assert_close(field, expected)
