"""What must hold before a UNet is touched. Each check raises with one sentence that says what to do."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from diffusers.models import attention_processor as stock
from diffusers.models.attention_processor import Attention
from torch import nn

from unet_adapters.attention import MixerAttention, require_stock_processor
from unet_adapters.sites import Site


def check_host(unet: nn.Module, sites: Iterable[Site], verb: str) -> None:
    """Refuse to `verb` ("mount") on weights that are merged with a LoRA or not in memory.

    Raises:
        RuntimeError: a LoRA is fused; group offloading is on, which knows the layers that it began with; or weights of
            a site are on the meta device (offloaded, or not loaded).
    """
    for module in unet.modules():
        hooks = getattr(module, "_diffusers_hook", None)
        if hooks is not None and hooks.get_hook("group_offloading") is not None:
            raise RuntimeError(
                f"cannot {verb}: group offloading is on; remove its hooks and apply them again afterwards"
            )
    tuners = sys.modules.get("peft.tuners.tuners_utils")  # not imported: then there is no LoRA either
    if tuners is not None:
        for name, module in unet.named_modules():
            if isinstance(module, tuners.BaseTunerLayer) and module.merged:
                raise RuntimeError(f"cannot {verb}: a LoRA is fused into {name}; call unfuse_lora() first")
    for site in sites:
        if any(parameter.is_meta for parameter in unet.get_submodule(site.name).parameters()):
            raise RuntimeError(
                f"cannot {verb}: weights of {site.name} are on the meta device; load them, or remove the offloading "
                "hooks and apply them again afterwards"
            )


def check_no_lora(student: nn.Module, verb: str) -> None:
    """Refuse to `verb` ("save") a student that a LoRA is part of.

    Raises:
        RuntimeError: a LoRA targets layers of a mixer ("all-linear" does).
    """
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is None:
        return
    for name, module in student.named_modules():
        if isinstance(module, tuners.BaseTunerLayer):
            raise RuntimeError(f"cannot {verb}: a LoRA is on {name}; unload it, or target the attention's own layers")


def check_site(attn: Any, site: Site) -> None:
    """Refuse a layer that a mixer cannot stand in for.

    Raises:
        RuntimeError: it is already mounted, or is a subclass of `Attention` of someone else.
        ValueError: it has parts that a mixer would skip (query and key norms, added projections), its inner width is
            not that of its tokens, or its processor is not stock diffusers.
    """
    if isinstance(attn, MixerAttention):
        raise RuntimeError(f"{site.name} already has a mixer of another adapter: unmount that one first")
    if type(attn) is not Attention:
        raise RuntimeError(f"{site.name} is a {type(attn).__name__}, not diffusers' own Attention: cannot mount")
    skipped = [part for part in ("norm_q", "norm_k", "add_k_proj") if getattr(attn, part, None) is not None]
    if skipped:
        raise ValueError(f"{site.name} has {', '.join(skipped)}, which a mixer would skip: leave it out with `select`")
    if attn.inner_dim != attn.query_dim:
        raise ValueError(f"{site.name} mixes at width {attn.inner_dim} but its tokens have width {attn.query_dim}")
    require_stock_processor(attn.get_processor())


def check_not_fused(attn: nn.Module, site: Site, verb: str) -> None:
    """Refuse to swap projections while the layer runs on a fused copy of them.

    Raises:
        RuntimeError: `fuse_qkv_projections` is in force.
    """
    processor = attn.get_processor() if isinstance(attn, Attention) else None
    if isinstance(processor, stock.FusedAttnProcessor2_0):
        raise RuntimeError(f"cannot {verb}: the projections of {site.name} are fused; call unfuse_qkv_projections()")
