"""Run the checks: on one mixer, or as pytest parameters over every legal configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from mixers.mixer import TokenMixer
from mixers.registry import create_mixer, entry
from mixers.testing.checks import CHECKS, checks_for
from mixers.traits import Causality

Factory = Callable[[], TokenMixer]


@dataclass(frozen=True)
class Configuration:
    """A legal way to build a registered mixer; calling it gives a small float64 one that is not at its start."""

    name: str
    causality: Causality
    normalize: bool
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def __call__(self) -> TokenMixer:
        torch.manual_seed(0)
        settings = {**entry(self.name).tiny, **self.options}
        mixer = create_mixer(self.name, 12, 2, causality=self.causality, normalize=self.normalize, **settings).double()
        with torch.no_grad():  # layers that start at zero would hide what they do
            for parameter in mixer.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return mixer

    def __str__(self) -> str:
        return f"{self.name}-{self.causality}-{'normalized' if self.normalize else 'unnormalized'}"


def configurations(names: Iterable[str]) -> list[Configuration]:
    """Every causality × normalisation that each mixer does not refuse."""
    return [
        Configuration(name, causality, normalize)
        for name in names
        for causality in entry(name).causalities
        for normalize in entry(name).normalizations
    ]


def check_mixer(
    name_or_factory: str | Factory, *, exceptions: Mapping[str, str] | None = None, **options: Any
) -> list[str]:
    """Run every check that the mixer's traits call for; returns the names of those that passed.

    Args:
        name_or_factory: a registered name (with `options` as in `create_mixer`), or a function that builds a mixer.
        exceptions: {check: reason} of checks known to fail; one that passes is an error, so the list stays true.

    Raises:
        AssertionError: a promise is broken; the message names the mixer, the check and the smallest failing case.
        ValueError: an exception names no check, or options are given with a function.
    """
    if isinstance(name_or_factory, str):
        found = entry(name_or_factory)
        causality = options.pop("causality", found.default_causality)
        normalize = options.pop("normalize", found.default_normalize)
        name_or_factory = Configuration(name_or_factory, causality, normalize, options)
    elif options:
        raise ValueError(f"Options {', '.join(options)} go with a registered name, not with a function.")
    known = _known(exceptions)
    mixer = name_or_factory().double()
    passed = []
    for check in checks_for(mixer.traits):
        name = check.__name__
        try:
            check(mixer)
        except AssertionError as error:
            if name in known:
                continue
            raise AssertionError(f"{type(mixer).__name__} fails {name}: {error}") from error
        if name in known:
            raise AssertionError(f"{type(mixer).__name__} passes {name}: take it off the exceptions.")
        passed.append(name)
    return passed


def parametrize_with_checks(
    mixers: Iterable[str | Factory], exceptions: Mapping[str, Mapping[str, str]] | None = None
) -> Any:
    """A pytest decorator: one test (mixer, check) per configuration of each mixer and check it calls for.

    Args:
        mixers: registered names, each in every legal configuration, or functions that build a mixer.
        exceptions: {mixer: {check: reason}}, strict expected failures.

    Raises:
        ValueError: there is nothing to check, or an exception names no check.
    """
    import pytest

    cases = []
    for chosen in mixers:
        name = chosen if isinstance(chosen, str) else getattr(chosen, "__name__", type(chosen).__name__)
        known = _known((exceptions or {}).get(name))
        factories = configurations([chosen]) if isinstance(chosen, str) else [chosen]
        for factory in factories:
            label = str(factory) if isinstance(factory, Configuration) else name
            for check in checks_for(factory().traits):
                reason = known.get(check.__name__)
                marks = [pytest.mark.xfail(reason=reason, strict=True)] if reason else []
                short = check.__name__.removeprefix("check_")
                cases.append(pytest.param(factory().double(), check, id=f"{label}-{short}", marks=marks))
    if not cases:
        raise ValueError("No mixer to check: the list of names is empty.")
    return pytest.mark.parametrize(("mixer", "check"), cases)


def _known(exceptions: Mapping[str, str] | None) -> Mapping[str, str]:
    names = {check.__name__ for check, _ in CHECKS}
    for name in exceptions or {}:
        if name not in names:
            raise ValueError(f"The exception {name!r} names no check: expected one of {', '.join(sorted(names))}.")
    return exceptions or {}
