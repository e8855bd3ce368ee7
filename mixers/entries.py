"""Registration: `@register_mixer("name")` on a mixer class is all that adding one takes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from mixers.config import MixerConfig
from mixers.mixer import TokenMixer
from mixers.traits import CAUSALITIES, Causality, Traits

MixerClass = TypeVar("MixerClass", bound=type[TokenMixer])

UNBOUNDED_SUMS = "exp(q·k) is unbounded, so its sums overflow without the division"
"""Why a mixer with softmax cannot be unnormalized."""


@dataclass(frozen=True)
class MixerEntry:
    """A registered mixer: its class, and the values that it supports.

    Attributes:
        name: its name in the registry.
        mixer: its class.
        causalities: supported values of `causality`.
        normalizations: supported values of `normalize`.
        unsupported: {value: reason} for the values that are not supported, such as {"noncausal": "…"}.
    """

    name: str
    mixer: type[TokenMixer]
    causalities: tuple[Causality, ...]
    normalizations: tuple[bool, ...]
    unsupported: Mapping[str, str] = field(default_factory=dict)

    @property
    def config(self) -> type[MixerConfig]:
        """The mixer's configuration class."""
        return self.mixer.Config

    @property
    def default_causality(self) -> Causality:
        """The causality of the paper."""
        return self.config().causality

    @property
    def default_normalize(self) -> bool:
        """Whether the paper normalizes."""
        return self.config().normalize

    @property
    def summary(self) -> str:
        """The first line of the mixer's docstring."""
        return (self.mixer.__doc__ or "").strip().partition("\n")[0]

    @property
    def deviations(self) -> str:
        """What differs from the paper's block, from the paragraph "Deviations from the published block: …"."""
        match = re.search(
            r"Deviations from the published block: (.*?)(?:\n\s*\n|\Z)", self.mixer.__doc__ or "", re.DOTALL
        )
        return " ".join(match[1].split()) if match else ""

    @property
    def default_traits(self) -> Traits:
        """The traits of the mixer with the paper's options."""
        return self.mixer(self.config(**self.mixer.tiny_options), 8, 2).traits

    @property
    def trait_summary(self) -> str:
        """The traits by which a reader chooses a mixer, for the paper's options, as comma-separated words."""
        traits = self.default_traits
        words = {
            "positive": traits.positive,
            "equivariant": traits.permutation_equivariant,
            "quadratic": not traits.linear,
            "needs grid": traits.needs_grid,
        }
        return ", ".join(word for word, holds in words.items() if holds)


ENTRIES: dict[str, MixerEntry] = {}
"""The registered mixers by name; `mixers.registry` fills it and is the way to read it."""


def register_mixer(
    name: str,
    *,
    causalities: tuple[Causality, ...] = CAUSALITIES,
    normalizations: tuple[bool, ...] = (True, False),
    unsupported: Mapping[str, str] | None = None,
) -> Callable[[MixerClass], MixerClass]:
    """Class decorator that adds a `TokenMixer` to the registry.

    Args:
        name: lower case, unique.
        causalities: supported values of `causality`.
        normalizations: supported values of `normalize`.
        unsupported: {value: reason} for the values left out, such as `{"bidirectional": "softmax has no order"}`;
            `create_mixer` reports the reason.

    Raises:
        ValueError: Another class has the name, or the decorated object is not a subclass of `TokenMixer`.
    """

    def register(mixer: MixerClass) -> MixerClass:
        if not (isinstance(mixer, type) and issubclass(mixer, TokenMixer)):
            raise ValueError(f"Cannot register {mixer!r} as {name!r}: expected a subclass of mixers.TokenMixer.")
        other = ENTRIES.get(name)
        if other is not None and _full_name(other.mixer) != _full_name(mixer):
            raise ValueError(
                f"Cannot register {_full_name(mixer)} as {name!r}: {_full_name(other.mixer)} already has that name."
            )
        ENTRIES[name] = MixerEntry(name, mixer, causalities, normalizations, unsupported or {})
        return mixer

    return register


def _full_name(mixer: type[TokenMixer]) -> str:
    return f"{mixer.__module__}.{mixer.__qualname__}"
