"""diffusers' `Attention` with second projections for text, and a mixer in it: the image tokens come first."""

from __future__ import annotations

from typing import Any

from diffusers.models import attention_processor as stock
from torch import Tensor

from unet_adapters.attention import MountedAttention, check_grid, check_heads, view_teacher
from unet_adapters.joint import ProjectedText, mix_jointly
from unet_adapters.layer_projections import LayerProjections, norm_heads
from unet_adapters.mounted_layer import GridSize, stock_processor
from unet_adapters.sites import Site

UNFUSED: dict[type, type] = {stock.FusedJointAttnProcessor2_0: stock.JointAttnProcessor2_0}


class JointDispatch:
    """The processor of a mounted joint attention: stateless. As the stock processor, it ignores attention masks."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        mixer_grid: GridSize | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mix image tokens (b, l, d) and text tokens (b, t, d) -> the same shapes.

        Raises:
            ValueError: there is no text, the stock processor is not a supported one, or the tokens are not those of
                the grid.
        """
        if encoder_hidden_states is None:
            raise ValueError("joint attention with a mounted mixer got no encoder_hidden_states: pass text tokens")
        processor = stock_processor(attn)
        attn.require_supported(processor)
        length = hidden_states.shape[1]
        if length < attn.mixer_from:
            teacher, processor = view_teacher(attn, processor, hidden_states, UNFUSED)
            outputs: tuple[Tensor, Tensor] = processor(teacher, hidden_states, encoder_hidden_states)
            return outputs
        check_grid(length, mixer_grid)
        text = project_text(attn, encoder_hidden_states)
        image, text_heads = mix_jointly(attn.mixer, LayerProjections(attn), hidden_states, text, grid=mixer_grid)
        return image, text_heads if attn.context_pre_only else attn.to_add_out(text_heads)


def project_text(attn: Any, tokens: Tensor) -> ProjectedText:
    """Project text tokens (b, t, d) with the layer's second projections and norms."""
    q = norm_heads(attn.add_q_proj(tokens), attn.norm_added_q, attn.heads)
    k = norm_heads(attn.add_k_proj(tokens), attn.norm_added_k, attn.heads)
    v = attn.add_v_proj(tokens)
    q, k, v = (tensor.unflatten(-1, (attn.heads, -1)) for tensor in (q, k, v))
    return ProjectedText(q, k, v)


class JointMixerAttention(MountedAttention):
    """An `Attention` over image and text; made only by `attn.__class__ = JointMixerAttention`."""

    dispatcher = JointDispatch()
    supported_processors = frozenset({stock.JointAttnProcessor2_0, stock.FusedJointAttnProcessor2_0})


def check_joint_attention(site: Site, layer: Any) -> None:
    """Refuse an `Attention` over image and text with parts that `JointDispatch` would skip.

    Raises:
        ValueError: it lacks one of the second projections, or its heads cannot be used.
    """
    missing = [name for name in ("add_q_proj", "add_k_proj", "add_v_proj") if getattr(layer, name, None) is None]
    if missing:
        raise ValueError(f"{site.name} has no {', '.join(missing)} for its text tokens: leave it out with `select`")
    check_heads(site, layer)
