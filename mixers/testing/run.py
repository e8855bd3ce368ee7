"""Run the checks: on one mixer, or as pytest parameters over every legal configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from mixers.mixer import TokenMixer
from mixers.registry import create_mixer, entry
from mixers.testing.checks import checks_for
from mixers.traits import Causality


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


def check_mixer(name_or_factory: str | Callable[[], TokenMixer], **options: Any) -> list[str]:
    """Run every check that the mixer's traits call for; returns their names.

    Args:
        name_or_factory: a registered name (with `options` as in `create_mixer`), or a function that builds a mixer.

    Raises:
        AssertionError: a promise is broken; the message names the mixer, the check and the smallest failing case.
    """
    if isinstance(name_or_factory, str):
        found = entry(name_or_factory)
        causality = options.pop("causality", found.default_causality)
        normalize = options.pop("normalize", found.default_normalize)
        name_or_factory = Configuration(name_or_factory, causality, normalize, options)
    mixer = name_or_factory().double()
    passed = []
    for check in checks_for(mixer.traits):
        try:
            check(mixer)
        except AssertionError as error:
            raise AssertionError(f"{type(mixer).__name__} fails {check.__name__}: {error}") from error
        passed.append(check.__name__)
    return passed


def parametrize_with_checks(names: Iterable[str]) -> Any:
    """A pytest decorator: one test (mixer, check) per configuration of each named mixer and check it calls for."""
    import pytest

    cases = [
        pytest.param(configuration(), check, id=f"{configuration}-{check.__name__.removeprefix('check_')}")
        for configuration in configurations(names)
        for check in checks_for(configuration().traits)
    ]
    if not cases:
        raise ValueError("No mixer to check: the list of names is empty.")
    return pytest.mark.parametrize(("mixer", "check"), cases)
