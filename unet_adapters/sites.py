"""Sites: the self-attention layers of a model that a token mixer can replace, and how to select among them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

EVERY = "every:"


@dataclass(frozen=True)
class Site:
    """One self-attention layer.

    Attributes:
        name: its name in `model.named_modules()`.
        dim: width of its tokens.
        heads: number of attention heads.
        group: the part of the model it lies in, as its host divides it: "down_blocks.0", "mid_block" of a UNet.
        text: whether its image tokens attend to text tokens too (joint attention).
        rotary: whether it rotates queries and keys.
        qk_norm: whether it norms queries and keys.
    """

    name: str
    dim: int
    heads: int
    group: str
    text: bool = False
    rotary: bool = False
    qk_norm: bool = False


Select = str | Sequence[str] | Callable[[Site], bool]


def select_sites(sites: Sequence[Site], select: Select = "all") -> list[Site]:
    """The sites that `select` matches, in their order.

    Args:
        sites: all sites of a model.
        select: "all"; a pattern with wildcards for the name or the group ("down_blocks.*", "mid_block"); a list of
            such patterns, any of which may match; "every:n", the first of each n sites; or a predicate.

    Raises:
        ValueError: no site matches (the message lists those that exist), or n of "every:n" is not a positive number.
    """
    selected = _matching_sites(sites, select)
    if not selected:
        listing = "".join(f"\n  {site.name} (dim {site.dim}, heads {site.heads})" for site in sites)
        reason = f"the model has:{listing}" if listing else "the model has no self-attention that a mixer can replace"
        raise ValueError(f"no site matches select={select!r}; {reason}")
    return selected


def _matching_sites(sites: Sequence[Site], select: Select) -> list[Site]:
    if callable(select):
        return [site for site in sites if select(site)]
    if isinstance(select, str) and select.startswith(EVERY):
        return list(sites[:: _step(select)])
    patterns = [select] if isinstance(select, str) else list(select)
    patterns = ["*" if pattern == "all" else pattern for pattern in patterns]
    return [site for site in sites if any(_matches(site, pattern) for pattern in patterns)]


def _matches(site: Site, pattern: str) -> bool:
    return fnmatchcase(site.name, pattern) or fnmatchcase(site.group, pattern)


def _step(select: str) -> int:
    number = select.removeprefix(EVERY)
    if not number.isdecimal() or int(number) == 0:
        raise ValueError(f'select={select!r}: expected "every:n" with a positive whole number n')
    return int(number)
