"""The ready-made grids: every row can be built and is distinct from the others, and every grid carries its controls."""

import pytest
from diffusers import UNet2DConditionModel

from experiments.ablation import combine_variants, is_distinct, list_grids, load_grid
from experiments.ablation.description import VariantDescription, describe_run
from experiments.ablation.variants import effective_feature_map, has_own_feature_map
from experiments.config import Grid, Variant, apply_grid_overrides, resize_grid
from experiments.grids.shared import controls
from experiments.teacher.load import EMBEDDED
from mixers import list_mixers, registry
from unet_adapters import MixerAdapter

WITH_CONTROLS = [name for name in list_grids() if name != "compatibility"]


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    """The embedded teacher's."""
    return UNet2DConditionModel.from_pretrained(EMBEDDED, subfolder="unet").requires_grad_(False)


@pytest.fixture(scope="module")
def configurations() -> set[str]:
    """The configurations of mixers that a test has built; many grids have them in common."""
    return set()


@pytest.mark.parametrize("name", list_grids())
def test_every_row_of_a_ready_made_grid_can_be_built(
    name: str, unet: UNet2DConditionModel, configurations: set[str]
) -> None:
    grid = load_grid(name)
    assert grid.name == name
    for field in ("name", "label"):
        values = [getattr(variant, field) for variant in grid.variants]
        assert len(set(values)) == len(values), f"two rows with the same {field}"
    assert len({cell.id for cell in grid.cells()}) == len(grid.variants) * len(grid.seeds)
    for v in grid.variants:
        choice = {"causality": v.causality, "normalize": v.normalize, "min_tokens": v.min_tokens, **v.options}
        configuration = repr((v.mixer, v.select, sorted(choice.items())))
        if configuration not in configurations:
            MixerAdapter.build(unet, v.mixer, v.select, **choice).mount().unmount()
            configurations.add(configuration)


@pytest.mark.parametrize("name", WITH_CONTROLS)
def test_every_grid_carries_its_controls(name: str) -> None:
    grid = load_grid(name)
    mixers = {control.mixer for control in controls(grid.distillation)}
    assert mixers == {"softmax", "identity", "uniform"}
    rows = [variant for variant in grid.variants if variant.mixer in mixers]
    assert sum(variant.mixer == "softmax" and not variant.trained for variant in rows) == 1
    assert any(v.mixer == "softmax" and v.trained and v.distillation.start == "random" for v in rows if v.distillation)
    assert any(variant.mixer == "identity" and not variant.options for variant in rows)
    assert any(variant.mixer == "identity" and variant.options for variant in rows), "with a convolution"
    assert any(variant.mixer == "uniform" for variant in rows)
    assert grid.reference not in {control.name for control in controls(grid.distillation)}


def compared_rows(name: str) -> dict[str, list[VariantDescription]]:
    """The rows of a grid by what they share if normalization or their feature map differs; no controls."""
    groups: dict[str, list[VariantDescription]] = {}
    for row in describe_run(load_grid(name)).variants:
        if row.control is None:
            groups.setdefault(repr((row.mixer, row.causality, row.other_options, row.distillation)), []).append(row)
    return groups


@pytest.mark.parametrize("name", list_grids())
def test_normalization_is_all_that_differs_in_a_pair(name: str) -> None:
    """Normalized rows need a positive feature map, and a row that is compared with them has the same one."""
    for design, rows in compared_rows(name).items():
        maps = [{r.feature_map for r in rows if r.normalize == normalize} for normalize in (True, False)]
        if all(maps):
            assert maps[0] & maps[1], design


@pytest.mark.parametrize("name", list_grids())
def test_sums_that_grow_are_compared_with_bounded_ones(name: str) -> None:
    """Normalization has two parts: bounded sums, and rows that sum to 1. Erasing bounds the delta rule's sums."""
    for design, rows in compared_rows(name).items():
        levels = {row.normalization for row in rows}
        if {"normalized", "not normalized"} <= levels and rows[0].causality == "noncausal":
            assert "mean scale" in levels or rows[0].mixer in ("gated_deltanet", "kda"), design


def test_unnormalized_combinations_have_the_feature_map_of_the_normalized_ones() -> None:
    for name in list_mixers():
        maps = {v.normalize: effective_feature_map(v) for v in combine_variants({name: name}, mean_scale=True)}
        assert len(set(maps.values())) == 1, (name, maps)
        assert all(has_own_feature_map(v) for v in combine_variants({name: name}))
    signed = Variant(name="a", label="a", mixer="gla", normalize=False, options={"feature_map": "identity"})
    assert effective_feature_map(signed) == "identity" and not has_own_feature_map(signed)
    published = Variant(name="a", label="a", mixer="gla", normalize=False)
    assert effective_feature_map(published) == "identity" and has_own_feature_map(published)


