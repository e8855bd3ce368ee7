"""The first paragraph: what the numbers say, with intervals and controls; and which of the grid's claims hold."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from experiments.config import Claim
from experiments.core.statistics import interval_over_seeds
from experiments.report.controls import ControlRows, control_note, control_rows, identity_warnings
from experiments.report.effects import SPLITS, Effect, compute_effects, readable
from experiments.report.errors import METRIC, errors_by_seed, mean_error
from experiments.report.formatting import format_number, format_ratio
from experiments.report.rank_stability import describe_rank_stability
from experiments.report.run_files import RunRecord

MOST_SENTENCES = 8
"""Effects that are described in words; the others are in the table of factors."""


@dataclass(frozen=True)
class ClaimVerdict:
    """A claim's state over all sizes, with the numbers in a sentence."""

    statement: str
    state: str
    evidence: str


@dataclass
class Conclusions:
    """Sentences and verdicts computed from the numbers, and what is wrong or uncertain.

    Attributes:
        sentences: the first one answers; each of the others describes another effect.
        verdicts: of the grid's claims.
        effects: of all factors.
        method: how effects are computed.
        warnings: what limits the conclusions.
        broken: why no number can be trusted.
    """

    sentences: list[str] = field(default_factory=list)
    verdicts: list[ClaimVerdict] = field(default_factory=list)
    effects: list[Effect] = field(default_factory=list)
    method: str = ""
    warnings: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)


def draw_conclusions(run: RunRecord) -> Conclusions:
    """Compute which factor matters, by how much, at the largest size measured and at the training size."""
    controls = control_rows(run)
    effects = compute_effects(run)
    warnings = [*_few_seeds(run), *describe_rank_stability(run), *identity_warnings(run, controls)]
    conclusions = Conclusions(effects=effects, broken=check_sanity(run), warnings=warnings)
    sizes = sorted({size for v in run.trained for cell in run.done(v.name) for size in cell.fidelity})
    if not sizes:
        conclusions.warnings = _few_seeds(run)
        conclusions.sentences.append("No trained variant is finished, so there is no conclusion yet.")
        return conclusions
    largest = sorted((e for e in effects if e.size == sizes[-1]), key=_strength, reverse=True)
    best = _describe_best(run, sizes[-1])
    described = [describe_effect(effect, effects, run, controls) for effect in largest]
    if described:
        conclusions.sentences += [f"{_lead(largest[0], run)} {described[0]} {best}", *described[1:MOST_SENTENCES]]
        conclusions.method = _method(effects)
    else:
        conclusions.sentences.append(best)
    if len(described) > MOST_SENTENCES:
        rest = len(described) - MOST_SENTENCES
        effects_are = "effects are" if rest > 1 else "effect is"
        conclusions.sentences.append(f"{rest} smaller {effects_are} in the table of factors.")
    if not conclusions.broken:
        conclusions.verdicts = [_judge(claim, effects, run, controls) for claim in run.description.claims]
    return conclusions


def check_sanity(run: RunRecord) -> list[str]:
    """Check the teacher's own softmax, mounted and not trained: its error must be exactly zero."""
    faults = []
    for variant in run.variants:
        if not variant.untouched:
            continue
        errors = [(c.seed, f.size, f.error_to_teacher) for c in run.done(variant.name) for f in c.fidelity.values()]
        worst = max(errors, key=lambda e: math.inf if math.isnan(e[2]) else e[2], default=None)
        if worst and worst[2] != 0:
            faults.append(
                f"THE MEASUREMENT IS BROKEN. The sanity row “{variant.label}” is the teacher itself, so its error to "
                f"the teacher must be exactly 0; it is {worst[2]:.3g} at {worst[1]} px (seed {worst[0]}). "
                "Do not trust any other number on this page until this is fixed."
            )
    return faults


def describe_effect(effect: Effect, effects: list[Effect], run: RunRecord, controls: ControlRows) -> str:
    """Describe one effect: its size, what it depends on, the training size, and the controls."""
    start = effect.factor.above[0].upper() + effect.factor.above[1:]
    within = f" among {effect.factor.rows} rows" if effect.factor.within else ""
    pairs = f"{len(effect.pairs)} pair{'s' * (len(effect.pairs) > 1)} of rows"
    if len(effect.pairs) < effect.planned:
        pairs = f"incomplete: {len(effect.pairs)} of {effect.planned} pairs of rows are measured"
    elif not effect.complete:
        pairs = f"incomplete: {pairs}, some of which lack seeds"
    sentence = f"{start} rather than {effect.factor.below}{within}: {format_ratio(effect.ratio)} the error ({pairs})"
    at_training = [e for e in effects if e.factor == effect.factor and e.size == run.train_size]
    if at_training and effect.size != run.train_size:
        sentence += f", and {format_ratio(at_training[0].ratio)} at {run.train_size} px, the training resolution"
    if effect.depends:
        sentence += f". This depends on {_describe_parts(effect, run)}"
    elif effect.ratio.has_bounds and not effect.significant:
        sentence += ". This is not distinguishable from noise"
    notes = [] if effect.factor.is_control else control_note(run, effect, controls)
    return " ".join([f"{sentence}.", *notes])


def _lead(strongest: Effect, run: RunRecord) -> str:
    times = strongest.size / max(run.train_sizes)
    size = f"{strongest.size} px" + (f", {times:g} times the training side" if times != 1 else "")
    name = {"mixer": "the mixer"}.get(strongest.factor.name, strongest.factor.name)
    if strongest.depends:
        return f"At {size}, no factor has the same effect on all rows."
    if not strongest.ratio.has_bounds:
        return f"In one seed, {name} matters most for the error to the teacher at {size}."
    if not strongest.significant:
        return f"At {size}, no factor's effect on the error to the teacher is distinguishable from noise."
    return f"{name[0].upper()}{name[1:]} matters most for the error to the teacher at {size}."


