"""What controls leave of an effect, and whether ranks are stable: identities on made-up runs."""

import math
from collections.abc import Sequence

import numpy as np
import pytest

from experiments.ablation.description import VariantDescription
from experiments.config import Claim, DistillationConfig, FitConfig
from experiments.report.conclusions import draw_conclusions
from experiments.report.controls import control_note, control_rows, excess_error, share_of_identity
from experiments.report.effects import compute_effects
from experiments.report.rank_stability import describe_rank_stability
from experiments.report.run_files import RunRecord
from tests.experiments.runs import add_row, by_name, cell_record, made_up, run_of


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
    note = " ".join(control_note(run, effect, control_rows(run)))
    assert "“identity”" in note and "none of the effect is due to mixing" in note
    conclusions = draw_conclusions(run)
    assert conclusions.verdicts[0].state == "holds, and a control shows it too"
    assert any("“identity”, which mixes nothing: 8 of 8 mixers at 64 px" in w for w in conclusions.warnings)


def test_what_a_control_leaves_of_a_finding_is_said() -> None:
    """The better the control, the less: nothing is said, then that the rest is mixing, then that there is none."""
    states = []
    for error in np.geomspace(10, 1e-3, 40):
        run = made_up()
        add_row(run, identity_row(), float(error))
        note = " ".join(control_note(run, by_name(run)["not normalized ÷ normalized"], control_rows(run)))
        states.append(next((n for n, words in enumerate(("at most", "none of the effect"), 1) if words in note), 0))
    assert states == sorted(states) and set(states) == {0, 1, 2}


def test_an_exploding_row_does_not_make_a_control_explain_a_mixer() -> None:
    """The identity is worse than every normalized row, however bad the unnormalized ones are."""
    run = made_up()
    for cell in run.cells:
        if cell.variant == "mamba2_noncausal_unnormalized":
            cell.result = cell_record(cell.variant, cell.seed or 0, {64: 1e9}).result
            cell.__dict__.pop("fidelity", None)
    add_row(run, identity_row(), 1.0)
    notes = {effect.name: " ".join(control_note(run, effect, control_rows(run))) for effect in compute_effects(run)}
    assert not notes["mamba2 ÷ linear_attention (normalized rows)"]
    assert "“identity”" in notes["mamba2 ÷ linear_attention (unnormalized rows)"]
    assert not any("none of the effect is due to mixing" in note for note in notes.values())


def test_one_seed_cannot_tell_what_is_an_effect_of_mixing() -> None:
    run = made_up()
    add_row(run, identity_row(), 0.001)
    run.cells = [cell for cell in run.cells if cell.seed == 0]
    note = " ".join(control_note(run, by_name(run)["not normalized ÷ normalized"], control_rows(run)))
    assert "“identity”" in note and "cannot be known from one seed" in note and "none of the effect" not in note


@pytest.mark.parametrize("noise", [0.0, 0.3, 3.0])
def test_a_control_shows_an_effect_only_beyond_its_interval(noise: float) -> None:
    """Between the seeds of a noisy control nothing is known of mixing, however good its mean is."""
    run = made_up()
    run.description = run.description.model_copy(update={"variants": (*run.variants, identity_row())})
    for seed, sign in enumerate((-1, 0, 1)):
        errors = {64: 0.03 * (1 + seed) * math.exp(noise * sign)}
        run.cells.append(cell_record("identity", seed, errors))
    note = " ".join(control_note(run, by_name(run)["not normalized ÷ normalized"], control_rows(run)))
    expected = {0.0: "none of the effect is due to mixing", 0.3: "mixing accounts for at most", 3.0: ""}[noise]
    assert expected in note and bool(note) is bool(expected)


def test_a_control_that_is_worse_explains_nothing() -> None:
    run = made_up()
    add_row(run, identity_row(), 10.0)
    effect = by_name(run)["not normalized ÷ normalized"]
    assert control_note(run, effect, control_rows(run)) == []
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


def two_settings(before: Sequence[float], after: Sequence[float]) -> RunRecord:
    """Rows with these errors, trained for 70 and for 300 steps."""
    run = run_of({})
    for steps, errors in ((70, before), (300, after)):
        plan = DistillationConfig(fit=FitConfig(steps=steps, batch_size=1, learning_rate=1e-3))
        for number, error in enumerate(errors):
            variant = VariantDescription(
                name=f"mixer{number}_{steps}",
                label=f"mixer{number}, {steps} steps",
                mixer=f"mixer{number}",
                causality="noncausal",
                normalize=True,
                distillation=plan,
            )
            add_row(run, variant, error)
    return run


@pytest.mark.parametrize("swapped", [False, True])
def test_ranks_are_stable_or_the_report_says_they_are_not(swapped: bool) -> None:
    (statement,) = describe_rank_stability(two_settings((0.1, 0.2), (0.1, 0.05 if swapped else 0.2)))
    assert ("NOT stable" in statement) is swapped
    assert swapped or "are stable" in statement
    assert not swapped or "between 70 steps at 0.001 and 300 steps at 0.001" in statement


@pytest.mark.parametrize("after", [(0.1, 0.2), (0.2, 0.1)])
def test_one_seed_leaves_it_undecided_whether_ranks_are_stable(after: tuple[float, float]) -> None:
    run = two_settings((0.1, 0.2), after)
    run.cells = [cell for cell in run.cells if cell.seed == 0]
    (statement,) = describe_rank_stability(run)
    assert "undecided" in statement and "single seed" in statement and "are stable at" in statement
    assert not statement.startswith("The ranks")


def test_ranks_that_change_within_their_intervals_are_undecided() -> None:
    run = two_settings((0.1, 0.101, 0.102), (0.102, 0.101, 0.1))
    random = np.random.default_rng(0)
    for cell in run.cells:
        error = cell.fidelity[64].relative_error_to_teacher * math.exp(0.5 * random.normal())
        cell.result = cell_record(cell.variant, cell.seed or 0, {64: error}).result
        cell.__dict__.pop("fidelity", None)
    (statement,) = describe_rank_stability(run)
    assert "undecided" in statement
