"""An edge ControlNet for the teacher: diffusers' own class, trained with the teacher's own objective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from experiments.config import FitConfig
from experiments.data import CaptionedImages, batch
from experiments.distill import DistillationContext
from experiments.teacher.objectives import Denoising
from experiments.training import batch_indices

THRESHOLD = 0.4  # of a range of 2: an edge is a step of at least a fifth of it in some color channel


def edges(images: Tensor) -> Tensor:
    """Images (b, 3, h, w) in [-1, 1] -> edge maps (b, 1, h, w) of zeros and ones.

    Sobel's gradient magnitude, scaled so that a step of height s gives s, the largest over the
    color channels, thresholded. The picture's own border is no edge.
    """
    b, c, h, w = images.shape
    across = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], device=images.device) / 4
    kernels = torch.stack([across, across.T])[:, None]
    padded = F.pad(images.float().reshape(b * c, 1, h, w), (1, 1, 1, 1), mode="replicate")
    magnitude = F.conv2d(padded, kernels).square().sum(1).sqrt().view(b, c, h, w)
    return (magnitude.amax(1, keepdim=True) > THRESHOLD).float()


def from_teacher(unet: UNet2DConditionModel, factor: int) -> ControlNetModel:
    """A ControlNet that starts as a copy of the UNet's encoder and adds nothing yet (its output layers are zero).

    Args:
        unet: with nothing mounted; it is copied strictly, and not changed.
        factor: by which the autoencoder divides each side; the edge maps are divided by the same.
    """
    levels = factor.bit_length()  # each level after the first halves the side
    widths = tuple(min(16 * 2**level, 256) for level in range(levels))
    return ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=widths)


class Controlled(nn.Module):
    """A UNet under a ControlNet, called like a UNet; its only parameters are the ControlNet's."""

    def __init__(self, unet: UNet2DConditionModel, controlnet: ControlNetModel) -> None:
        super().__init__()
        self.controlnet = controlnet.train().requires_grad_(True)
        self._unet = (unet,)  # a tuple: not a child, so that its weights are not ours to train

    def forward(self, noisy: Tensor, steps: Tensor, conditions: tuple[Tensor, Tensor]) -> Any:
        """`conditions`: text states (b, t, d) and edge maps (b, 1, h, w)."""
        text, maps = conditions
        down, middle = self.controlnet(noisy, steps, text, maps.expand(-1, 3, -1, -1), return_dict=False)
        return self._unet[0](
            noisy, steps, text, down_block_additional_residuals=down, mid_block_additional_residual=middle
        )


def objective(unet: UNet2DConditionModel, controlnet: ControlNetModel, scheduler: DDIMScheduler) -> nn.Module:
    """The teacher's objective for the ControlNet alone; batches as `batches` makes them."""
    return Denoising(Controlled(unet, controlnet), scheduler)


def batches(
    setting: DistillationContext, truth: Tensor, blank: Tensor, config: FitConfig, caption_dropout: float
) -> Callable[[int], Any]:
    """Step -> (latents, (text states, edge maps)); a dropped caption is the empty one's states, `blank` (t, d).

    Args:
        truth: edge maps (n, 1, h, w), bool, of the setting's pictures in its order.
    """

    def make(step: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        picked = batch_indices(step, config, len(setting.latents))
        dropped = torch.rand(len(picked)) < caption_dropout
        states = torch.where(dropped[:, None, None].to(blank.device), blank, setting.text_states[picked])
        return setting.latents[picked], (states, truth[picked].float().to(blank.device))

    return make


def pictures_of(data: CaptionedImages, size: int, images: int) -> list[Tensor]:
    """The training pictures of `open_setting`, in its order, in parts of 32: (b, 3, size, size)."""
    draw = torch.Generator().manual_seed(0)
    indices = torch.randint(0, len(data), (images,), generator=draw).tolist()
    starts = range(0, images, 32)
    return [batch(data, indices[i : i + 32], size, range(i, i + len(indices[i : i + 32])))[0] for i in starts]
