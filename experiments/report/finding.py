"""The first paragraph: what the numbers say about the paper's first finding, and how that is judged."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import product

from experiments.report.records import Run, Variant
from experiments.report.tables import over_seeds

CLAIM = "normalisation keeps a mixer close to the teacher at resolutions never trained on"
CLEAR = 1.25  # a ratio of errors below this is not called a difference


@dataclass
class Finding:
    """Computed sentences; `verdict` is one of shows, does not show, cannot be judged."""

    verdict: str
    sentences: list[str] = field(default_factory=list)
    judged: str = ""
    warnings: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    ratios: dict[str, float] = field(default_factory=dict)


def find(run: Run) -> Finding:
    """Judge the claim at the largest size measured, from geometric means of errors over variants."""
    measured = sorted({s for v in run.variants for c in run.done(v.name) for s in c.fidelity})
    size = measured[-1] if measured else 0
    result = Finding("cannot be judged", broken=sanity(run), warnings=_few_seeds(run))
    groups = {key: _group(run, size, *key) for key in product(("noncausal", "causal"), (True, False))}
    normal, plain = groups["noncausal", True], groups["noncausal", False]
    if size <= run.train_size:
        result.sentences.append(
            f"No finished cell was measured above the training resolution of {run.train_size} px, "
            f"so the claim that {CLAIM} cannot be judged."
        )
        return result
    if not normal or not plain:
        lacking = "normalised" if not normal else "unnormalised"
        result.sentences.append(f"No {lacking} non-causal variant is finished: whether {CLAIM} cannot be judged.")
    else:
        _judge(run, size, normal, plain, result)
    if normal and groups["causal", True]:
        ratio = _mean(groups["causal", True]) / _mean(normal) if _mean(normal) else math.nan
        result.ratios["causal / non-causal, normalised"] = ratio
        result.sentences.append(f"At {size} px, {_causal(ratio)}.")
    if result.broken:
        result.verdict = "cannot be judged"
    return result


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


def _judge(run: Run, size: int, normal: dict[str, float], plain: dict[str, float], result: Finding) -> None:
    ratio = _mean(plain) / _mean(normal) if _mean(normal) else math.nan
    result.ratios["unnormalised / normalised, non-causal"] = ratio
    home_normal, home_plain = (_group(run, run.train_size, "noncausal", n) for n in (True, False))
    home = _mean(home_plain) / _mean(home_normal) if home_normal and home_plain and _mean(home_normal) else math.nan
    apart = min(plain.values()) > max(normal.values())
    if math.isnan(ratio):
        result.verdict = "cannot be judged"
    else:
        result.verdict = "shows" if ratio > CLEAR and apart else "does not show"
    lead = {
        "shows": f"This run shows the paper's first finding, that {CLAIM}.",
        "does not show": f"This run does not show the paper's first finding, that {CLAIM}.",
        "cannot be judged": f"Whether {CLAIM} cannot be judged here.",
    }[result.verdict]
    at_home = f"at the training resolution of {run.train_size} px that factor was "
    at_home += f"{home:.2f}" if math.isfinite(home) else "not measured"
    order = "every unnormalised one is worse than every normalised one" if apart else "the two groups overlap"
    result.sentences += [
        lead,
        f"At {size} px ({size / run.train_size:g}× the training side), the error to the teacher of the unnormalised "
        f"non-causal variants is {_factor(ratio)} that of the normalised ones, and {order}; {at_home}.",
    ]
    if result.verdict == "shows" and math.isfinite(home) and home >= ratio / CLEAR:
        result.sentences.append(
            "The gap is hardly wider than at the training resolution, so the new resolution alone does not explain it."
        )
    result.judged = (
        f"Judged by the relative error to the teacher at {size} px, averaged over seeds, as the ratio of geometric "
        f"means of {len(plain)} unnormalised ({', '.join(plain)}) and {len(normal)} normalised ({', '.join(normal)}) "
        f"non-causal variants. It shows if that ratio exceeds {CLEAR:g} and the two groups do not overlap. "
        "The untouched softmax takes no part."
    )


def _group(run: Run, size: int, causality: str, normalize: bool) -> dict[str, float]:
    """Label -> mean relative error of the variants with these two features; a NaN counts as infinitely bad."""
    found = {}
    for variant in run.variants:
        if variant.untouched or variant.causality != causality or variant.normalize is not normalize:
            continue
        value = over_seeds(run, variant, size, "relative_error_to_teacher")
        if value is not None:
            found[_plain(variant)] = math.inf if math.isnan(value.mean) else value.mean
    return found


def _mean(group: dict[str, float]) -> float:
    if any(v <= 0 for v in group.values()):
        return 0.0
    return math.exp(math.fsum(math.log(v) for v in group.values()) / len(group))


def _plain(variant: Variant) -> str:
    return f"“{variant.label}”"


def _factor(ratio: float) -> str:
    return "beyond measure (not finite)" if not math.isfinite(ratio) else f"{ratio:.2f}×"


def _causal(ratio: float) -> str:
    names = "normalised causal variants' error to the teacher"
    if not math.isfinite(ratio):
        return f"{names} cannot be compared with the normalised non-causal ones'"
    if 1 / CLEAR < ratio < CLEAR:
        return f"{names} is {ratio:.2f}× the normalised non-causal ones': no clear difference"
    verdict = "causality costs fidelity here" if ratio > 1 else "causality does not cost fidelity here"
    return f"{names} is {ratio:.2f}× the normalised non-causal ones': {verdict}"


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