def _describe_parts(effect: Effect, run: RunRecord) -> str:
    """Return "the mixer: 2.06× [2.01, 2.10] (LinFusion), …" for the factor that the effect depends on."""
    assert effect.depends
    parts = effect.split_by(effect.depends).items()
    listing = ", ".join(f"{format_ratio(part.ratio)} ({readable(run, value)})" for value, part in parts)
    return f"{SPLITS[effect.depends]}: {listing}"


def _strength(effect: Effect) -> tuple[bool, bool, bool, float]:
    """Mixers before controls, effects that are the same for all rows, then significant ones, then larger ones."""
    ratio = effect.ratio.mean
    size = math.inf if not math.isfinite(ratio) or ratio <= 0 else abs(math.log(ratio))
    return not effect.factor.is_control, effect.depends is None, effect.significant, size


def _method(effects: list[Effect]) -> str:
    compared = sum(effect.ratio.has_bounds for effect in effects)
    method = (
        "An effect is the ratio of the errors to the teacher of rows that differ in nothing else, as a geometric mean "
        "over fixed pairs of rows, training seeds and held-out images. "
    )
    if not compared:
        return method + "A single seed gives no interval: no effect here can be distinguished from noise."
    return method + (
        "Brackets: 95 % t interval for new seeds and new images, each by itself. An effect counts as distinguishable "
        f"from noise if p < 0.05 after Holm's correction for all {compared} effects on this page."
    )


def _describe_best(run: RunRecord, size: int) -> str:
    rows = [(error, v) for v in run.trained if (error := mean_error(run, v, size)) is not None and math.isfinite(error)]
    if not rows:
        return f"No trained row has a finite error at {size} px."
    _, variant = min(rows, key=lambda row: row[0])
    interval = interval_over_seeds(errors_by_seed(run, variant, size))
    bounds = f" [{format_number(interval.low)}, {format_number(interval.high)}]" if interval.has_bounds else ""
    return (
        f"Closest to the teacher at {size} px is “{variant.label}”, whose squared error is "
        f"{format_number(interval.mean)}{bounds} of the teacher's mean square."
    )


def _judge(claim: Claim, effects: list[Effect], run: RunRecord, controls: ControlRows) -> ClaimVerdict:
    tested = [e for e in effects if e.factor.name == claim.factor and claim.value in (e.factor.value, e.factor.above)]
    if claim.factor == "causality":
        tested = [e for e in tested if e.factor.reference == "noncausal"]
    tested = [e for e in tested if not claim.beyond or e.size > max(run.train_sizes)]
    if not tested:
        return ClaimVerdict(claim.statement, "not tested", "No two finished rows of this grid differ in that alone.")
    tests: dict[str, Callable[[Effect], bool]] = {
        "incomplete": lambda e: not e.complete,
        "depends on the other factors": lambda e: e.ratio.has_bounds and e.depends is not None,
        "holds": lambda e: e.significant and (e.ratio.mean > 1) is claim.worse,
        "the reverse holds": lambda e: e.significant,
        "undecided": lambda e: True,
    }
    by_state: dict[str, list[Effect]] = {}
    for effect in tested:
        by_state.setdefault(next(state for state, test in tests.items() if test(effect)), []).append(effect)
    clauses = [
        (f"{state} " if len(by_state) > 1 else "") + f"at {', '.join(map(_describe_size, group))}"
        for state, group in by_state.items()
    ]
    single = not any(effect.ratio.has_bounds for effect in tested)
    state = "undecided: one seed gives no interval" if single else _overall_state(list(by_state))
    depending = [effect for effect in tested if effect.depends]
    if depending:
        clauses.append(f"at {depending[-1].size} px it depends on {_describe_parts(depending[-1], run)}")
    notes = [note for effect in by_state.get("holds", []) for note in control_note(run, effect, controls)]
    evidence = "; ".join(clauses)
    subject = f"error of {tested[0].factor.above} over {tested[0].factor.below}, {METRIC.replace('_', ' ')}"
    sentences = [f"{evidence[0].upper()}{evidence[1:]} — {subject}."]
    if notes and state.startswith("holds"):
        state += ", and a control shows it too"
        sentences.append(notes[-1])
    return ClaimVerdict(claim.statement, state, " ".join(sentences))


def _describe_size(effect: Effect) -> str:
    within = f", {effect.factor.rows} rows" if effect.factor.within else ""
    return f"{effect.size} px{within} ({format_ratio(effect.ratio)})"


def _overall_state(states: list[str]) -> str:
    if len(states) == 1:
        return states[0]
    if "holds" in states:
        return "holds in part"
    return "does not hold" if "the reverse holds" in states else "undecided"


def _few_seeds(run: RunRecord) -> list[str]:
    counts = {variant.label: len(run.done(variant.name)) for variant in run.trained}
    few = {label: count for label, count in counts.items() if count < 3}
    if not few:
        return []
    lowest = min(few.values())
    highest = max(few.values())
    seeds = str(lowest) if lowest == highest else f"{lowest} to {highest}"
    which = "Every variant has" if len(few) == len(counts) else f"{len(few)} of {len(counts)} variants have"
    return [
        f"{which} fewer than three finished seeds ({seeds}): intervals over so few seeds are wide or missing, and "
        "differences without one should not be read as findings."
    ]
