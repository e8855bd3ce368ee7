"""The `Host` protocol and its registry: what the rest of the package may know about a model's architecture."""

from __future__ import annotations

import importlib
import pkgutil
from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, TypeVar

from torch import nn
from torch.utils.hooks import RemovableHandle

from unet_adapters.hosts.calls import DenoiserCalls
from unet_adapters.mounted_layer import GridSize, MountedLayer
from unet_adapters.sites import Select, Site, select_sites

Fingerprint = dict[str, dict[str, int]]


@dataclass(frozen=True)
class TextSource:
    """The module whose call shows how many tokens of a site's sequence are text.

    Attributes:
        module_name: its name in the model.
        measure: (positional arguments, keyword arguments) of its forward -> the number of text tokens.
    """

    module_name: str
    measure: Callable[[tuple[Any, ...], dict[str, Any]], int]


@dataclass(frozen=True)
class GridSource:
    """The module whose call shows how large the image is that a site's tokens are.

    Attributes:
        module_name: its name in the model.
        measure: (positional arguments, keyword arguments) of its forward -> the site's grid, or None.
    """

    module_name: str
    measure: Callable[[tuple[Any, ...], dict[str, Any]], GridSize | None]


class Host(DenoiserCalls):
    """One architecture family, bound to one model.

    Subclasses are registered with `@register_host("name")`, in a file of `hosts/` or in a package of your own.

    What a call of the model takes and returns is in `DenoiserCalls`.
    """

    name: ClassVar[str] = ""

    @classmethod
    @abstractmethod
    def matches(cls, model: nn.Module) -> bool:
        """Whether this class knows the architecture of `model`."""

    @abstractmethod
    def sites(self) -> list[Site]:
        """Every site of the model, mounted or not, in `named_modules` order; the list may be empty."""

    def select_sites(self, select: Select = "all") -> list[Site]:
        """The sites that `select` matches; see `sites.select_sites`."""
        return select_sites(self.sites(), select)

    def fingerprint(self) -> Fingerprint:
        """Dim and heads of every site by name: what an adapter must fit."""
        return {site.name: {"dim": site.dim, "heads": site.heads} for site in self.sites()}

    @abstractmethod
    def mounted_class(self, layer: nn.Module) -> type[MountedLayer] | None:
        """The class that this attention layer gets while a mixer is mounted in it; None if there is none."""

    @abstractmethod
    def check_layer(self, site: Site, layer: Any) -> None:
        """Refuse a stock layer whose function a mixer cannot replace.

        Raises:
            ValueError: the reason, and what to do.
        """

    @abstractmethod
    def attach_grid(self, layers: Iterable[nn.Module]) -> list[RemovableHandle]:
        """Hook the model so that these attention layers are called with `mixer_grid=(height, width)`.

        The size travels with the arguments of each call and is stored nowhere, so that gradient checkpointing, which
        calls a block again, passes it again, and threads may share the model. `remove` the handles to undo it.
        """

    @abstractmethod
    def grid_source(self, site_name: str) -> GridSource | None:
        """Where the grid of a site's tokens can be read; None if the model does not show it."""

    def attach_text_lengths(self, layers: Iterable[nn.Module]) -> list[RemovableHandle]:
        """Hook the model so that these layers learn how many tokens of their sequence are text, where there are such.

        They are called with `mixer_text_tokens`; as for `attach_grid`, the number travels with each call.
        """
        return []

    def text_source(self, site_name: str) -> TextSource | None:
        """Where the number of text tokens in a site's sequence can be read; None if it gets image tokens alone."""
        return None

    @abstractmethod
    def tokens_at(self, site: Site, size: tuple[int, int]) -> int | None:
        """Tokens of a site for latents of this (height, width); None if it cannot be computed."""


# Known architectures without a host, and why.
_JOINT = "it has joint attention over image and text tokens in a form that has no host yet"
_FUSED = "its blocks fuse the projections of attention and MLP into one layer, so that no q, k and v can be called"
_RAGGED = (
    "it joins text and image in one sequence, in which the image begins after each sample's own number of text tokens, "
    "and its attention layers, whose heads share keys and values, are not given that number"
)
UNSUPPORTED: dict[str, str] = {
    "ChromaTransformer2DModel": _JOINT,
    "Flux2Transformer2DModel": _FUSED,
    "Lumina2Transformer2DModel": _RAGGED,
    "QwenImageTransformer2DModel": _JOINT,
    "SanaTransformer2DModel": "its self-attention is linear attention already",
}

