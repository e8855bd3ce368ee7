"""The first paragraph: what the numbers say, with intervals; and which of the grid's claims hold in them."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from pydantic import ValidationError

from experiments.config import Claim
from experiments.report.effects import METRIC, Effect, effects, seeds_of
from experiments.report.records import Run
from experiments.report.statistics import Interval, bootstrap
from experiments.report.tables import number


@dataclass(frozen=True)
class Verdict:
    """A claim's state at every size: holds, the reverse holds, or neither; with the numbers in a sentence."""

    told: str
    state: str
    sentence: str


@dataclass
class Finding:
    """Computed sentences and verdicts, and what is wrong or uncertain."""

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
    largest = [e for e in found.effects if e.size == sizes[-1]]
    found.sentences += [_told(e, found.effects, run) for e in sorted(largest, key=_strength, reverse=True)]
    found.sentences.append(_best(run, sizes[-1]))
    found.verdicts = [verdict for claim in _claims(run) if (verdict := _judge(claim, found.effects, run))]
    if largest:
        found.judged = (
            "A factor's effect is the ratio of errors to the teacher of rows that differ in nothing else, as a "
            "geometric mean over such pairs, compared seed by seed. Brackets: 95 % bootstrap interval over seeds; a "
            "difference is called one only where it excludes 1."
        )
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


def _told(effect: Effect, known: list[Effect], run: Run) -> str:
    what = f"{effect.value} rather than {effect.reference}"
    sentence = f"At {effect.size} px{_times(effect.size, run)}, {what}: {factor(effect.ratio)} the error"
    sentence += f" ({len(effect.pairs)} pair{'s' * (len(effect.pairs) > 1)} of rows)"
    home = [e for e in known if (e.factor, e.value) == (effect.factor, effect.value) and e.size == run.train_size]
    if home and effect.size != run.train_size:
        sentence += f"; at the training resolution of {run.train_size} px, {factor(home[0].ratio)}"
    if effect.ratio.seeds > 1 and not effect.marked:
        sentence += "; not to be told from chance"
    return sentence + "."


def _times(size: int, run: Run) -> str:
    return "" if size == run.train_size else f" ({size / run.train_size:g}× the training side)"


def _strength(effect: Effect) -> float:
    ratio = effect.ratio.mean
    return math.inf if not math.isfinite(ratio) or ratio <= 0 else abs(math.log(ratio))


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


def _judge(claim: Claim, known: list[Effect], run: Run) -> Verdict | None:
    """None where the grid has no rows to judge it by."""
    judged = [e for e in known if (e.factor, e.value) == (claim.factor, claim.value)]
    judged = [e for e in judged if not claim.beyond or e.size > run.train_size]
    if not judged:
        return None
    tests: dict[str, Callable[[Effect], bool]] = {
        "holds": lambda e: e.marked and (e.ratio.low > 1) is claim.worse,
        "the reverse holds": lambda e: e.marked and (e.ratio.low > 1) is not claim.worse,
        "undecided": lambda e: not e.marked,
    }
    parts = []
    for state, test in tests.items():
        sizes = [f"{e.size} px ({factor(e.ratio)})" for e in judged if test(e)]
        parts += [f"{state} at {', '.join(sizes)}"] if sizes else []
    single = all(e.ratio.seeds < 2 for e in judged)
    state = (
        "one seed tells nothing of chance" if single else _state([n for n, t in tests.items() if any(map(t, judged))])
    )
    of = f"error of {judged[0].value} over {judged[0].reference}, {METRIC.replace('_', ' ')}"
    return Verdict(claim.told, state, f"{'; '.join(parts)} — {of}.")


def _state(states: list[str]) -> str:
    return states[0] if len(states) == 1 else "holds in part" if "holds" in states else "does not hold"


def _few_seeds(run: Run) -> list[str]:
    counts = {v.label: len(run.done(v.name)) for v in run.variants if not v.untouched}
    few = {k: n for k, n in counts.items() if n < 3}
    if not few:
        return []
    lowest, highest = min(few.values()), max(few.values())
    seeds = str(lowest) if lowest == highest else f"{lowest} to {highest}"
    which = "Every variant" if len(few) == len(counts) else f"{len(few)} of {len(counts)} variants"
    return [
        f"{which} has fewer than three finished seeds ({seeds}): the spread says little about chance, "
        "and small differences should not be read as findings."
    ]
