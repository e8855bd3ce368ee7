"""The registry: `@register_mixer("name")` on a mixer class is all that adding one takes."""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from mixers import suggest
from mixers.traits import CAUSALITIES, Causality, Traits

if TYPE_CHECKING:
    from mixers.mixer import TokenMixer

_Mixer = TypeVar("_Mixer", bound="type[TokenMixer]")


@dataclass(frozen=True)
class MixerEntry:
    """A registered mixer: its class, its published defaults, and what it can be asked for."""

    name: str
    mixer: type[TokenMixer]
    causalities: tuple[Causality, ...]
    normalizations: tuple[bool, ...]
    unsupported: Mapping[str, str] = field(default_factory=dict)

    @property
    def config(self) -> Any:
        """The mixer's frozen configuration class."""
        return self.mixer.Config

    @property
    def default_causality(self) -> Causality:
        """The causality the mixer was published with."""
        return self.config().causality

    @property
    def default_normalize(self) -> bool:
        """Whether the mixer was published normalized."""
        return self.config().normalize

    @property
    def summary(self) -> str:
        """The first line of the mixer's docstring."""
        return (self.mixer.__doc__ or "").strip().partition("\n")[0]

    @property
    def trait_summary(self) -> str:
        """The traits of the published form that a reader looks for, as words."""
        traits = create_mixer(self.name, 8, 2, **self.tiny_options).traits
        words = {
            "positive": traits.positive,
            "permutation-equivariant": traits.permutation_equivariant,
            "quadratic": not traits.linear,
        }
        words |= {"needs grid": traits.needs_grid}
        return ", ".join(word for word, holds in words.items() if holds)

    @property
    def tiny_options(self) -> dict[str, Any]:
        """Options that make it small, for tests."""
        return dict(self.mixer.tiny_options)


_ENTRIES: dict[str, MixerEntry] = {}


def register_mixer(
    name: str,
    *,
    causalities: tuple[Causality, ...] = CAUSALITIES,
    normalizations: tuple[bool, ...] = (True, False),
    unsupported: Mapping[str, str] | None = None,
) -> Callable[[_Mixer], _Mixer]:
    """Class decorator that adds a `TokenMixer` to the registry under `name`.

    Args:
        name: lower case, unique.
        causalities: those that have a meaning for it.
        normalizations: likewise for `normalize`.
        unsupported: why a value that is left out is refused, e.g. `{"bidirectional": "softmax has no order"}`.

    Raises:
        ValueError: the name is taken, or the class is no `TokenMixer`.
    """

    def register(mixer: _Mixer) -> _Mixer:
        from mixers.mixer import TokenMixer

        if not (isinstance(mixer, type) and issubclass(mixer, TokenMixer)):
            raise ValueError(f"Cannot register {mixer!r} as {name!r}: expected a subclass of mixers.TokenMixer.")
        taken = _ENTRIES.get(name)
        if taken is not None and _place(taken.mixer) != _place(mixer):
            raise ValueError(f"Cannot register {mixer.__name__} as {name!r}: {_place(taken.mixer)} has that name.")
        _ENTRIES[name] = MixerEntry(name, mixer, causalities, normalizations, unsupported or {})
        return mixer

    return register


def _place(mixer: type[TokenMixer]) -> str:
    return f"{mixer.__module__}.{mixer.__qualname__}"


@cache
def _discover() -> None:
    from mixers import zoo

    zoo.load()
    for plugin in entry_points(group="mixers"):
        try:
            plugin.load()
        except Exception as error:  # one broken package must not take the others away
            warnings.warn(
                f"The installed plug-in {plugin.name!r} ({plugin.value}) does not load, so its mixers are missing: "
                f"{type(error).__name__}: {error}",
                stacklevel=2,
            )


def load_plugin(path: str | Path) -> list[str]:
    """Run a .py file that registers mixers; returns their names.

    Raises:
        ValueError: there is no such file, it does not run, or it registers nothing.
    """
    _discover()
    before = set(_ENTRIES)
    module = import_plugin(path).__name__
    added = sorted({*names_from(module), *(set(_ENTRIES) - before)})
    if not added:
        raise ValueError(f"The plug-in {path} registers no mixer: decorate a TokenMixer with @register_mixer(name).")
    return added


