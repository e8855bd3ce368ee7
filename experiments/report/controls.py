"""Controls: rows that mix nothing, or only average, and what a finding is worth beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from experiments.ablation.description import VariantDescription
from experiments.core.statistics import Interval, interval_over_seeds
from experiments.report.effects import Effect
from experiments.report.errors import errors_by_seed, log_ratios_of, mean_error, pooled_ratio, ratio
from experiments.report.formatting import format_number
from experiments.report.run_files import RunRecord


@dataclass(frozen=True)
class ControlRows:
    """The controls of a run; None if a grid has no such row.

    Attributes:
        identity: W = I, with nothing else.
        distilled_softmax: the teacher's own attention with random projections, trained with the grid's plan.
        no_mixing: every row whose matrix does not depend on the input, with or without a convolution.
    """

    identity: VariantDescription | None
    distilled_softmax: VariantDescription | None
    no_mixing: tuple[VariantDescription, ...]


def control_rows(run: RunRecord) -> ControlRows:
    """Find the controls among a run's rows."""
    rows = [variant for variant in run.trained if variant.control is not None]
    identity = next((variant for variant in rows if variant.control == "no mixing"), None)
    softmax = next((variant for variant in rows if variant.control == "teacher"), None)
    return ControlRows(identity, softmax, tuple(variant for variant in rows if variant.control != "teacher"))


def excess_error(run: RunRecord, variant: VariantDescription, controls: ControlRows, size: int) -> Interval | None:
    """Return a row's error minus that of distilled softmax, over seeds and images; None without that control."""
    if controls.distilled_softmax is None:
        return None
    errors = errors_by_seed(run, variant, size)
    floor = errors_by_seed(run, controls.distilled_softmax, size)
    shared = [seed for seed in errors if seed in floor and errors[seed].shape == floor[seed].shape]
    return interval_over_seeds({seed: errors[seed] - floor[seed] for seed in shared}) if shared else None


def share_of_identity(run: RunRecord, variant: VariantDescription, controls: ControlRows, size: int) -> Interval | None:
    """Return a row's error over that of the identity, which mixes nothing; None without that control."""
    return None if controls.identity is None else ratio(run, variant, controls.identity, size)


def control_note(run: RunRecord, effect: Effect, controls: ControlRows) -> list[str]:
    """Return a sentence that names a control which shows an effect as well; none if no control does.

    An effect is an improvement of one row over another. A control shows it if it improves on the same worse rows at
    least half as much, on a log scale: then mixing tokens is not what the improvement needs. How much it may still need
    is the upper bound of the control's error over that of the better rows, which takes more than one seed.
    """
    log_effect = math.log(effect.ratio.mean) if 0 < effect.ratio.mean < math.inf else 0.0
    if log_effect == 0.0:
        return []
    worse = [pair.above if log_effect > 0 else pair.below for pair in effect.pairs]
    better = [pair.below if log_effect > 0 else pair.above for pair in effect.pairs]
    for control in controls.no_mixing:
        if control in worse or control in better:
            continue
        gain = _ratio_to_rows(run, control, worse, effect.size)
        if 0 < gain.mean <= math.exp(-0.5 * abs(log_effect)) and (gain.excludes(1.0) or not gain.has_bounds):
            rest = _ratio_to_rows(run, control, better, effect.size)
            return [
                f"The control “{control.label}” shows the same without mixing tokens by their content: the worse rows "
                f"have {format_number(1 / gain.mean)}× its error{_describe_share_of_mixing(rest)}."
            ]
    return []


def _describe_share_of_mixing(rest: Interval) -> str:
    """What an effect owes to mixing, by the error of a control over that of the better rows."""
    if not rest.has_bounds:
        return ". How much of the effect is due to mixing cannot be known from one seed"
    if rest.high <= 1:
        return ", so none of the effect is due to mixing"
    return f", so mixing accounts for at most {format_number(rest.high)}×"


def identity_warnings(run: RunRecord, controls: ControlRows) -> list[str]:
    """List what the controls say about the whole grid: that they are missing, or where mixing nothing is as good."""
    if controls.identity is None:
        return [
            "This grid has no identity row, which mixes nothing: it cannot show that the differences between its "
            "rows come from mixing tokens."
        ]
    rows = [variant for variant in run.trained if variant.control is None]
    counts = []
    for size in run.sizes:
        identity = mean_error(run, controls.identity, size)
        errors = [error for variant in rows if (error := mean_error(run, variant, size)) is not None]
        beaten = sum(not error < identity for error in errors) if identity is not None else 0
        if beaten:
            counts.append(f"{beaten} of {len(errors)} mixers at {size} px")
    if not counts:
        return []
    return [
        f"Some mixers are no closer to the teacher than “{controls.identity.label}”, which mixes nothing: "
        f"{', '.join(counts)}. What distinguishes such rows from each other is not how they mix."
    ]


def _ratio_to_rows(
    run: RunRecord, control: VariantDescription, rows: Sequence[VariantDescription], size: int
) -> Interval:
    """The error of a control over that of rows, as a geometric mean over rows, seeds and images."""
    return pooled_ratio([log_ratios_of(run, control, row, size) for row in rows])
