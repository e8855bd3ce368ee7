"""The places of a UNet that a token mixer can stand in: what they are, and how to choose among them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

EVERY = "every:"


@dataclass(frozen=True)
class Site:
    """One self-attention layer of a UNet, by its name in `unet.named_modules()`.

    `dim` is the width of its tokens, `heads` their number of heads, `level` the UNet block it lies in
    ("down_blocks.0", "mid_block", "up_blocks.1").
    """

    name: str
    dim: int
    heads: int
    level: str


Select = str | Sequence[str] | Callable[[Site], bool]


def resolve_unet(host: Any) -> nn.Module:
    """The UNet of a pipeline, of a compiled module, or the UNet itself.

    Raises:
        TypeError: `host` is neither a module nor a pipeline with a `unet`.
    """
    unet = getattr(host, "unet", host)
    unet = getattr(unet, "_orig_mod", unet)
    if not isinstance(unet, nn.Module):
        raise TypeError(f"expected a diffusers UNet or a pipeline with one, got {type(host).__name__}")
    return unet


def all_sites(host: Any) -> list[Site]:
    """Every site of a UNet, in `named_modules` order; the list may be empty. Cost: one walk over the modules."""
    return list(dict.fromkeys(_walk(resolve_unet(host))))


def find_sites(unet: Any, select: Select = "all") -> list[Site]:
    """The self-attention layers of a UNet that a mixer can replace.

    A site is `attn1` of a `BasicTransformerBlock` inside a `Transformer2DModel` that is not cross-attention. Motion
    modules, GLIGEN fusers, cross-attention-only blocks and the VAE are left alone.

    Args:
        unet: a diffusers UNet (or ControlNet, UNetMotionModel), or a pipeline with a `unet`.
        select: "all"; a pattern with wildcards for the name or the level ("down_blocks.*", "mid_block"); a list of
            such patterns, any of which may match; "every:n", the first of each n sites; or a function of the site.

    Returns:
        The chosen sites, in the order of `named_modules`.

    Raises:
        ValueError: no site matches (the message lists those that exist), or n of "every:n" is not a positive number.
    """
    sites = all_sites(unet)
    chosen = _choose(sites, select)
    if not chosen:
        existing = "".join(f"\n  {site.name} (dim {site.dim}, heads {site.heads})" for site in sites)
        there = f"the UNet has:{existing}" if existing else "the UNet has no self-attention that a mixer can replace"
        raise ValueError(f"no site matches select={select!r}; {there}")
    return chosen


def _walk(unet: nn.Module) -> Iterator[Site]:
    for prefix, transformer in unet.named_modules():
        if not isinstance(transformer, Transformer2DModel):
            continue
        for name, block in transformer.named_modules(prefix=prefix):
            attn = getattr(block, "attn1", None) if isinstance(block, BasicTransformerBlock) else None
            if isinstance(attn, Attention) and not attn.is_cross_attention:
                full = f"{name}.attn1"
                yield Site(full, int(attn.query_dim), int(attn.heads), full.partition(".attentions.")[0])


def _choose(sites: list[Site], select: Select) -> list[Site]:
    if callable(select):
        return [site for site in sites if select(site)]
    if isinstance(select, str) and select.startswith(EVERY):
        return sites[:: _step(select)]
    patterns = [select] if isinstance(select, str) else list(select)
    patterns = ["*" if pattern == "all" else pattern for pattern in patterns]
    return [site for site in sites if any(_matches(site, pattern) for pattern in patterns)]


def _matches(site: Site, pattern: str) -> bool:
    return fnmatchcase(site.name, pattern) or fnmatchcase(site.level, pattern)


def _step(select: str) -> int:
    number = select.removeprefix(EVERY)
    if not number.isdecimal() or int(number) == 0:
        raise ValueError(f'select={select!r}: write "every:n" with a positive whole number n')
    return int(number)