def import_plugin(path: str | Path) -> ModuleType:
    """Run a .py file as a module, whatever it registers.

    Raises:
        ValueError: there is no such file, or it does not run.
    """
    _discover()
    path = Path(path)
    # Named by the file's full path: json.py must not replace that module, nor a/mine.py replace b/mine.py.
    name = f"mixers_plugin_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path) if path.is_file() else None
    if spec is None or spec.loader is None:
        raise ValueError(f"Cannot load the plug-in {path}: expected a .py file that registers mixers.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"Cannot load the plug-in {path}: {type(error).__name__}: {error}") from error
    return module


def names_from(module: str) -> list[str]:
    """Return the names of the mixers that the named module defines."""
    return sorted(name for name, found in _ENTRIES.items() if found.mixer.__module__ == module)


def get_mixer_entry(name: str) -> MixerEntry:
    """Look a mixer up.

    Raises:
        ValueError: no such mixer; the message names the nearest one.
    """
    _discover()
    if name not in _ENTRIES:
        raise ValueError(
            f"Unknown mixer {name!r}: expected one of {', '.join(sorted(_ENTRIES))}.{suggest.hint(name, _ENTRIES)}"
        )
    return _ENTRIES[name]


def list_mixers(pattern: str = "*", **traits: Any) -> list[str]:
    """Names that match a wildcard pattern and whose default configuration has these traits.

    Example: `list_mixers("lin*", normalized=True)`.

    Raises:
        ValueError: no such trait; the message names the nearest one.
    """
    _discover()
    known = {f.name for f in dataclasses.fields(Traits)}
    for trait in traits:
        if trait not in known:
            raise ValueError(
                f"Unknown trait {trait!r}: expected one of {', '.join(sorted(known))}.{suggest.hint(trait, known)}"
            )
    names = sorted(fnmatch.filter(_ENTRIES, pattern))
    return [n for n in names if not traits or _has(n, traits)]


def _has(name: str, traits: Mapping[str, Any]) -> bool:
    promised = create_mixer(name, 8, 2, **get_mixer_entry(name).tiny_options).traits
    return all(getattr(promised, key) == value for key, value in traits.items())


def create_mixer(
    name: str,
    dim: int,
    heads: int,
    *,
    causality: Causality | None = None,
    normalize: bool | None = None,
    own_projections: bool = True,
    **options: Any,
) -> TokenMixer:
    """Build a mixer.

    Args:
        name: as in `list_mixers()`.
        dim: model width d.
        heads: number of heads; must divide `dim`.
        causality: None for the mixer's published default.
        normalize: None for the mixer's published default.
        own_projections: give it to_q, to_k, to_v and to_out of its own; else the forward is handed a host's, and
            options that are not given are those of the mixer's drop-in form, which starts from the host's weights.
        options: the other fields of the mixer's configuration.

    Raises:
        ValueError: unknown mixer or option, a combination that has no meaning, or heads that do not divide dim.
    """
    found = get_mixer_entry(name)
    causality = found.default_causality if causality is None else causality
    normalize = found.default_normalize if normalize is None else normalize
    for what, value, allowed in (
        ("causality", causality, found.causalities),
        ("normalize", normalize, found.normalizations),
    ):
        if value not in allowed:
            reason = found.unsupported.get(str(value), "it has no meaning there")
            raise ValueError(
                f"{name} refuses {what}={value!r}: {reason}. Expected one of {', '.join(map(str, allowed))}."
            )
    known = {f.name for f in dataclasses.fields(found.config)} - {"causality", "normalize"}
    for option in options:
        if option not in known:
            expected = ", ".join(sorted(known)) or "none"
            raise ValueError(
                f"{name} has no option {option!r}: expected one of {expected}.{suggest.hint(option, known)}"
            )
    if heads <= 0 or dim % heads:
        raise ValueError(f"Cannot build {name}: heads={heads} does not divide dim={dim}.")
    options = options if own_projections else {**found.mixer.drop_in_options, **options}
    config = found.config(causality=causality, normalize=normalize, **options)
    return found.mixer(config, dim, heads, own_projections=own_projections)


def mixer_from_state_dict(name: str, state: Mapping[str, Tensor], **options: Any) -> TokenMixer:
    """Build a mixer from the state dict of the paper's block as `transformers`, `mamba_ssm` or `fla` save it.

    Args:
        name: of a mixer that has a loader (`TokenMixer.convert_state_dict`).
        state: the block's tensors, by their published names; floating dtypes are kept.
        options: those of the configuration that shapes do not tell; also `heads` where a mixer asks for it.

    Raises:
        ValueError: the mixer has no loader, or a tensor is missing, left over or of another shape; each is named.
    """
    found = get_mixer_entry(name)
    read = found.mixer.convert_state_dict(state, options)
    mixer = create_mixer(name, read.dim, read.heads, **read.options)
    wanted = mixer.state_dict()
    faults = [f"{n} is missing" for n in wanted if n not in read.state]
    faults += [f"{n} is left over" for n in read.state if n not in wanted]
    faults += [
        f"{n} is {tuple(t.shape)}, expected {tuple(wanted[n].shape)}"
        for n, t in read.state.items()
        if n in wanted and t.shape != wanted[n].shape
    ]
    if faults:
        raise ValueError(f"Cannot load {name} from this state dict: {'; '.join(faults)}.")
    mixer.to(next(iter(read.state.values())).dtype).load_state_dict(read.state)
    return mixer
