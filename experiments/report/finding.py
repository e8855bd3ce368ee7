"""The first paragraph: what the numbers say, with intervals; and which of the grid's claims hold in them."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from pydantic import ValidationError

from experiments.config import Claim
from experiments.report.effects import METRIC, SPLITS, Effect, effects, reads, seeds_of
from experiments.report.records import Run
from experiments.report.statistics import Interval, bootstrap
from experiments.report.tables import number

TOLD = 8  # effects in words


@dataclass(frozen=True)
class Verdict:
    """A claim's state at every size: holds, the reverse holds, or neither; with the numbers in a sentence."""

    told: str
    state: str
    sentence: str


@dataclass
class Finding:
    """Computed sentences and verdicts, and what is wrong or uncertain.

    Attributes:
        sentences: the first answers; each of the others tells another effect.
    """

    sentences: list[str] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    effects: list[Effect] = field(default_factory=list)
    judged: str = ""
    warnings: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)


def find(run: Run) -> Finding:
    """Which factor matters, by how much, at the largest size measured and at the one trained at."""
    found = Finding(effects=effects(run), broken=sanity(run), warnings=_few_seeds(run))
    sizes = sorted({s for v in run.variants if not v.untouched for c in run.done(v.name) for s in c.fidelity})
    if not sizes:
        found.sentences.append("No trained variant is finished: nothing can be said yet.")
        return found
    largest = sorted((e for e in found.effects if e.size == sizes[-1]), key=_strength, reverse=True)
    best = _best(run, sizes[-1])
    told = [_told(e, found.effects, run) for e in largest]
    found.sentences += [f"{_lead(largest[0], run)} {told[0]} {best}", *told[1:TOLD]] if largest else [best]
    if len(told) > TOLD:
        found.sentences.append(f"{len(told) - TOLD} more, with smaller effects, are in the table of factors.")
    found.judged = _judged(max(e.ratio.seeds for e in largest)) if largest else ""
    found.verdicts = [_judge(claim, found.effects, run) for claim in _claims(run)]
    if found.broken:
        found.verdicts = []
    return found


def sanity(run: Run) -> list[str]:
    """What is wrong with the sanity row, the teacher's own softmax: its error must be exactly zero."""
    wrong = []
    for variant in run.variants:
        if not variant.untouched:
            continue
        errors = [(c.seed, f.size, f.error_to_teacher) for c in run.done(variant.name) for f in c.fidelity.values()]
        worst = max(errors, key=lambda e: math.inf if math.isnan(e[2]) else e[2], default=None)
        if worst and worst[2] != 0:
            wrong.append(
                f"THE MEASUREMENT IS BROKEN. The sanity row “{variant.label}” is the teacher itself, so its error to "
                f"the teacher must be exactly 0; it is {worst[2]:.3g} at {worst[1]} px (seed {worst[0]}). "
                "Trust no other number on this page until this is fixed."
            )
    return wrong


def factor(ratio: Interval) -> str:
    """ "3.1× [2.8, 3.5]"; of one seed without brackets."""
    if not math.isfinite(ratio.mean):
        return "beyond measure (not finite)"
    inside = f" [{number(ratio.low)}, {number(ratio.high)}]" if ratio.seeds > 1 else ""
    return f"{number(ratio.mean)}×{inside}"


def _lead(strongest: Effect, run: Run) -> str:
    times = strongest.size / run.train_size
    size = f"{strongest.size} px" + (f", {times:g} times the training side" if times != 1 else "")
    if strongest.depends:
        return f"At {size}, no factor does the same to all rows."
    if strongest.ratio.seeds < 2:
        return f"In one seed, {_name(strongest)} matters most for the error to the teacher at {size}."
    if not strongest.marked:
        return f"At {size}, no factor's effect on the error to the teacher is to be told from chance."
    return f"{_name(strongest).capitalize()} matters most for the error to the teacher at {size}."


def _name(effect: Effect) -> str:
    return {"mixer": "the mixer"}.get(effect.factor, effect.factor)


def _told(effect: Effect, known: list[Effect], run: Run) -> str:
    """One effect at the largest size, what it depends on, and what it is at the training size."""
    start = effect.above[0].upper() + effect.above[1:]
    sentence = f"{start} rather than {effect.below}: {factor(effect.ratio)} the error"
    sentence += f" ({len(effect.pairs)} pair{'s' * (len(effect.pairs) > 1)} of rows"
    if effect.hopeless:
        sentence += f"; {effect.hopeless} more left out, whose reference is as wrong as a prediction of zeros"
    sentence += ")"
    if effect.depends:
        sentence += f", but it depends on {parts(effect, run)}"
    home = [e for e in known if (e.factor, e.value) == (effect.factor, effect.value) and e.size == run.train_size]
    if home and effect.size != run.train_size:
        sentence += f"; at the training resolution of {run.train_size} px, {factor(home[0].ratio)}"
    if effect.ratio.seeds > 1 and not effect.marked and not effect.depends:
        sentence += "; not to be told from chance"
    return sentence + "."


