"""The ready-made grids: every row can be built, and is told apart from the others."""

import pytest
from diffusers import UNet2DConditionModel

from experiments.ablation import load_grid
from experiments.ablation.grid import list_grids
from experiments.ablation.product import distinct, product
from experiments.config import Grid, Variant, apply_grid_overrides, resize_grid
from experiments.teacher.load import EMBEDDED
from mixers import list_mixers, registry
from unet_adapters import MixerAdapter


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    """The embedded teacher's."""
    return UNet2DConditionModel.from_pretrained(EMBEDDED, subfolder="unet").requires_grad_(False)


@pytest.mark.parametrize("name", list_grids())
def test_every_row_of_a_ready_made_grid_can_be_built(name: str, unet: UNet2DConditionModel) -> None:
    grid = load_grid(name)
    assert grid.name == name
    for of in ("name", "label"):
        told = [getattr(variant, of) for variant in grid.variants]
        assert len(set(told)) == len(told), f"two rows with the same {of}"
    assert len({cell.id for cell in grid.cells()}) == len(grid.variants) * len(grid.seeds)
    for v in grid.variants:
        choice = {"causality": v.causality, "normalize": v.normalize, "min_tokens": v.min_tokens, **v.options}
        adapter = MixerAdapter.build(unet, v.mixer, v.select, **choice)
        adapter.mount()
        adapter.unmount()


def test_a_product_has_what_every_mixer_offers_and_nothing_else() -> None:
    for name in list_mixers():
        entry = registry.get_mixer_entry(name)
        rows = product({name: name})
        assert {(v.causality, v.normalize) for v in rows} == {
            (c, n) for c in entry.causalities for n in entry.normalizations
        }


def test_a_product_is_filtered_and_every_row_gets_the_rest() -> None:
    rows = product({"linear_attention": "linear", "gla": "GLA"}, normalizations=(True,), keep=distinct, min_tokens=64)
    assert [v.name for v in rows] == [
        "linear_attention_causal_normalized",
        "linear_attention_noncausal_normalized",
        "gla_causal_normalized",
        "gla_bidirectional_normalized",
        "gla_noncausal_normalized",
    ]
    assert rows[3].label == "GLA, bidirectional, normalized"
    assert {v.min_tokens for v in rows} == {64}


def test_a_product_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="Nothing is left of softmax"):
        product({"softmax": "softmax"}, causalities=("bidirectional",))
    with pytest.raises(ValueError, match="Did you mean"):
        product({"linfusoin": "?"})


def test_the_family_says_no_row_twice() -> None:
    def form(v: Variant) -> tuple[str, object, object]:
        return v.mixer, v.causality, v.normalize

    forms = {form(v) for v in load_grid("family").variants}
    assert ("linfusion", "bidirectional", True) not in forms, "without an order it is the non-causal row"
    assert ("mamba", "bidirectional", True) in forms


def test_names_are_of_one_row() -> None:
    grid = load_grid("demo")
    with pytest.raises(ValueError, match="linfusion is there more than once"):
        Grid(**{**dict(grid), "variants": (*grid.variants, grid.variants[1].model_copy(update={"label": "another"}))})


@pytest.mark.parametrize("name", list_grids())
def test_what_is_set_of_the_distillation_holds_for_every_row(name: str) -> None:
    changed = apply_grid_overrides(load_grid(name), ["distillation.fit.steps=7", "distillation.images=64"])
    plans = [cell.distillation for cell in changed.cells()]
    assert {(plan.fit.steps, plan.images) for plan in plans} == {(7, 64)}
    with pytest.raises(ValueError, match="Did you mean 'steps'"):
        apply_grid_overrides(changed, ["distillation.fit.step=7"])


@pytest.mark.parametrize("name", list_grids())
def test_a_grid_takes_the_size_of_another_teacher(name: str) -> None:
    grid = load_grid(name)
    larger = resize_grid(grid, 512)
    assert larger.distillation.image_size == 512
    assert larger.evaluation.sizes == tuple(8 * size for size in grid.evaluation.sizes)
    assert larger.distillation.all_sizes == tuple(8 * size for size in grid.distillation.all_sizes)
    assert [v.options for v in larger.variants] == [v.options for v in grid.variants]
    assert resize_grid(larger, 64) == grid
