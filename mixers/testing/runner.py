"""Run the checks: on one mixer, or as pytest parameters over every legal configuration."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from mixers.mixer import TokenMixer
from mixers.registry import create_mixer, get_mixer_entry
from mixers.testing.checks import MIXER_CHECKS, MixerCheck, checks_for
from mixers.traits import Causality

MixerFactory = Callable[[], TokenMixer]
Form = Literal["published", "drop-in"]


@dataclass(frozen=True)
class ConformanceCase:
    """A legal configuration of a registered mixer; calling it builds a small float64 mixer with random parameters.

    Attributes:
        name: of the mixer.
        causality: which tokens a token sees.
        normalize: whether rows sum to one.
        form: `published`, or `drop-in`: the form that starts from a host's projections.
        options: further options of `create_mixer`.
    """

    name: str
    causality: Causality
    normalize: bool
    form: Form = "published"
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def __call__(self) -> TokenMixer:
        torch.manual_seed(0)
        mixer_class = get_mixer_entry(self.name).mixer
        form = mixer_class.drop_in_options if self.form == "drop-in" else {}
        options = {**mixer_class.tiny_options, **form, **self.options}
        mixer = create_mixer(self.name, 12, 2, causality=self.causality, normalize=self.normalize, **options).double()
        with torch.no_grad():  # layers that are initialized to zero would hide their effect
            for parameter in mixer.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return mixer

    def __str__(self) -> str:
        parts = (self.name, self.form, self.causality, "normalized" if self.normalize else "unnormalized")
        return "-".join((*parts, *(f"{key}={value}" for key, value in self.options.items())))

    @property
    def is_default(self) -> bool:
        """Whether it is what `create_mixer` builds by default."""
        entry = get_mixer_entry(self.name)
        switches = (self.causality, self.normalize) == (entry.default_causality, entry.default_normalize)
        return switches and self.form == "published" and not self.options


def conformance_cases(names: Iterable[str]) -> list[ConformanceCase]:
    """Return every legal causality × normalization of these mixers, in their published and in their drop-in form."""
    forms: tuple[Form, ...] = ("published", "drop-in")
    return [
        ConformanceCase(name, causality, normalize, form)
        for name in names
        for form in forms[: 2 if get_mixer_entry(name).mixer.drop_in_options else 1]
        for causality in get_mixer_entry(name).causalities
        for normalize in get_mixer_entry(name).normalizations
    ]


@dataclass(frozen=True)
class CheckOutcome:
    """The outcome of one check.

    Attributes:
        check: its name.
        status: `passed`, `failed`, or `known`: an exception that failed as expected.
        message: why it failed.
        seconds: its duration.
    """

    check: str
    status: Literal["passed", "failed", "known"]
    message: str
    seconds: float


def run_checks(
    mixer: TokenMixer, exceptions: Mapping[str, str] | None = None, checks: Iterable[MixerCheck] | None = None
) -> list[CheckOutcome]:
    """Run every check that the mixer's traits call for, whether or not earlier ones failed.

    Args:
        mixer: in float64, with its own projections.
        exceptions: {check: reason} of checks known to fail, in addition to the mixer's own; if one passes, that is a
            failure, so that the list stays true.
        checks: run these instead of all that apply.
    """
    expected_failures = _check_names({**mixer.exceptions, **(exceptions or {})})
    return [_run_check(check, mixer, expected_failures) for check in (checks_for(mixer) if checks is None else checks)]


def _run_check(check: MixerCheck, mixer: TokenMixer, expected_failures: Mapping[str, str]) -> CheckOutcome:
    start = time.perf_counter()
    message = None
    try:
        check(mixer)
    except AssertionError as error:
        message = str(error)
    except Exception as error:  # a mixer that cannot even run has failed the check
        message = f"{type(error).__name__}: {error}"
    seconds = time.perf_counter() - start
    if message is not None:
        return CheckOutcome(check.name, "known" if check.name in expected_failures else "failed", message, seconds)
    if check.name in expected_failures:
        return CheckOutcome(check.name, "failed", f"passes {check.name}: remove it from the exceptions.", seconds)
    return CheckOutcome(check.name, "passed", "", seconds)


def check_mixer(
    name_or_factory: str | MixerFactory, *, exceptions: Mapping[str, str] | None = None, **options: Any
) -> list[str]:
    """Run every check that the mixer's traits call for; returns the names of those that passed.

    Args:
        name_or_factory: a registered name (with `options` as in `create_mixer`), or a function that builds a mixer.
        exceptions: {check: reason} of checks known to fail; if one passes, that is an error, so the list stays true.
        options: of a registered mixer.

    Raises:
        AssertionError: A promise is broken; the message names the mixer, the checks and the smallest failing cases.
        ValueError: An exception names no check, or options are given with a function.
    """
    if isinstance(name_or_factory, str):
        entry = get_mixer_entry(name_or_factory)
        causality = options.pop("causality", entry.default_causality)
        normalize = options.pop("normalize", entry.default_normalize)
        name_or_factory = ConformanceCase(name_or_factory, causality, normalize, options=options)
    elif options:
        raise ValueError(f"Options {', '.join(options)} go with a registered name, not with a function.")
    mixer = name_or_factory().double()
    outcomes = run_checks(mixer, exceptions)
    failed = [f"{type(mixer).__name__} fails {o.check}: {o.message}" for o in outcomes if o.status == "failed"]
    if failed:
        raise AssertionError("\n".join(failed))
    return [outcome.check for outcome in outcomes if outcome.status == "passed"]


def parametrize_with_checks(
    mixers: Iterable[str | MixerFactory],
    exceptions: Mapping[str, Mapping[str, str]] | None = None,
    deep: bool = False,
) -> Any:
    """Return a pytest decorator: one test (mixer, check) per configuration of each mixer and check it calls for.

    Args:
        mixers: registered names, each in every legal configuration, or functions that build a mixer.
        exceptions: {mixer: {check: reason}}, strict expected failures, in addition to the mixers' own.
        deep: run the checks that take seconds on every configuration, not only on the published one.

    Raises:
        ValueError: There is nothing to check, or an exception names no check.
    """
    import pytest

    cases = []
    for mixer_or_name in mixers:
        is_name = isinstance(mixer_or_name, str)
        name = mixer_or_name if is_name else getattr(mixer_or_name, "__name__", type(mixer_or_name).__name__)
        factories = conformance_cases([mixer_or_name]) if isinstance(mixer_or_name, str) else [mixer_or_name]
        for factory in factories:
            mixer = factory().double()
            expected_failures = _check_names({**mixer.exceptions, **(exceptions or {}).get(str(name), {})})
            label = str(factory) if isinstance(factory, ConformanceCase) else name
            published = not isinstance(factory, ConformanceCase) or factory.is_default
            for check in (c for c in checks_for(mixer) if deep or published or not c.heavy):
                reason = expected_failures.get(check.name)
                marks = [pytest.mark.xfail(reason=reason, strict=True)] if reason else []
                short = check.name.removeprefix("check_")
                cases.append(pytest.param(mixer, check, id=f"{label}-{short}", marks=marks))
    if not cases:
        raise ValueError("No mixer to check: the list of names is empty.")
    return pytest.mark.parametrize(("mixer", "check"), cases)


def _check_names(exceptions: Mapping[str, str]) -> Mapping[str, str]:
    names = {check.name for check in MIXER_CHECKS}
    for name in exceptions:
        if name not in names:
            raise ValueError(f"The exception {name!r} names no check: expected one of {', '.join(sorted(names))}.")
    return exceptions
