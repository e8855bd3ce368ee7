"""Joint attention over image and text with a mixer among the image tokens: the core that all hosts share.

    text queries   softmax attention over text and image, exact: they are few, so the cost is linear in image tokens
    image queries  the mixer over image tokens, combined with the text as the mixer's option `text` says

A host's dispatcher projects the text with the layer's own modules, and says how both are rotated and what is padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mixers import TokenMixer
from mixers.context import MixingContext, Rotation, TextTokens, join_visible
from mixers.text_attention import attend
from unet_adapters.layer_projections import KnownProjections, LayerProjections
from unet_adapters.mounted_layer import GridSize


@dataclass(frozen=True)
class ProjectedText:
    """Text tokens as the layer projects them.

    Attributes:
        q, k, v: (b, t, h, c), normed, not rotated.
        rotation: of the text tokens; None: not rotated.
        visible: (b, t), False for padding; None: all are visible.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    rotation: Rotation | None = None
    visible: Tensor | None = None


def mix_jointly(
    mixer: TokenMixer,
    projections: LayerProjections,
    image: Tensor,
    text: ProjectedText,
    *,
    grid: GridSize | None = None,
    rotation: Rotation | None = None,
    visible: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mix image tokens with each other and with text.

    Args:
        mixer: among the image tokens.
        projections: of the image tokens.
        image: tokens (b, l, d).
        text: the text tokens.
        grid: (height, width) of the image.
        rotation: of the image tokens; None: not rotated.
        visible: (b, l), False for padding among the image tokens; None: all are visible.

    Returns:
        Image tokens (b, l, d) after the output projection, and the heads of the text tokens (b, t, h·v) before it.
    """
    projected = KnownProjections(projections, image)
    q, k, v = (tensor.unflatten(-1, (mixer.heads, -1)) for tensor in (projected.q, projected.k, projected.v))
    text_q = text.q if text.rotation is None else text.rotation(text.q)
    if rotation is not None:
        q, k = rotation(q), rotation(k)
    context_text = TextTokens(q, text.k, text.v, text.rotation, text.visible)
    context = MixingContext(context_text, rotation, visible)
    mixed = mixer(image, grid=grid, projections=projected, context=context)
    all_k = torch.cat([context_text.rotated_k, k], dim=1)
    all_v = torch.cat([text.v, v], dim=1)
    attended = attend(text_q, all_k, all_v, join_visible(text.v, text.visible, v, visible))
    return mixed, attended.flatten(-2).to(image.dtype)