def test_a_feature_map_of_any_mixer_is_a_difference_of_rows() -> None:
    """SLA has a map of its own kind, which no other option stands for."""
    rows = (
        Variant(name=name, label=name, mixer="sparse_linear", options={"feature_map": name})
        for name in ("softmax", "elu_plus_one")
    )
    assert [effective_feature_map(row) for row in rows] == ["softmax", "elu_plus_one"]


def test_combinations_are_what_every_mixer_offers_and_nothing_else() -> None:
    for name in list_mixers():
        entry = registry.get_mixer_entry(name)
        rows = combine_variants({name: name})
        assert {(v.causality, v.normalize) for v in rows} == {
            (c, n) for c in entry.causalities for n in entry.normalizations
        }


def test_combinations_are_filtered_and_every_row_gets_the_other_fields() -> None:
    rows = combine_variants(
        {"linear_attention": "linear", "gla": "GLA"}, normalizations=(True,), condition=is_distinct, min_tokens=64
    )
    assert [v.name for v in rows] == [
        "linear_attention_causal_normalized",
        "linear_attention_noncausal_normalized",
        "gla_causal_normalized",
        "gla_bidirectional_normalized",
        "gla_noncausal_normalized",
    ]
    assert rows[3].label == "GLA, bidirectional, normalized"
    assert {v.min_tokens for v in rows} == {64}


def test_empty_combinations_are_refused() -> None:
    with pytest.raises(ValueError, match="No variant is left of softmax"):
        combine_variants({"softmax": "softmax"}, causalities=("bidirectional",))
    with pytest.raises(ValueError, match="Did you mean"):
        combine_variants({"linfusoin": "?"})


def test_the_family_has_no_row_twice() -> None:
    forms = {(v.mixer, v.causality, v.normalize) for v in load_grid("family").variants}
    assert ("linfusion", "bidirectional", True) not in forms, "without an order it is the non-causal row"
    assert ("mamba", "bidirectional", True) in forms


def test_names_belong_to_one_row() -> None:
    grid = load_grid("demo")
    repeated = next(variant for variant in grid.variants if variant.name == "linfusion")
    fields = dict(grid)
    fields["variants"] = (*grid.variants, repeated.model_copy(update={"label": "another"}))
    with pytest.raises(ValueError, match="linfusion is there more than once"):
        Grid(**fields)


@pytest.mark.parametrize("name", list_grids())
def test_settings_of_the_distillation_hold_for_every_row(name: str) -> None:
    changed = apply_grid_overrides(load_grid(name), ["distillation.fit.steps=7", "distillation.images=64"])
    plans = [cell.distillation for cell in changed.cells()]
    assert {(plan.fit.steps, plan.images) for plan in plans} == {(7, 64)}
    with pytest.raises(ValueError, match="Did you mean 'steps'"):
        apply_grid_overrides(changed, ["distillation.fit.step=7"])


@pytest.mark.parametrize("setting", ["train=new", "calibrate_outputs=true", "calibrate_outputs=false", "start=random"])
@pytest.mark.parametrize("name", WITH_CONTROLS)
def test_a_row_keeps_the_start_that_it_is_about(name: str, setting: str) -> None:
    """The controls' distilled softmax starts from random projections, for which other values are refused."""
    grid = load_grid(name)
    settings = [f"distillation.{setting}"]
    if setting == "start=random":
        settings.append("distillation.calibrate_outputs=false")
    changed = apply_grid_overrides(grid, settings)
    for before, after in zip(grid.cells(), changed.cells(), strict=True):
        fields = ("start", "train", "calibrate_outputs")
        is_own = any(getattr(before.distillation, field) != getattr(grid.distillation, field) for field in fields)
        source = before.distillation if is_own else changed.distillation
        assert all(getattr(after.distillation, field) == getattr(source, field) for field in fields)


def test_a_row_keeps_the_objectives_that_it_is_about() -> None:
    grid = load_grid("objectives")
    changed = apply_grid_overrides(grid, ['distillation.objectives={"output": 1}'])
    for before, after in zip(grid.variants, changed.variants, strict=True):
        if before.distillation is None or before.distillation.objectives == grid.distillation.objectives:
            assert after.distillation is None or set(after.distillation.objectives) == {"output"}
        else:
            assert after == before


@pytest.mark.parametrize("name", list_grids())
def test_a_grid_scales_to_another_teachers_size(name: str) -> None:
    grid = load_grid(name)
    larger = resize_grid(grid, 512)
    assert larger.distillation.image_size == 512
    assert larger.evaluation.sizes == tuple(8 * size for size in grid.evaluation.sizes)
    assert larger.distillation.all_sizes == tuple(8 * size for size in grid.distillation.all_sizes)
    assert [v.options for v in larger.variants] == [v.options for v in grid.variants]
    assert resize_grid(larger, 64) == grid


def test_a_comparison_names_rows_of_its_grid() -> None:
    grid = load_grid("design")
    fields = dict(grid)
    fields["variants"] = (grid.variants[0], Variant(name="linear_attention", label="a", mixer="softmax"))
    with pytest.raises(ValueError, match="which is no variant"):
        Grid(**fields)
