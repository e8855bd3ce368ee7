"""What is measured: agreement of edges, similarity to an image, and bootstrap intervals of their means."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel

from experiments.core.statistics import bootstrap_interval
from experiments.studies.compatibility.controlnet import detect_edges
from experiments.studies.compatibility.ip_adapter import embed_images

MeanInterval = dict[str, float]
"""A mean and its 95 % interval: the keys are "mean", "low" and "high"."""


def edge_f1(detected: Tensor, target: Tensor, tolerance: int = 1) -> Tensor:
    """Compute the F1 score of edge maps, the harmonic mean of precision and recall.

    A detected edge pixel is right if a target one is within `tolerance` pixels in each direction, and a target one is
    recalled likewise. Two maps without edges agree (1); one without edges and one with edges do not (0).

    Args:
        detected: (b, 1, h, w) of zeros and ones.
        target: (b, 1, h, w) of zeros and ones.
        tolerance: in pixels.

    Returns:
        (b,), one score per image.
    """
    side = 2 * tolerance + 1
    near_detected = F.max_pool2d(detected, side, stride=1, padding=tolerance)
    near_target = F.max_pool2d(target, side, stride=1, padding=tolerance)
    total_detected = detected.sum((1, 2, 3))
    total_target = target.sum((1, 2, 3))
    precision = (detected * near_target).sum((1, 2, 3)) / total_detected.clamp(min=1)
    recall = (target * near_detected).sum((1, 2, 3)) / total_target.clamp(min=1)
    score = 2 * precision * recall / (precision + recall).clamp(min=1e-9)
    return torch.where((total_detected == 0) & (total_target == 0), torch.ones_like(score), score)


def edge_agreement(images: Tensor, edges: Tensor) -> list[float]:
    """Return the F1 scores of the edges of images (n, 3, s, s) in [-1, 1] against edge maps (n, 1, s, s)."""
    return edge_f1(detect_edges(images), edges).tolist()


def clip_similarity(clip: CLIPModel, images: Tensor, references: Tensor) -> list[float]:
    """Return the cosine similarity of the CLIP embeddings of each image and its reference."""
    return F.cosine_similarity(embed_images(clip, images), embed_images(clip, references)).tolist()


def mean_interval(values: list[float]) -> MeanInterval:
    """Return the mean and its 95 % bootstrap interval over images."""
    interval = bootstrap_interval(values)
    return {"mean": interval.mean, "low": interval.low, "high": interval.high}


def paired_difference(ours: list[float], theirs: list[float]) -> MeanInterval:
    """Return `mean_interval` of the differences ours − theirs, image by image."""
    return mean_interval([a - b for a, b in zip(ours, theirs, strict=True)])
