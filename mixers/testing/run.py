"""Run the checks: on one mixer, or as pytest parameters over every legal configuration."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from mixers.mixer import TokenMixer
from mixers.registry import create_mixer, get_mixer_entry
from mixers.testing.checks import CHECKS, Check, checks_for
from mixers.traits import Causality

Factory = Callable[[], TokenMixer]


@dataclass(frozen=True)
class Configuration:
    """A legal way to build a registered mixer; calling it gives a small float64 one that is not at its start.

    Attributes:
        form: `published`, or `drop-in`: the form that starts from a host's projections.
    """

    name: str
    causality: Causality
    normalize: bool
    form: Literal["published", "drop-in"] = "published"
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def __call__(self) -> TokenMixer:
        torch.manual_seed(0)
        found = get_mixer_entry(self.name)
        form = found.mixer.drop_in_options if self.form == "drop-in" else {}
        settings = {**found.mixer.tiny_options, **form, **self.options}
        mixer = create_mixer(self.name, 12, 2, causality=self.causality, normalize=self.normalize, **settings).double()
        with torch.no_grad():  # layers that start at zero would hide what they do
            for parameter in mixer.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return mixer

    def __str__(self) -> str:
        parts = (self.name, self.form, self.causality, "normalized" if self.normalize else "unnormalized")
        return "-".join((*parts, *(f"{key}={value}" for key, value in self.options.items())))

    @property
    def is_default(self) -> bool:
        """Whether it is what `create_mixer` gives by default."""
        found = get_mixer_entry(self.name)
        switches = (self.causality, self.normalize) == (found.default_causality, found.default_normalize)
        return switches and self.form == "published" and not self.options


def configurations(names: Iterable[str]) -> list[Configuration]:
    """Every causality × normalization that each mixer does not refuse, in its published and in its drop-in form."""
    forms: tuple[Literal["published", "drop-in"], ...] = ("published", "drop-in")
    return [
        Configuration(name, causality, normalize, form)
        for name in names
        for form in forms[: 2 if get_mixer_entry(name).mixer.drop_in_options else 1]
        for causality in get_mixer_entry(name).causalities
        for normalize in get_mixer_entry(name).normalizations
    ]


@dataclass(frozen=True)
class Outcome:
    """What became of one check.

    Attributes:
        status: `passed`, `failed`, or `known`: an exception that failed as foretold.
        message: why it failed.
        seconds: it took.
    """

    check: str
    status: Literal["passed", "failed", "known"]
    message: str
    seconds: float


def run_checks(
    mixer: TokenMixer, exceptions: Mapping[str, str] | None = None, checks: Iterable[Check] | None = None
) -> list[Outcome]:
    """Every check that the mixer's traits call for, whether or not those before it failed.

    Args:
        mixer: in float64, with projections of its own.
        exceptions: {check: reason} of checks known to fail, besides the mixer's own; one that passes has failed, so
            that the list stays true.
        checks: these instead of all that apply.
    """
    known = _known({**mixer.exceptions, **(exceptions or {})})
    outcomes = []
    for check in checks_for(mixer) if checks is None else checks:
        start, message = time.perf_counter(), None
        try:
            check(mixer)
        except AssertionError as error:
            message = str(error)
        except Exception as error:  # a mixer that cannot even run has failed the check
            message = f"{type(error).__name__}: {error}"
        seconds = time.perf_counter() - start
        if check.name in known and message is None:
            message = f"passes {check.name}: take it off the exceptions."
            outcomes.append(Outcome(check.name, "failed", message, seconds))
        elif message is None:
            outcomes.append(Outcome(check.name, "passed", "", seconds))
        else:
            outcomes.append(Outcome(check.name, "known" if check.name in known else "failed", message, seconds))
    return outcomes


def check_mixer(
    name_or_factory: str | Factory, *, exceptions: Mapping[str, str] | None = None, **options: Any
) -> list[str]:
    """Run every check that the mixer's traits call for; returns the names of those that passed.

    Args:
        name_or_factory: a registered name (with `options` as in `create_mixer`), or a function that builds a mixer.
        exceptions: {check: reason} of checks known to fail; one that passes is an error, so the list stays true.

    Raises:
        AssertionError: a promise is broken; the message names the mixer, the checks and the smallest failing cases.
        ValueError: an exception names no check, or options are given with a function.
    """
    if isinstance(name_or_factory, str):
        found = get_mixer_entry(name_or_factory)
        causality = options.pop("causality", found.default_causality)
        normalize = options.pop("normalize", found.default_normalize)
        name_or_factory = Configuration(name_or_factory, causality, normalize, options=options)
    elif options:
        raise ValueError(f"Options {', '.join(options)} go with a registered name, not with a function.")
    mixer = name_or_factory().double()
    outcomes = run_checks(mixer, exceptions)
    failed = [f"{type(mixer).__name__} fails {o.check}: {o.message}" for o in outcomes if o.status == "failed"]
    if failed:
        raise AssertionError("\n".join(failed))
    return [outcome.check for outcome in outcomes if outcome.status == "passed"]


def parametrize_with_checks(
    mixers: Iterable[str | Factory],
    exceptions: Mapping[str, Mapping[str, str]] | None = None,
    deep: bool = False,
) -> Any:
    """A pytest decorator: one test (mixer, check) per configuration of each mixer and check it calls for.

    Args:
        mixers: registered names, each in every legal configuration, or functions that build a mixer.
        exceptions: {mixer: {check: reason}}, strict expected failures, besides those that a mixer tells itself.
        deep: run the checks that take seconds on every configuration, not on the published one alone.

    Raises:
        ValueError: there is nothing to check, or an exception names no check.
    """
    import pytest

    cases = []
    for chosen in mixers:
        name = chosen if isinstance(chosen, str) else getattr(chosen, "__name__", type(chosen).__name__)
        factories = configurations([chosen]) if isinstance(chosen, str) else [chosen]
        for factory in factories:
            mixer = factory().double()
            known = _known({**mixer.exceptions, **(exceptions or {}).get(name, {})})
            label = str(factory) if isinstance(factory, Configuration) else name
            published = not isinstance(factory, Configuration) or factory.is_default
            for check in (c for c in checks_for(mixer) if deep or published or not c.heavy):
                reason = known.get(check.name)
                marks = [pytest.mark.xfail(reason=reason, strict=True)] if reason else []
                short = check.name.removeprefix("check_")
                cases.append(pytest.param(mixer, check, id=f"{label}-{short}", marks=marks))
    if not cases:
        raise ValueError("No mixer to check: the list of names is empty.")
    return pytest.mark.parametrize(("mixer", "check"), cases)


def _known(exceptions: Mapping[str, str]) -> Mapping[str, str]:
    names = {check.name for check in CHECKS}
    for name in exceptions:
        if name not in names:
            raise ValueError(f"The exception {name!r} names no check: expected one of {', '.join(sorted(names))}.")
    return exceptions


__all__ = [
    "Check",
    "Configuration",
    "Outcome",
    "check_mixer",
    "configurations",
    "parametrize_with_checks",
    "run_checks",
]
