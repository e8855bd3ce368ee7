"""Images generated from prompts, and the features of whole sets: a student's, its teacher's, and true ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from experiments.config import EvaluationConfig
from experiments.core.fingerprints import TensorVersions, weights_version
from experiments.data.image import crop_and_resize
from experiments.distill.context import DistillationContext
from experiments.distill.loss import autocast
from experiments.metrics.inputs.feature_networks import Clip, FeatureNetwork, open_network
from experiments.metrics.inputs.true_images import open_second_set, open_true_images
from experiments.teacher.teacher import Teacher
from unet_adapters import MixerAdapter

CaptionedBatch = tuple[Tensor, list[str]]
"""Images (b, 3, h, w) in uint8, and their captions."""


@dataclass(frozen=True)
class ImageFeatures:
    """What a network makes of a set of images.

    Attributes:
        features: (n, d), float64.
        caption_scores: (n,), 100 · the cosine of image and caption; None if the network is no CLIP.
    """

    features: Tensor
    caption_scores: Tensor | None


@dataclass(frozen=True)
class FeatureSets:
    """Features of the student's, the teacher's and true images by one network, image k of all for the same caption.

    Attributes:
        network: its name.
        size: side of the images in pixels.
        guidance: that student and teacher used.
        second_true: features of as many other true images; None if the data has too few.
    """

    network: str
    size: int
    guidance: float
    student: ImageFeatures
    teacher: ImageFeatures
    true: ImageFeatures
    second_true: ImageFeatures | None = None


@torch.no_grad()
def generate_images(
    pipe: Any, prompts: Sequence[str], size: tuple[int, int], plan: EvaluationConfig, guidance: float, seed: int
) -> list[Image.Image]:
    """Generate an image for each prompt in one batch, by the UNet as it is mounted now.

    Args:
        pipe: the teacher's pipeline.
        prompts: captions.
        size: (height, width) in pixels.
        plan: number of sampling steps.
        guidance: scale of classifier-free guidance; 1 is none.
        seed: prompt k starts from noise of seed + k, drawn on the CPU.
    """
    teacher = Teacher(pipe)
    with autocast(teacher):
        images: list[Image.Image] = pipe(
            list(prompts),
            height=size[0],
            width=size[1],
            num_inference_steps=plan.sample_steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(seed + k) for k in range(len(prompts))],
            **teacher.host.sampling_options(pipe),
        ).images
    return images


def feature_sets(
    context: DistillationContext, adapter: MixerAdapter, plan: EvaluationConfig, data: str
) -> Iterator[FeatureSets]:
    """Generate the student's images and iterate over features, by size, guidance and network.

    The teacher's images are generated from the same noise, once for all students. Costs `generated.images` samples for
    each size and guidance.

    Raises:
        ValueError: a network or the true images are not available.
    """
    for size in plan.generated.sizes if plan.generated.images else ():
        true = _true_features(context, plan, data, size)
        second = _second_true_features(context, plan, data, size)
        for guidance in plan.all_guidances:
            version = weights_version(context.teacher.denoiser)
            teacher = _teacher_features(context, plan, data, size, guidance, version)
            with adapter.mounted():
                student = _features_by_network(context, plan, generate_batches(context, plan, data, size, guidance))
            for name in plan.generated.features:
                network = open_network(name, str(context.teacher.device)).name
                yield FeatureSets(network, size, guidance, student[name], teacher[name], true[name], second.get(name))


@torch.no_grad()
def extract_features(batches: Iterable[CaptionedBatch], networks: Iterable[FeatureNetwork]) -> list[ImageFeatures]:
    """Run images through every network, batch by batch."""
    networks = list(networks)
    features: list[list[Tensor]] = [[] for _ in networks]
    scores: list[list[Tensor]] = [[] for _ in networks]
    for images, captions in batches:
        for network, its_features, its_scores in zip(networks, features, scores, strict=True):
            batch_features = network(images.to(next(network.parameters()).device))
            its_features.append(batch_features.cpu())
            if isinstance(network, Clip):
                cosine = torch.cosine_similarity(batch_features, network.embed_captions(captions))
                its_scores.append(100 * cosine.cpu())
    return [
        ImageFeatures(torch.cat(its_features), torch.cat(its_scores) if its_scores else None)
        for its_features, its_scores in zip(features, scores, strict=True)
    ]


def _features_by_network(
    context: DistillationContext, plan: EvaluationConfig, batches: Iterable[CaptionedBatch]
) -> dict[str, ImageFeatures]:
    names = plan.generated.features
    networks = [open_network(name, str(context.teacher.device)) for name in names]
    return dict(zip(names, extract_features(batches, networks), strict=True))


@torch.no_grad()
def generate_batches(
    context: DistillationContext, plan: EvaluationConfig, data: str, size: int, guidance: float
) -> Iterator[CaptionedBatch]:
    """Generate an image for every caption of the evaluation, by the UNet as it is mounted now, batch by batch.

    Args:
        context: the teacher's pipeline.
        plan: how many captions, resizing, and the seed: caption k starts from noise of seed + k.
        data: name of the data set, as in a grid.
        size: side of the images in pixels, before resizing.
        guidance: scale of classifier-free guidance; 1 is none.
    """
    start = plan.seed
    resized_to = plan.generated.resize or size
    for _, captions in open_true_images(data, plan).batches(resized_to, plan.generated.batch_size):
        images = generate_images(context.pipe, captions, (size, size), plan, guidance, start)
        yield torch.stack([_as_uint8(image, resized_to) for image in images]), captions
        start += len(captions)


def _as_uint8(image: Image.Image, size: int) -> Tensor:
    return ((crop_and_resize(image, size) + 1) * 127.5).round().to(torch.uint8)


@lru_cache(maxsize=8)
def _true_features(
    context: DistillationContext, plan: EvaluationConfig, data: str, size: int
) -> dict[str, ImageFeatures]:
    batches = open_true_images(data, plan).batches(plan.generated.resize or size, plan.generated.batch_size)
    return _features_by_network(context, plan, batches)


@lru_cache(maxsize=8)
def _second_true_features(
    context: DistillationContext, plan: EvaluationConfig, data: str, size: int
) -> dict[str, ImageFeatures]:
    images = open_second_set(data, plan)
    if images is None:
        return {}
    return _features_by_network(context, plan, images.batches(plan.generated.resize or size, plan.generated.batch_size))


@lru_cache(maxsize=16)
def _teacher_features(
    context: DistillationContext,
    plan: EvaluationConfig,
    data: str,
    size: int,
    guidance: float,
    version: TensorVersions,
) -> dict[str, ImageFeatures]:
    return _features_by_network(context, plan, generate_batches(context, plan, data, size, guidance))
