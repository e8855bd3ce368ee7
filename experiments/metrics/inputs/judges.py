"""Judges of images by learned human preference, from the package `imscore`: PickScore, HPSv2, HPSv3 and ImageReward."""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from experiments.core.errors import first_line
from mixers.suggest import unknown_name

JUDGES: dict[str, tuple[str, str, str]] = {
    "pickscore": ("imscore.pickscore.model", "PickScorer", "RE-N-Y/pickscore"),
    "hpsv2": ("imscore.hps.model", "HPSv2", "RE-N-Y/hpsv21"),
    "hpsv3": ("imscore.hpsv3.model", "HPSv3", "RE-N-Y/hpsv3"),
    "image_reward": ("imscore.imreward.model", "ImageReward", "RE-N-Y/ImageReward"),
}
"""{name: (module, class, Hub id of the weights)}."""


class Judge:
    """A model that scores images for their captions; scores of two judges have nothing in common.

    Attributes:
        name: as records name it.
    """

    def __init__(self, name: str, model: Any, device: str) -> None:
        self.name = name
        self._model = model
        self._device = device

    @torch.no_grad()
    def score(self, images: Tensor, captions: list[str]) -> Tensor:
        """Return scores (b,) in float64 on the CPU; higher is better.

        Args:
            images: (b, 3, h, w) in uint8.
            captions: one for each image.

        Raises:
            ValueError: the model fails, or returns something else than one number for each image.
        """
        try:
            scores = self._model.score(images.to(self._device).float() / 255, captions)
        except Exception as error:  # whatever the packages below it raise
            raise _cannot_use(self.name, error) from error
        if not isinstance(scores, Tensor) or scores.numel() != len(images):
            raise ValueError(
                f"The judge {self.name!r} returned {getattr(scores, 'shape', type(scores).__name__)} for "
                f"{len(images)} images; expected one score for each image."
            )
        return scores.detach().double().cpu().reshape(len(images))


@lru_cache(maxsize=1)
def open_judge(source: str, device: str = "cpu") -> Judge:
    """Open a judge. The last one is kept.

    The weights, and those of the networks below them, come from the Hub's cache or the Hub.

    Args:
        source: one of `JUDGES`, or "NAME:WHERE" with a folder or a Hub id in place of the published weights.
        device: where it runs.

    Raises:
        ModuleNotFoundError: imscore, or something that it needs, is not installed.
        ValueError: there is no such judge, or it cannot be loaded.
    """
    name, _, where = source.partition(":")
    if name not in JUDGES:
        raise ValueError(unknown_name("judge", name, JUDGES))
    module, class_name, published = JUDGES[name]
    try:
        judge_class = getattr(importlib.import_module(module), class_name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"The judge {name!r} needs {error.name}: run pip install 'linear-token-mixers[judges]'.", name=error.name
        ) from error
    except Exception as error:  # an import of a version that does not fit
        raise _cannot_use(source, error) from error
    try:
        model = judge_class.from_pretrained(where or published)
    except Exception as error:  # transformers, open_clip, safetensors and the Hub raise types of their own
        raise _cannot_use(source, error) from error
    return Judge(source, model.requires_grad_(False).eval().to(device), device)


def _cannot_use(source: str, error: Exception) -> ValueError:
    return ValueError(
        f"Cannot use the judge {source!r}: {first_line(error)} Expected weights that imscore can load, from the Hub or "
        f"as NAME:FOLDER, and a version of transformers that imscore supports."
    )
