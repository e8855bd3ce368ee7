"""Agreement with the teacher, mixing arrays and costs: identities, on tiny teachers of three families."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from experiments.config import EvaluationConfig, GeneratedImagesConfig, Grid, apply_overrides
from experiments.distill import DistillationContext, open_context
from experiments.evaluate.mixing_arrays import mixing_arrays, sum_by_offset
from experiments.metrics.cost import Cost, CostOptions, count_operations, forward_pass, most_tokens
from experiments.metrics.fidelity import Fidelity, FidelityRow
from experiments.metrics.inputs.student import EvaluatedStudent
from experiments.metrics.sites import SiteErrors, SiteOptions
from experiments.metrics.timesteps import TimestepErrors, TimestepRow
from experiments.metrics.transfer import Transfer, TransferOptions, TransferRow
from experiments.teacher.teacher import Teacher
from tests.experiments.students import encoded, open_teacher, student
from tests.unet_adapters.transformer_pipelines import PIPELINES
from unet_adapters import MixerAdapter
from unet_adapters.capture import capture_sites
from unet_adapters.highres.memory import CPU_ATTENTION
from unet_adapters.hosts import find_host

PLAN = EvaluationConfig(
    sizes=(64, 128),
    shapes=((64, 96),),
    images=3,
    held_in_images=2,
    batch_size=2,
    timesteps=(100, 700, 999),
    generated=GeneratedImagesConfig(images=0),
)


@pytest.fixture
def context(grid: Grid) -> DistillationContext:
    return open_context(grid.teacher, grid.data, 64, grid.distillation.images)


def evaluated(
    context: DistillationContext, adapter: MixerAdapter, plan: EvaluationConfig = PLAN, seed: int = 0
) -> EvaluatedStudent:
    return EvaluatedStudent(context, adapter, plan, "scenes", seed)


def fidelity(subject: EvaluatedStudent) -> list[FidelityRow]:
    return [row for row in Fidelity().measure(subject) if isinstance(row, FidelityRow)]


def timesteps(subject: EvaluatedStudent) -> list[TimestepRow]:
    return [row for row in TimestepErrors().measure(subject) if isinstance(row, TimestepRow)]


def test_transfer_to_the_same_data_is_fidelity(context: DistillationContext) -> None:
    """And with one size, the images with more objects are the very same scenes."""
    subject = evaluated(context, MixerAdapter.build(context.pipe, "linear_attention"))
    (row, *_) = (r for r in fidelity(subject) if r.split == "held_out" and r.height == r.width == 64)
    for data in ("scenes", "scenes-more"):
        (same,) = Transfer(TransferOptions(data=data, sizes=(64,))).measure(subject)
        assert isinstance(same, TransferRow)
        assert same.relative_error_to_teacher == pytest.approx(row.relative_error_to_teacher)
        assert same.error_by_image == pytest.approx(row.error_by_image)
    (more,) = Transfer(TransferOptions(sizes=(128,))).measure(subject)
    (larger,) = (r for r in fidelity(subject) if r.split == "held_out" and r.height == r.width == 128)
    assert isinstance(more, TransferRow) and more.relative_error_to_teacher != larger.relative_error_to_teacher


def test_untouched_softmax_has_no_error_at_all(context: DistillationContext) -> None:
    subject = evaluated(context, MixerAdapter.build(context.pipe, "softmax"))
    rows = fidelity(subject)
    extents = [(64, 64, 64), (128, 128, 128), (64, 96, 96)]
    assert [(row.height, row.width, row.size) for row in rows] == [*extents, extents[0]]
    assert [row.split for row in rows] == 3 * ["held_out"] + ["held_in"]
    assert {row.error_to_teacher for row in [*rows, *timesteps(subject)]} == {0.0}
    assert {row.error_ratio for row in rows} == {1.0}
    sites = SiteErrors(SiteOptions(sizes=(128,))).measure(subject)
    assert {row.relative_error for row in sites} == {0.0}  # type: ignore[attr-defined]


def test_timesteps_and_images_average_to_the_whole(context: DistillationContext) -> None:
    subject = evaluated(context, student(context.teacher))
    parts = timesteps(subject)
    assert len(parts) == len(PLAN.timesteps) * len(PLAN.extents)
    for whole in (row for row in fidelity(subject) if row.split == "held_out"):
        own = [part for part in parts if (part.height, part.width) == (whole.height, whole.width)]
        assert [part.timestep for part in own] == list(PLAN.timesteps)
        mean = sum(part.error_to_teacher for part in own) / len(own)
        assert mean == pytest.approx(whole.error_to_teacher, rel=1e-12)
        power = sum(part.error_to_teacher / part.relative_error_to_teacher for part in own) / len(own)
        assert mean / power == pytest.approx(whole.relative_error_to_teacher, rel=1e-9)
        assert len(whole.error_by_image) == whole.images == 3
        assert sum(whole.error_by_image) / 3 == pytest.approx(whole.error_to_teacher, rel=1e-12)


@pytest.mark.parametrize("count", [1, 2])
def test_timesteps_are_spread_over_images_beyond_the_smallest_size(context: DistillationContext, count: int) -> None:
    """Each image has its number of timesteps, each timestep as many images, and each pair its own error."""
    adapter = student(context.teacher)
    plan = PLAN.model_copy(update={"timesteps": (100, 400, 700, 999), "images": 4})
    spread = evaluated(context, adapter, plan.model_copy(update={"timesteps_per_image": count}))
    full = evaluated(context, adapter, plan.model_copy(update={"timesteps_per_image": 4}))
    for height, width in plan.extents:
        everything = {e.timestep: e for e in full.prediction_errors(height, width)}
        compared: list[tuple[int, int]] = []
        for error in spread.prediction_errors(height, width):
            compared += [(image, error.timestep) for image in error.images.tolist()]
            for name in ("to_teacher", "teacher_power", "to_truth", "teacher_to_truth"):
                expected = getattr(everything[error.timestep], name)[error.images]
                torch.testing.assert_close(getattr(error, name), expected, rtol=1e-4, atol=1e-9)
        smallest = (height, width) == plan.smallest_extent
        assert len(set(compared)) == len(compared) == 4 * (4 if smallest else count)
        for place, values in ((0, range(4)), (1, plan.timesteps)):
            assert {sum(pair[place] == value for pair in compared) for value in values} == {4 if smallest else count}
    row = next(row for row in fidelity(spread) if row.size == 128)
    assert row.images == len(row.error_by_image) == 4


def test_sites_are_exact_up_to_the_first_replaced_one(context: DistillationContext) -> None:
    names = {site.name for site in find_host(context.pipe.unet).sites()}
    adapter = student(context.teacher, select="mid_block")
    rows = SiteErrors(SiteOptions(sizes=(64,), images=2)).measure(evaluated(context, adapter))
    errors = {row.site: row.relative_error for row in rows}  # type: ignore[attr-defined]
    assert set(errors) == names, "all sites, replaced or not"
    assert len(adapter.sites) < len(names)
    for name, error in errors.items():
        assert (error == 0.0) == name.startswith("down_blocks"), name


def test_a_size_and_a_shape_measure_the_same_if_they_are_the_same(context: DistillationContext) -> None:
    adapter = student(context.teacher)
    square = PLAN.model_copy(update={"sizes": (64,), "shapes": ()})
    shape = PLAN.model_copy(update={"sizes": (), "shapes": ((64, 64),)})
    assert fidelity(evaluated(context, adapter, square)) == fidelity(evaluated(context, adapter, shape))


def test_noise_depends_on_the_seed_and_not_on_the_other_timesteps(context: DistillationContext) -> None:
    adapter = student(context.teacher)
    first = timesteps(evaluated(context, adapter))
    assert first == timesteps(evaluated(context, adapter))
    assert first != timesteps(evaluated(context, adapter, seed=1))
    fewer = PLAN.model_copy(update={"timesteps": (700,)})
    assert timesteps(evaluated(context, adapter, fewer)) == [row for row in first if row.timestep == 700]


def test_the_number_of_images_in_a_batch_changes_rounding_alone(context: DistillationContext) -> None:
    adapter = student(context.teacher)
    one, all_at_once = (
        fidelity(evaluated(context, adapter, PLAN.model_copy(update={"batch_size": size}))) for size in (1, 3)
    )
    for a, b in zip(one, all_at_once, strict=True):
        assert a.error_by_image == pytest.approx(b.error_by_image, rel=1e-4)


def test_predictions_of_the_teacher_follow_its_weights(context: DistillationContext) -> None:
    """They are shared by all students, and computed again after the weights change in place."""
    adapter = student(context.teacher)
    first = timesteps(evaluated(context, adapter))
    bias = context.pipe.unet.conv_out.bias
    original = bias.detach().clone()
    with torch.no_grad():
        bias.add_(1)
        changed = fidelity(evaluated(context, MixerAdapter.build(context.pipe, "softmax")))
        bias.copy_(original)
    assert {row.error_to_teacher for row in changed} == {0.0}
    assert timesteps(evaluated(context, adapter)) == first


@pytest.mark.parametrize("kind", ["text-to-image", "SDXL"])
def test_every_family_of_teachers_is_measured(kind: str) -> None:
    teacher = open_teacher(kind, torch.float32)
    context = DistillationContext(teacher, _TwoImages(), encoded(teacher))
    plan = PLAN.model_copy(update={"sizes": (16,), "shapes": ((16, 24),), "images": 2, "held_in_images": 0})
    exact = fidelity(evaluated(context, MixerAdapter.build(teacher.pipe, "softmax"), plan))
    assert {row.error_to_teacher for row in exact} == {0.0}
    subject = evaluated(context, student(teacher), plan)
    assert all(row.error_to_teacher > 0 for row in timesteps(subject))
    (cost,) = Cost(CostOptions(sizes=(16,), repeats=1)).measure(subject)
    assert cost.state_size > 0  # type: ignore[attr-defined]
    assert mixing_arrays(subject, 16)["mixing_matrix"].ndim == 2


class _TwoImages:
    """Two captioned images of any size."""

    def __len__(self) -> int:
        return 2

    def example(self, index: int, size: object, variation: int = 0):  # type: ignore[no-untyped-def]
        from experiments.data import Example, extent

        generator = torch.Generator().manual_seed(index)
        return Example(torch.rand(3, *extent(size), generator=generator) * 2 - 1, "a b", str(index))


def test_flops_of_the_teacher_itself_are_what_torch_counts(context: DistillationContext) -> None:
    """With the softmax mixer mounted, the count is that of the stock UNet."""
    forward = forward_pass(context, 16)
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        forward()
    with MixerAdapter.build(context.pipe, "softmax").mounted() as adapter:
        flops, _ = count_operations(adapter, 64, forward)
    assert flops == counter.get_total_flops()
    linear = MixerAdapter.build(context.pipe, "linear_attention")
    with linear.mounted():
        small = count_operations(linear, 64, forward)
        large = count_operations(linear, 128, forward_pass(context, 32))
    assert small[0] and large[0] and small[1]
    assert large[1] == small[1] > 0
    assert large[0] < 4.1 * small[0], "linear in the tokens"


@pytest.mark.parametrize("kind", ["text-to-image", "SDXL", *PIPELINES])
def test_the_cost_is_against_the_tokens_that_attention_sees(kind: str) -> None:
    """Transformers attend to patches, and some UNets begin to attend at half the size."""
    teacher = Teacher(PIPELINES[kind]()) if kind in PIPELINES else open_teacher(kind, torch.float32)
    context = DistillationContext(teacher, _TwoImages(), encoded(teacher))
    side = 8
    with torch.no_grad(), capture_sites(teacher.denoiser, [site.name for site in teacher.host.sites()]) as calls:
        forward_pass(context, side)()
    image_tokens = [call.input.shape[1] - (call.text_tokens or 0) for call in calls.values()]
    assert most_tokens(context, side) == max(image_tokens) > 0


def test_sites_below_min_tokens_have_the_state_of_softmax(context: DistillationContext) -> None:
    """A hybrid is between the mixer and softmax attention, and is one of them if all sites are."""
    states = {}
    for name, mixer, least in (
        ("linear", "linear_attention", 0),
        ("hybrid", "linear_attention", 256),
        ("none", "linear_attention", 257),
        ("softmax", "softmax", 0),
    ):
        with MixerAdapter.build(context.pipe, mixer, min_tokens=least).mounted() as adapter:
            states[name] = count_operations(adapter, 64, forward_pass(context, 16))[1]
    assert states["none"] == states["softmax"] and states["hybrid"] not in (states["linear"], states["softmax"])


def test_mixing_arrays_have_the_shapes_of_the_site(context: DistillationContext) -> None:
    arrays = mixing_arrays(evaluated(context, MixerAdapter.build(context.pipe, "softmax")), 64)
    assert arrays["mixing_matrix"].shape == (256, 256) and arrays["receptive_field"].shape == (31, 31)
    assert arrays["receptive_field"].sum() == pytest.approx(1, abs=1e-5)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 10))
def test_shares_by_offset(height: int, width: int, seed: int) -> None:
    length = height * width
    field = sum_by_offset(torch.eye(length), (height, width))
    assert field[height - 1, width - 1] == 1 and field.sum() == 1, "the identity reads only itself"
    matrix = torch.randn(length, length, generator=torch.Generator().manual_seed(seed))
    field = sum_by_offset(matrix, (height, width))
    expected = torch.zeros(2 * height - 1, 2 * width - 1)
    for i in range(length):
        for j in range(length):
            down = j // width - i // width
            right = j % width - i % width
            expected[height - 1 + down, width - 1 + right] += matrix[i, j].abs() / matrix[i].abs().sum() / length
    torch.testing.assert_close(field, expected)


def test_a_setting_adds_a_metric_with_its_options() -> None:
    plan = EvaluationConfig(metrics={"fidelity": {}})
    assert apply_overrides(plan, ["metrics.cmmd={}"]).metrics.keys() == {"fidelity", "cmmd"}
    assert apply_overrides(plan, ["metrics.cost.repeats=7"]).metrics["cost"]["repeats"] == 7
    for setting, hint in (("metrics.cosst={}", "'cost'"), ("metrics.cost.repeat=7", "'repeats'")):
        with pytest.raises(ValueError, match=f"Did you mean {hint}"):
            apply_overrides(plan, [setting])
