"""Fréchet and kernel distance and text-image score of drawn pictures, all by torchmetrics."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from experiments.config import EvaluationConfig
from experiments.distill.context import DistillationContext
from experiments.evaluate.features import Clip, Network, open_network
from experiments.evaluate.pictures import draw
from experiments.evaluate.reference import open_reference
from unet_adapters import MixerAdapter

SUBSET, SUBSETS = 1000, 100  # of the kernel distance, as published

Row = dict[str, Any]
Pictures = tuple[Tensor, list[str]]


@dataclass(frozen=True)
class Judged:
    """What a network makes of a set of pictures: features (n, d), and the mean text-image score, of a CLIP."""

    features: Tensor
    score: float | None


@torch.no_grad()
def image_metrics(setting: DistillationContext, adapter: MixerAdapter, plan: EvaluationConfig, data: str) -> list[Row]:
    """A row a size, guidance, network and metric: the values of the student's, the teacher's and the true pictures.

    frechet_distance, kernel_distance: of drawn pictures to the true ones; biased upwards by few pictures, the first.
    text_image_score: 100 · the cosine of picture and caption, at least 0; of a CLIP only.

    The teacher's pictures are drawn by the same process, from the same noise, once. Costs, of each size and guidance,
    `images` samples of each.

    Raises:
        ValueError: a network or the true pictures are not at hand.
    """
    rows: list[Row] = []
    for size in plan.metrics.sizes if plan.metrics.images else ():
        true = _true(setting, plan, data, size)
        for guidance in plan.all_guidances:
            taught = _taught(setting, plan, data, size, guidance)
            with adapter.mounted():
                learned = _judge(setting, plan, _drawn(setting, plan, data, size, guidance))
            place = {"height": size, "width": size, "guidance": guidance, "images": len(open_reference(data, plan))}
            for name in plan.metrics.features:
                columns = {"student": learned[name], "teacher": taught[name]}
                rows += [{**place, **row} for row in _rows(_network(setting, name), true[name], columns)]
    return rows


def distances(true: Tensor, drawn: Tensor, seed: int = 0) -> dict[str, float]:
    """Fréchet and kernel distance of two sets of features (n, d).

    Fréchet: |μ − μ'|² + tr(Σ + Σ' − 2 (Σ Σ')^½) (1706.08500). Kernel: the unbiased squared mean discrepancy under
    (x·y / d + 1)³ (1801.01401), of all pictures up to 1,000, beyond that the mean of 100 subsets of 1,000.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    given, size = _Given(true.shape[1]), min(len(true), len(drawn), SUBSET)
    subsets = SUBSETS if max(len(true), len(drawn)) > SUBSET else 1
    with warnings.catch_warnings(), torch.random.fork_rng(devices=()):
        warnings.simplefilter("ignore")  # that features are kept, which they are anyway
        torch.manual_seed(seed)  # of the subsets
        frechet = FrechetInceptionDistance(feature=given)
        kernel = KernelInceptionDistance(feature=given, subsets=subsets, subset_size=size)
        for metric in (frechet, kernel):
            metric.update(true.cpu(), real=True)
            metric.update(drawn.cpu(), real=False)
        return {"frechet_distance": float(frechet.compute()), "kernel_distance": float(kernel.compute()[0])}


def judge(pictures: Iterable[Pictures], networks: Iterable[Network]) -> list[Judged]:
    """What each network makes of pictures (b, 3, h, w), uint8, and their captions, batch by batch."""
    networks = list(networks)
    features: list[list[Tensor]] = [[] for _ in networks]
    scores = [_score(network) if isinstance(network, Clip) else None for network in networks]
    for images, captions in pictures:
        for network, kept, score in zip(networks, features, scores, strict=True):
            images = images.to(next(network.parameters()).device)
            kept.append(network(images).cpu())
            if score is not None:
                score.update(list(images), captions)
    return [
        Judged(torch.cat(kept), None if score is None else float(score.compute()))
        for kept, score in zip(features, scores, strict=True)
    ]


class _Given(nn.Module):
    """A metric's feature network, where the features are there already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def _score(network: Clip) -> Any:
    from torchmetrics.multimodal.clip_score import CLIPScore

    return CLIPScore(lambda: (network, network.process))


def _rows(network: Network, true: Judged, drawn: dict[str, Judged]) -> Iterator[Row]:
    found = {who: distances(true.features, judged.features) for who, judged in drawn.items()}
    for metric in next(iter(found.values())):
        values = {who: found[who][metric] for who in drawn}
        yield {"metric": metric, "features": network.name, **values, "truth": None}
    if true.score is not None:
        scores = {who: judged.score for who, judged in drawn.items()}
        yield {"metric": "text_image_score", "features": network.name, **scores, "truth": true.score}


def _network(setting: DistillationContext, name: str) -> Network:
    return open_network(name, str(setting.teacher.device))


def _judge(setting: DistillationContext, plan: EvaluationConfig, pictures: Iterable[Pictures]) -> dict[str, Judged]:
    names = plan.metrics.features
    return dict(zip(names, judge(pictures, [_network(setting, name) for name in names]), strict=True))


def _drawn(
    setting: DistillationContext, plan: EvaluationConfig, data: str, size: int, guidance: float
) -> Iterator[Pictures]:
    """Pictures by the UNet as it is mounted now; noise k for caption k."""
    first, shown = plan.seed, plan.metrics.resize or size
    for _, captions in open_reference(data, plan).batches(shown, plan.metrics.batch_size):
        images = draw(setting.pipe, captions, (size, size), plan, guidance, first)
        yield torch.stack([_resized(image, shown) for image in images]), captions
        first += len(captions)


def _resized(image: Any, size: int) -> Tensor:
    from experiments.data.image import crop_and_resize

    return ((crop_and_resize(image, size) + 1) * 127.5).round().to(torch.uint8)


@lru_cache(maxsize=8)
def _true(setting: DistillationContext, plan: EvaluationConfig, data: str, size: int) -> dict[str, Judged]:
    pictures = open_reference(data, plan).batches(plan.metrics.resize or size, plan.metrics.batch_size)
    return _judge(setting, plan, pictures)


@lru_cache(maxsize=16)
def _taught(
    setting: DistillationContext, plan: EvaluationConfig, data: str, size: int, guidance: float
) -> dict[str, Judged]:
    return _judge(setting, plan, _drawn(setting, plan, data, size, guidance))
