"""Effects of factors, controls and rank stability: identities on made-up runs."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.config import Claim, DistillationConfig, FitConfig, PlannedComparison
from experiments.report.conclusions import draw_conclusions
from experiments.report.effect_plots import pareto_front
from experiments.report.effects import OTHER_FIELDS, SPLITS, compute_effects
from experiments.report.run_files import RunRecord
from experiments.report.tables import effects_table
from tests.experiments.runs import SEEDS, RowKey, add_row, by_name, cell_record, made_up, run_of


def test_effects_are_the_factors_of_the_errors() -> None:
    effects = by_name(made_up())
    expected = {
        "not normalized ÷ normalized": (2, 4),
        "causal ÷ non-causal (normalized rows)": (3, 2),
        "causal ÷ non-causal (unnormalized rows)": (3, 2),
        "mamba2 ÷ linear_attention (normalized rows)": (5, 2),
        "mamba2 ÷ linear_attention (unnormalized rows)": (5, 2),
    }
    assert effects.keys() == expected.keys(), "normalized and unnormalized rows are never pooled"
    for name, (ratio, pairs) in expected.items():
        effect = effects[name]
        assert not effect.depends and effect.complete and effect.significant
        assert effect.ratio.mean == pytest.approx(ratio) and effect.ratio.low == pytest.approx(effect.ratio.high)
        assert len(effect.pairs) == effect.planned == pairs
        assert all(pair.ratio.mean == pytest.approx(ratio) for pair in effect.pairs)


def test_the_effect_of_normalization_splits_into_bounded_sums_and_normalized_rows() -> None:
    run = made_up(mixers=("linear_attention",))
    rows = [variant for variant in run.variants if not variant.normalize]
    mean_scale = [v.model_copy(update={"name": f"{v.name}_mean", "options": {"scale": "mean"}}) for v in rows]
    run.description = run.description.model_copy(update={"variants": (*run.variants, *mean_scale)})
    for variant in rows:
        for cell in run.done(variant.name):
            run.cells.append(
                cell_record(f"{variant.name}_mean", cell.seed or 0, {64: cell.fidelity[64].size * 0 + 0.01})
            )
    effects = by_name(run)
    whole = effects["not normalized ÷ normalized"].ratio.mean
    bounded = effects['not normalized ÷ scale="mean"'].ratio.mean
    normalized = effects['scale="mean" ÷ normalized'].ratio.mean
    assert whole == pytest.approx(2) and bounded * normalized == pytest.approx(whole)


def opposed(mixers: tuple[str, str]) -> RunRecord:
    """Causal is twice as good with the one mixer and eight times worse with the other."""
    rows: dict[RowKey, dict[int, dict[int, float]]] = {}
    for mixer, factor in zip(mixers, (0.5, 8.0), strict=True):
        for causality in ("noncausal", "causal"):
            error = 0.01 * (factor if causality == "causal" else 1)
            rows[mixer, causality, True] = {s: {64: error * (1 + s)} for s in SEEDS}
    return run_of(rows)


def test_an_effect_with_opposite_signs_depends_on_what_splits_it() -> None:
    run = opposed(("linear_attention", "mamba2"))
    (effect,) = (e for e in compute_effects(run) if e.factor.value == "causal")
    assert effect.ratio.mean == pytest.approx(2) and effect.depends == "mixer"
    parts = effect.split_by("mixer")
    assert [e.ratio.mean for e in parts.values()] == pytest.approx([0.5, 8.0])
    assert all(len(e.pairs) == 1 for e in parts.values())
    assert not effect.split_by("causality") and not effect.split_by("normalization")
    claim = Claim(statement="causal is worse", factor="causality", value="causal", worse=True)
    run.description = run.description.model_copy(update={"claims": (claim,)})
    conclusions = draw_conclusions(run)
    assert conclusions.verdicts[0].state == "depends on the other factors"
    assert any("depends on the mixer: 0.500× [0.500, 0.500]" in s for s in conclusions.sentences)


@given(st.permutations([0, 1, 2]))
def test_parts_make_up_the_whole_in_any_order_of_seeds(order: list[int]) -> None:
    run = made_up(noise=0.3)
    run.cells.sort(key=lambda cell: order.index(cell.seed or 0))
    for effect, other in zip(compute_effects(run), compute_effects(made_up(noise=0.3)), strict=True):
        assert effect.ratio == other.ratio
        for field in SPLITS:
            parts = effect.split_by(field).values()
            logs = [len(e.pairs) * math.log(e.ratio.mean) for e in parts]
            assert not parts or sum(logs) / len(effect.pairs) == pytest.approx(math.log(effect.ratio.mean))


def test_p_values_are_corrected_for_the_number_of_effects() -> None:
    loud = compute_effects(made_up(noise=3.0))
    quiet = compute_effects(made_up(noise=0.01))
    for effect in (*loud, *quiet):
        assert effect.adjusted_p >= effect.ratio.p_value
        assert not effect.significant or effect.ratio.excludes(1.0)
    assert all(effect.significant for effect in quiet) and not any(effect.significant for effect in loud)


@given(st.sampled_from((0.4, 1.0, 3.0, 1e5)))
def test_no_pair_is_left_out_for_its_outcome(error: float) -> None:
    run = made_up()
    for cell in run.cells:
        if cell.variant.startswith("mamba2"):
            cell.result = cell_record(cell.variant, cell.seed or 0, {64: error * (1 + (cell.seed or 0))}).result
            cell.__dict__.pop("fidelity", None)
    assert [len(e.pairs) for e in compute_effects(run)] == [e.planned for e in compute_effects(run)] == [4, 2, 2, 2, 2]


def test_an_unfinished_pair_makes_its_effect_incomplete() -> None:
    run = made_up()
    claim = Claim(statement="it matters", factor="normalization", value="not normalized", worse=True)
    run.description = run.description.model_copy(update={"claims": (claim,)})
    run.cells = [cell for cell in run.cells if cell.variant != "mamba2_causal_normalized"]
    effect = by_name(run)["not normalized ÷ normalized"]
    assert (len(effect.pairs), effect.planned, effect.complete) == (3, 4, False)
    conclusions = draw_conclusions(run)
    assert conclusions.verdicts[0].state == "incomplete"
    assert any("incomplete: 3 of 4 pairs of rows are measured" in sentence for sentence in conclusions.sentences)


def test_whatever_else_rows_differ_in_is_an_effect_of_its_own() -> None:
    run = made_up()
    ranked = tuple(v.model_copy(update={"options": {"rank": 1 + n}}) for n, v in enumerate(run.variants))
    run.description = run.description.model_copy(update={"variants": ranked})
    assert not compute_effects(run), "these differ in two things each"
    plan = DistillationConfig(fit=FitConfig(steps=1, batch_size=1, learning_rate=1e-3))
    changes = {
        "options": {"rank": 9},
        "feature_map": "relu",
        "select": "mid_block",
        "min_tokens": 3,
        "distillation": plan,
    }
    for n, (field, value) in enumerate(changes.items()):
        changed = {"name": f"other {n}", "label": f"row {n}", field: value}
        add_row(run, ranked[0].model_copy(update=changed), 0.5)
    effects = compute_effects(run)
    assert [(e.factor.above, e.factor.below, len(e.pairs)) for e in effects] == [
        (f"row {n}", ranked[0].label, 1) for n in range(5)
    ]
    assert {e.factor.name for e in effects} == set(OTHER_FIELDS.values())
    assert "rather than" in draw_conclusions(run).sentences[0]


def test_normalization_is_compared_at_equal_feature_maps_and_mixers_at_their_own() -> None:
    run = made_up()
    signed = {"feature_map": "identity"}
    variants = [v.model_copy(update=signed if v.mixer == "mamba2" and not v.normalize else {}) for v in run.variants]
    run.description = run.description.model_copy(update={"variants": tuple(variants)})
    pairs = {name: len(effect.pairs) for name, effect in by_name(run).items()}
    assert pairs["not normalized ÷ normalized"] == 2, "of linear attention alone"
    assert pairs["mamba2 ÷ linear_attention (normalized rows)"] == 2
    assert pairs["mamba2 ÷ linear_attention (unnormalized rows)"] == 2


def test_a_planned_comparison_is_an_effect() -> None:
    run = made_up()
    comparison = PlannedComparison(
        name="equal parameters", above="mamba2_causal_normalized", below="linear_attention_noncausal_unnormalized"
    )
    run.description = run.description.model_copy(update={"comparisons": (comparison,)})
    (effect,) = (e for e in compute_effects(run) if e.factor.name == "equal parameters")
    assert effect.ratio.mean == pytest.approx(5 * 3 / 2) and effect.complete


def test_the_table_of_factors_has_every_pair() -> None:
    run = made_up()
    (effect,) = (e for e in compute_effects(run) if e.name == "not normalized ÷ normalized")
    assert {key: len(part.pairs) for key, part in effect.parts("mixer", "causality").items()} == {
        (mixer, causality): 1 for mixer in ("linear_attention", "mamba2") for causality in ("noncausal", "causal")
    }
    lines = {(row.label, row.cells[0].text): row.cells for row in effects_table(run, compute_effects(run)).rows}
    for among in ("all rows", "linear_attention", "causal", "mamba2, non-causal"):
        assert ("not normalized ÷ normalized", among) in lines
    assert lines["not normalized ÷ normalized", "all rows"][1].text == "▲ 2.00 [2.00, 2.00]"
    assert ("causal ÷ non-causal (normalized rows)", "mamba2") in lines


@pytest.mark.parametrize("noise", [0.01, 0.1, 0.3, 1.0])
def test_a_mark_in_the_table_of_factors_is_one_of_its_own_line(noise: float) -> None:
    """Parts of the rows are compared too: a mark needs an interval that excludes 1, and p-values are corrected."""
    run = made_up(noise)
    effects = compute_effects(run)
    table = effects_table(run, effects)
    parts = [row for row in table.rows if row.cells[0].text != "all rows"]
    ratios = {effect.name: list(effect.parts(*SPLITS).values()) for effect in effects}
    assert len(parts) > len(effects)
    assert all(math.isnan(part.adjusted_p) and not part.significant for each in ratios.values() for part in each)
    for row in table.rows:
        text = row.cells[1].text
        low, high = (float(bound) for bound in text.split("[")[1].rstrip("]").split(", "))
        assert not text.startswith("▲") or low >= 1
        assert not text.startswith("▼") or high <= 1
    marked = any(row.cells[1].text.startswith("▲") for row in parts)
    assert marked or noise > 0.01
    assert not marked or noise < 1


def test_a_part_is_not_marked_for_the_effect_of_all_rows() -> None:
    """All rows together are worse without normalization beyond noise; of the loud mixer alone that is not known."""
    run = made_up(0.01, ("linear_attention",))
    loud = made_up(0.01, ("mamba2",))
    for cell in loud.cells:
        factor = (0.3, 1.0, 3.0)[cell.seed or 0] if "unnormalized" in cell.variant else 1.0
        errors = {64: factor * cell.fidelity[64].relative_error_to_teacher}
        run.cells.append(cell_record(cell.variant, cell.seed or 0, errors))
    run.description = run.description.model_copy(update={"variants": (*run.variants, *loud.variants)})
    effects = [replace(effect, adjusted_p=0.0) for effect in compute_effects(run)]
    lines = {(row.label, row.cells[0].text): row.cells[1].text for row in effects_table(run, effects).rows}
    assert lines["not normalized ÷ normalized", "all rows"].startswith("▲")
    assert lines["not normalized ÷ normalized", "linear_attention"].startswith("▲")
    assert not lines["not normalized ÷ normalized", "mamba2"].startswith("▲")


def test_a_claim_without_a_pair_is_not_tested() -> None:
    claim = Claim(statement="order", factor="causality", value="bidirectional", worse=True)
    run = made_up()
    run.description = run.description.model_copy(update={"claims": (claim,)})
    assert [verdict.state for verdict in draw_conclusions(run).verdicts] == ["not tested"]


def test_effects_are_kept_when_parts_are_taken() -> None:
    effect = compute_effects(made_up())[0]
    assert replace(effect, pairs=effect.pairs[:1]).ratio.mean == pytest.approx(2)


@given(st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)), min_size=1, max_size=12))
def test_no_point_beats_the_front(points: list[tuple[float, float]]) -> None:
    best = pareto_front(points)
    assert best and set(best) <= set(points)
    for cost, error in best:
        assert not any((c <= cost and e < error) or (c < cost and e <= error) for c, e in points)
    for cost, error in set(points) - set(best):
        assert any(c <= cost and e <= error for c, e in best)