def parts(effect: Effect, run: Run) -> str:
    """ "the mixer: 2.06× [2.01, 2.10] (LinFusion), …" of what the effect depends on."""
    assert effect.depends
    found = effect.among(effect.depends).items()
    return f"{SPLITS[effect.depends]}: {', '.join(f'{factor(e.ratio)} ({reads(run, v)})' for v, e in found)}"


def _strength(effect: Effect) -> tuple[bool, bool, float]:
    """Those that are the same for all rows first, then those beyond chance, then the larger."""
    ratio = effect.ratio.mean
    size = math.inf if not math.isfinite(ratio) or ratio <= 0 else abs(math.log(ratio))
    return effect.depends is None, effect.marked, size


def _judged(seeds: int) -> str:
    told = (
        "A factor's effect is the ratio of errors to the teacher of rows that differ in nothing else, as a geometric "
        "mean over such pairs, compared seed by seed. Brackets: 95 % bootstrap interval over seeds; a difference is "
        "called one only where it excludes 1."
    )
    if seeds in (2, 3):  # with more, the interval may leave out the seed that disagrees
        told += f" With {seeds} seeds that is where all agree, which chance alone does once in {2 ** (seeds - 1)}."
    return told


def _best(run: Run, size: int) -> str:
    rows = [(bootstrap(list(values.values())), v) for v in run.variants if (values := seeds_of(run, v, size))]
    trained = [(i, v) for i, v in rows if not v.untouched and math.isfinite(i.mean)]
    if not trained:
        return f"No trained row has a finite error at {size} px."
    best, variant = min(trained, key=lambda row: row[0].mean)
    inside = f" [{number(best.low)}, {number(best.high)}]" if best.seeds > 1 else ""
    return f"Nearest to the teacher at {size} px is “{variant.label}”, with an error of {number(best.mean)}{inside}."


def _claims(run: Run) -> list[Claim]:
    """The grid's; one that this version cannot read is left out, as it cannot be judged."""
    found = []
    for row in run.grid.get("claims") or []:
        with suppress(ValidationError):
            found.append(Claim.model_validate(row))
    return found


def _judge(claim: Claim, known: list[Effect], run: Run) -> Verdict:
    judged = [e for e in known if (e.factor, e.value) == (claim.factor, claim.value)]
    judged = [e for e in judged if not claim.beyond or e.size > run.train_size]
    if not judged:
        return Verdict(claim.statement, "not asked", "No two finished rows of this grid differ in that alone.")
    tests: dict[str, Callable[[Effect], bool]] = {
        "depends on the other factors": lambda e: e.ratio.seeds > 1 and e.depends is not None,
        "holds": lambda e: e.marked and (e.ratio.low > 1) is claim.worse,
        "the reverse holds": lambda e: e.marked,
        "undecided": lambda e: True,
    }
    by_state: dict[str, list[Effect]] = {}
    for effect in judged:
        by_state.setdefault(next(state for state, test in tests.items() if test(effect)), []).append(effect)
    told = [
        (f"{state} " if len(by_state) > 1 else "")
        + f"at {', '.join(f'{e.size} px ({factor(e.ratio)})' for e in found)}"
        for state, found in by_state.items()
    ]
    single = all(e.ratio.seeds < 2 for e in judged)
    state = "one seed tells nothing of chance" if single else _state(list(by_state))
    depends = [e for e in judged if e.depends]
    told += [f"at {depends[-1].size} px it depends on {parts(depends[-1], run)}"] if depends else []
    of = f"error of {judged[0].above} over {judged[0].below}, {METRIC.replace('_', ' ')}"
    evidence = "; ".join(told)
    return Verdict(claim.statement, state, f"{evidence[0].upper()}{evidence[1:]} — {of}.")


def _state(states: list[str]) -> str:
    if len(states) == 1:
        return states[0]
    return "holds in part" if "holds" in states else "does not hold" if "the reverse holds" in states else "undecided"


def _few_seeds(run: Run) -> list[str]:
    counts = {v.label: len(run.done(v.name)) for v in run.variants if not v.untouched}
    few = {k: n for k, n in counts.items() if n < 3}
    if not few:
        return []
    lowest, highest = min(few.values()), max(few.values())
    seeds = str(lowest) if lowest == highest else f"{lowest} to {highest}"
    which = "Every variant has" if len(few) == len(counts) else f"{len(few)} of {len(counts)} variants have"
    return [
        f"{which} fewer than three finished seeds ({seeds}): the spread says little about chance, "
        "and small differences should not be read as findings."
    ]