_HOSTS: dict[str, type[Host]] = {}
_Host = TypeVar("_Host", bound=type[Host])


def register_host(name: str) -> Any:
    """Class decorator that adds a `Host` to the registry under `name`.

    Raises:
        ValueError: the name is taken by another class, or the class is not a `Host`.
    """

    def register(host: _Host) -> _Host:
        if not (isinstance(host, type) and issubclass(host, Host)):
            raise ValueError(f"cannot register {host!r} as the host {name!r}: expected a subclass of Host")
        registered = _HOSTS.get(name)
        if registered is not None and (registered.__module__, registered.__qualname__) != (
            host.__module__,
            host.__qualname__,
        ):
            raise ValueError(f"cannot register {host.__name__}: {registered.__name__} is already the host {name!r}")
        host.name = name
        _HOSTS[name] = host
        return host

    return register


@cache
def _discover() -> None:
    from unet_adapters import hosts

    for module in pkgutil.walk_packages(hosts.__path__, f"{hosts.__name__}."):
        importlib.import_module(module.name)


def hosts_from(module: str) -> list[str]:
    """Names of the hosts that the named module defines, sorted."""
    return sorted(name for name, host in _HOSTS.items() if host.__module__ == module)


def list_hosts() -> list[str]:
    """Names of the registered hosts, sorted."""
    _discover()
    return sorted(_HOSTS)


def find_host(pipe_or_model: Any) -> Host:
    """The host of a pipeline's denoising network, or of a model.

    Args:
        pipe_or_model: a diffusers pipeline, its UNet or transformer, or such a model after `torch.compile`.

    Raises:
        TypeError: it is neither a module nor a pipeline with one, or no registered host knows its architecture.
    """
    model = unwrap_model(pipe_or_model)
    _discover()
    scale = getattr(pipe_or_model, "vae_scale_factor", 8)  # 8: the autoencoders of Stable Diffusion
    for host in reversed(list(_HOSTS.values())):  # the most recently registered, a user's own, goes first
        if host.matches(model):
            return host(model, scale)
    name = type(model).__name__
    reason = UNSUPPORTED.get(name)
    if reason is not None:
        raise TypeError(f"cannot mount mixers in {name}: {reason}")
    raise TypeError(
        f"no registered host knows the architecture {name}: expected one of {', '.join(list_hosts())}; register one "
        "with unet_adapters.register_host"
    )


def find_sites(pipe_or_model: Any, select: Select = "all") -> list[Site]:
    """The self-attention layers of a model that a mixer can replace.

    Motion modules, GLIGEN fusers, cross-attention and the VAE are left alone.

    Args:
        pipe_or_model: as `find_host` takes it.
        select: "all"; a pattern with wildcards for the name or the group ("down_blocks.*", "mid_block"); a list of
            such patterns, any of which may match; "every:n", the first of each n sites; or a predicate.

    Returns:
        The selected sites, in the order of `named_modules`.

    Raises:
        ValueError: no site matches (the message lists those that exist), or n of "every:n" is not a positive number.
        TypeError: as `find_host`.
    """
    return find_host(pipe_or_model).select_sites(select)


def unwrap_model(pipe_or_model: Any) -> nn.Module:
    """The denoising network itself: out of its pipeline, of `torch.compile`, of peft's `get_peft_model`.

    Raises:
        TypeError: there is no such network, or it is wrapped for parallel training.
    """
    model = pipe_or_model
    if not isinstance(model, nn.Module):
        parts = (getattr(pipe_or_model, name, None) for name in ("unet", "transformer"))
        model = next((part for part in parts if part is not None), pipe_or_model)
    while hasattr(model, "_orig_mod") or hasattr(model, "get_base_model"):  # compiled and peft's, in any order
        # peft's PeftModel has its LoRA layers inside the base model.
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.get_base_model()
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise TypeError(
            f"expected a diffusers model, got it wrapped in {type(model).__name__}: build and mount the adapter on "
            "`model.module`, then wrap"
        )
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"expected a diffusers model or a pipeline with a `unet` or `transformer`, got {type(model).__name__}"
        )
    return model
