"""Effects of factors, controls and rank stability: identities on made-up runs."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.ablation.description import VariantDescription
from experiments.config import Claim, DistillationConfig, FitConfig, PlannedComparison
from experiments.report.conclusions import draw_conclusions
from experiments.report.controls import control_note, control_rows, excess_error, share_of_identity
from experiments.report.effect_plots import pareto_front
from experiments.report.effects import OTHER_FIELDS, SPLITS, Effect, compute_effects
from experiments.report.rank_stability import describe_rank_stability
from experiments.report.run_files import RunRecord
from experiments.report.tables import effects_table
from tests.experiments.runs import RowKey, cell_record, run_of

SEEDS = range(3)


def made_up(noise: float = 0.0, mixers: tuple[str, ...] = ("linear_attention", "mamba2")) -> RunRecord:
    """Errors 2^(not normalized) · 3^(causal) · 5^(mamba2), with each seed's own factor, and noise if requested."""
    random = np.random.default_rng(0)
    rows: dict[RowKey, dict[int, dict[int, float]]] = {}
    for mixer in mixers:
        for causality in ("noncausal", "causal"):
            for normalize in (True, False):
                error = 0.01 * 2 ** (not normalize) * 3 ** (causality == "causal") * 5 ** (mixer == "mamba2")
                errors = {s: {64: error * (1 + s) * math.exp(noise * random.normal())} for s in SEEDS}
                rows[mixer, causality, normalize] = errors
    return run_of(rows)


def by_name(run: RunRecord) -> dict[str, Effect]:
    return {effect.name: effect for effect in compute_effects(run)}


def test_effects_are_the_factors_of_the_errors() -> None:
    effects = by_name(made_up())
    expected = {
        "not normalized ÷ normalized": (2, 4),
        "causal ÷ non-causal (normalized rows)": (3, 2),
        "causal ÷ non-causal (unnormalized rows)": (3, 2),
        "mamba2 ÷ linear_attention": (5, 4),
    }
    assert effects.keys() == expected.keys(), "normalized and unnormalized rows are never pooled for causality"
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
    assert [len(e.pairs) for e in compute_effects(run)] == [e.planned for e in compute_effects(run)] == [4, 2, 2, 4]


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


def add_row(run: RunRecord, variant: VariantDescription, error: float) -> None:
    run.description = run.description.model_copy(update={"variants": (*run.variants, variant)})
    run.cells += [cell_record(variant.name, seed, {64: error * (1 + seed)}) for seed in SEEDS]


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
    assert pairs["mamba2 ÷ linear_attention"] == 4


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


def test_a_claim_without_a_pair_is_not_tested() -> None:
    claim = Claim(statement="order", factor="causality", value="bidirectional", worse=True)
    run = made_up()
    run.description = run.description.model_copy(update={"claims": (claim,)})
    assert [verdict.state for verdict in draw_conclusions(run).verdicts] == ["not tested"]


def identity_row() -> VariantDescription:
    return VariantDescription(
        name="identity",
        label="identity",
        mixer="identity",
        causality="noncausal",
        normalize=True,
        control="no mixing",
    )


def test_a_finding_that_a_control_also_shows_is_called_that() -> None:
    run = made_up()
    claim = Claim(statement="it matters", factor="normalization", value="not normalized", worse=True)
    run.description = run.description.model_copy(update={"claims": (claim,)})
    add_row(run, identity_row(), 0.001)
    effect = by_name(run)["not normalized ÷ normalized"]
    note = control_note(run, effect, control_rows(run))
    assert "“identity”" in note and "this is no effect of mixing" in note
    conclusions = draw_conclusions(run)
    assert conclusions.verdicts[0].state == "holds, and a control shows it too"
    assert any("“identity”, which mixes nothing: 8 of 8 mixers at 64 px" in w for w in conclusions.warnings)


def test_what_a_control_leaves_of_a_finding_is_said() -> None:
    """The better the control, the less: nothing is said, then that the rest is mixing, then that there is none."""
    states = []
    for error in np.geomspace(10, 1e-3, 40):
        run = made_up()
        add_row(run, identity_row(), float(error))
        note = control_note(run, by_name(run)["not normalized ÷ normalized"], control_rows(run))
        states.append(next((n for n, words in enumerate(("at most", "no effect of mixing"), 1) if words in note), 0))
    assert states == sorted(states) and set(states) == {0, 1, 2}


def test_a_control_that_is_worse_explains_nothing() -> None:
    run = made_up()
    add_row(run, identity_row(), 10.0)
    effect = by_name(run)["not normalized ÷ normalized"]
    assert control_note(run, effect, control_rows(run)) == ""
    assert not any("mixes nothing" in warning for warning in draw_conclusions(run).warnings)


def test_errors_beside_the_controls() -> None:
    run = made_up()
    reference = run.variants[0]
    assert excess_error(run, reference, control_rows(run), 64) is None
    add_row(run, identity_row(), 0.04)
    softmax = identity_row().model_copy(update={"name": "softmax_distilled", "mixer": "softmax", "control": "teacher"})
    add_row(run, softmax, 0.004)
    controls = control_rows(run)
    share = share_of_identity(run, reference, controls, 64)
    excess = excess_error(run, reference, controls, 64)
    assert share is not None and share.mean == pytest.approx(0.25)
    assert excess is not None and excess.mean == pytest.approx(0.006 * 2)


@pytest.mark.parametrize("swapped", [False, True])
def test_ranks_are_stable_or_the_report_says_they_are_not(swapped: bool) -> None:
    run = run_of({})
    for steps, factor in ((70, 2.0), (300, 0.5 if swapped else 2.0)):
        plan = DistillationConfig(fit=FitConfig(steps=steps, batch_size=1, learning_rate=1e-3))
        for mixer, error in (("linear_attention", 0.1), ("mamba2", 0.1 * factor)):
            variant = VariantDescription(
                name=f"{mixer}_{steps}",
                label=f"{mixer}, {steps} steps",
                mixer=mixer,
                causality="noncausal",
                normalize=True,
                distillation=plan,
            )
            add_row(run, variant, error)
    (statement,) = describe_rank_stability(run)
    assert ("NOT stable" in statement) is swapped
    assert not swapped or "between 70 steps at 0.001 and 300 steps at 0.001" in statement


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
