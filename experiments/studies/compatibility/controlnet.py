"""An edge ControlNet for the teacher: diffusers' own class, trained with the teacher's own objective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn

from experiments.config import FitConfig
from experiments.data import CaptionedImages, batch
from experiments.distill import DistillationContext
from experiments.teacher.noise_schedules import NoiseSchedule
from experiments.teacher.objectives import Denoising
from experiments.training import batch_indices

EDGE_THRESHOLD = 0.4  # of a range of 2: an edge is a step of at least a fifth of it in some color channel
CHUNK = 32


def detect_edges(images: Tensor) -> Tensor:
    """Detect the edges of images.

    Sobel's gradient magnitude, scaled so that a step of height s gives s; its maximum over the color channels is
    thresholded. The border of the image is no edge.

    Args:
        images: (b, 3, h, w) in [-1, 1].

    Returns:
        Edge maps (b, 1, h, w) of zeros and ones.
    """
    b, c, h, w = images.shape
    horizontal = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], device=images.device) / 4
    kernels = torch.stack([horizontal, horizontal.T])[:, None]
    padded = F.pad(images.float().reshape(b * c, 1, h, w), (1, 1, 1, 1), mode="replicate")
    magnitude = F.conv2d(padded, kernels).square().sum(1).sqrt().view(b, c, h, w)
    return (magnitude.amax(1, keepdim=True) > EDGE_THRESHOLD).float()


def create_controlnet(unet: UNet2DConditionModel, vae_scale_factor: int) -> ControlNetModel:
    """Create a ControlNet that starts as a copy of the UNet's encoder; its zero output layers add nothing yet.

    Args:
        unet: with stock attention; it is not changed.
        vae_scale_factor: by which the autoencoder divides each side; edge maps are divided by the same.
    """
    levels = vae_scale_factor.bit_length()  # each level after the first halves the side
    widths = tuple(min(16 * 2**level, 256) for level in range(levels))
    return ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=widths)


class ControlledUNet(nn.Module):
    """A UNet with a ControlNet, called like a UNet; its only parameters are the ControlNet's."""

    def __init__(self, unet: UNet2DConditionModel, controlnet: ControlNetModel) -> None:
        super().__init__()
        self.controlnet = controlnet.train().requires_grad_(True)
        self._unet = (unet,)  # in a tuple, so that it is no submodule and its weights are not trained

    def forward(self, noisy: Tensor, timesteps: Tensor, conditions: tuple[Tensor, Tensor]) -> Any:
        """Predict from text states (b, t, d) and edge maps (b, 1, h, w)."""
        text, edges = conditions
        down, middle = self.controlnet(noisy, timesteps, text, edges.expand(-1, 3, -1, -1), return_dict=False)
        return self._unet[0](
            noisy, timesteps, text, down_block_additional_residuals=down, mid_block_additional_residual=middle
        )


def controlnet_loss(unet: UNet2DConditionModel, controlnet: ControlNetModel, schedule: NoiseSchedule) -> nn.Module:
    """Return the teacher's training objective for the ControlNet alone; its batches are `controlnet_batches`."""
    return Denoising(ControlledUNet(unet, controlnet), schedule)


def controlnet_batches(
    context: DistillationContext, edges: Tensor, empty_caption: Tensor, fit: FitConfig, caption_dropout: float
) -> Callable[[int], Any]:
    """Return a function from a step to its batch: latents and (text states, edge maps).

    Args:
        context: the teacher's encoded training images.
        edges: edge maps (n, 1, h, w) of these images in the same order, bool.
        empty_caption: text states (t, d) of the empty caption.
        fit: its seed and batch size.
        caption_dropout: share of captions that are replaced by the empty one.
    """

    def draw(step: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        indices = batch_indices(step, fit, len(context.latents))
        dropped = torch.rand(len(indices)) < caption_dropout
        device = empty_caption.device
        text = torch.where(dropped[:, None, None].to(device), empty_caption, context.text_states[indices])
        return context.latents[indices], (text, edges[indices].float().to(device))

    return draw


def training_images(data: CaptionedImages, size: int, images: int) -> list[Tensor]:
    """Return the training images of `open_context`, in the same order, in chunks (b, 3, size, size)."""
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(0, len(data), (images,), generator=generator).tolist()
    chunks = []
    for start in range(0, images, CHUNK):
        items = indices[start : start + CHUNK]
        pixels, _ = batch(data, items, size, range(start, start + len(items)))
        chunks.append(pixels)
    return chunks
