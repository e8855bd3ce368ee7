"""Networks that turn images into features: the embedded CLIP, any other CLIP, DINO, and the published Inception-v3."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from experiments.core.errors import first_line
from experiments.core.fingerprints import weights_digest
from experiments.teacher.load import EMBEDDED

INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
_SOURCE = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION}"


class FeatureNetwork(nn.Module):
    """Images (b, 3, h, w) in uint8 -> features (b, d) in float64.

    Attributes:
        name: as records name it.
        num_features: d.
    """

    name: str
    num_features: int

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the weights."""
        return weights_digest(self)


class _VisionTransformer(FeatureNetwork):
    """Crops images to their central square, resizes them (bicubic, antialiased) and normalizes them."""

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, model: Any, size: int, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.name = name
        self.model = model
        self._size = size
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def preprocess(self, images: Tensor) -> Tensor:
        """uint8 (b, 3, h, w) -> the network's input (b, 3, s, s)."""
        height, width = images.shape[-2:]
        side = min(height, width)
        top = (height - side) // 2
        left = (width - side) // 2
        square = images[..., top : top + side, left : left + side].to(self.mean) / 255
        if side != self._size:
            shape = (self._size, self._size)
            square = interpolate(square, shape, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        return (square - self.mean) / self.std


class Clip(_VisionTransformer):
    """A CLIP with its tokenizer; features are its image embeddings."""

    def __init__(self, name: str, model: Any, tokenizer: Any, mean: list[float], std: list[float]) -> None:
        super().__init__(name, model, model.config.vision_config.image_size, mean, std)
        self.num_features = model.config.projection_dim
        self._tokenizer = tokenizer

    def forward(self, images: Tensor) -> Tensor:
        """Return image embeddings (b, d)."""
        return self.model.get_image_features(pixel_values=self.preprocess(images)).pooler_output.double()

    def embed_captions(self, captions: list[str]) -> Tensor:
        """Return text embeddings (b, d); captions are padded and truncated to the model's length."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(
            captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).to(self.mean.device)
        features = self.model.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        return features.pooler_output.double()


class Dino(_VisionTransformer):
    """A DINO or DINOv2; features are its class token after the last norm."""

    def __init__(self, name: str, model: Any, size: int, mean: list[float], std: list[float]) -> None:
        super().__init__(name, model, size, mean, std)
        self.num_features = model.config.hidden_size

    def forward(self, images: Tensor) -> Tensor:
        """Return class tokens (b, d)."""
        return self.model(pixel_values=self.preprocess(images)).last_hidden_state[:, 0].double()


class Inception(FeatureNetwork):
    """The Inception-v3 of published Fréchet distances, by torchmetrics and torch-fidelity; its last 2,048 features.

    It resizes images to 299 × 299 itself, bilinear and antialiased.
    """

    name = "inception"
    num_features = 2048

    def __init__(self, weights: Path) -> None:
        super().__init__()
        from torchmetrics.image.fid import NoTrainInceptionV3

        torch.load(weights, map_location="cpu", weights_only=True, mmap=True)  # raises if the file contains code
        self.network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(weights))

    def forward(self, images: Tensor) -> Tensor:
        """Return pooled features (b, 2048)."""
        return self.network(images).double()


@lru_cache(maxsize=4)
def open_network(source: str, device: str = "cpu") -> FeatureNetwork:
    """Open a feature network from local files; nothing is downloaded and no code is read from files.

    Args:
        source: "embedded", the CLIP that was trained with the embedded teacher, for images like its own;
            "clip:WHERE" or "dino:WHERE", a folder in transformers format or the id of a model in the Hub's cache;
            "inception:FILE", torch-fidelity's file of weights, or "inception" for the one in torch.hub's folder.
        device: where it runs.

    Raises:
        ValueError: there is no such network, or it cannot be read; the message says what to do.
    """
    kind, _, where = source.partition(":")
    openers: dict[str, Callable[[str], FeatureNetwork]] = {
        "embedded": _open_embedded,
        "clip": _open_clip,
        "dino": _open_dino,
        "inception": _open_inception,
    }
    if kind not in openers or (kind == "embedded" and where) or (kind in ("clip", "dino") and not where):
        raise ValueError(
            f"No feature network {source!r}: expected embedded, clip:WHERE, dino:WHERE, inception or inception:FILE."
        )
    return openers[kind](where).requires_grad_(False).eval().to(device)


def _open_embedded(_: str) -> FeatureNetwork:
    from transformers import CLIPModel, CLIPTokenizer

    model = CLIPModel.from_pretrained(EMBEDDED / "evaluator", dtype=torch.float32)
    return Clip("embedded CLIP", model, CLIPTokenizer.from_pretrained(EMBEDDED / "tokenizer"), [0.5] * 3, [0.5] * 3)


def _open_clip(where: str) -> FeatureNetwork:
    from transformers import AutoTokenizer, CLIPModel

    try:
        settings = _preprocessor(where)
        model = CLIPModel.from_pretrained(where, dtype=torch.float32, use_safetensors=True, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(where, local_files_only=True)
        return Clip(where, model, tokenizer, settings["image_mean"], settings["image_std"])
    except Exception as error:  # transformers, tokenizers, safetensors and the Hub raise types of their own
        raise _cannot_open("clip", where, "a CLIP's config.json, model.safetensors, tokenizer", error) from error


def _open_dino(where: str) -> FeatureNetwork:
    from transformers import AutoModel

    try:
        settings = _preprocessor(where)
        model = AutoModel.from_pretrained(where, dtype=torch.float32, use_safetensors=True, local_files_only=True)
        size = (settings.get("crop_size") or {"height": model.config.image_size})["height"]
        return Dino(where, model, int(size), settings["image_mean"], settings["image_std"])
    except Exception as error:  # as above
        raise _cannot_open("dino", where, "a DINO's config.json, model.safetensors", error) from error


def _preprocessor(where: str) -> dict[str, Any]:
    from transformers.utils import cached_file

    path = cached_file(where, "preprocessor_config.json", local_files_only=True)
    settings: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    return settings


def _cannot_open(kind: str, where: str, files: str, error: Exception) -> ValueError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return ValueError(
        f"Cannot open the features '{kind}:{where}': {reason} Expected a folder with {files} and "
        f"preprocessor_config.json, or the id of one in the Hub's cache (fetch it once: hf download {where})."
    )


def _open_inception(where: str) -> FeatureNetwork:
    path = Path(where or Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION)
    if not path.is_file():
        raise ValueError(
            f"Cannot open the features 'inception': there is no file {path}. Download {_SOURCE} and name it as "
            "inception:FILE, or use the features 'embedded', 'clip:WHERE' or 'dino:WHERE'."
        )
    try:
        return Inception(path)
    except ModuleNotFoundError as error:
        raise ValueError(
            "The features 'inception' need torch-fidelity: pip install 'linear-token-mixers[metrics]'."
        ) from error
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"Cannot read Inception's weights from {path}: the file contains more than weights."
        ) from error
    except Exception as error:  # torch's readers of damaged files raise whatever they come across
        raise ValueError(
            f"Cannot read Inception's weights from {path}: {first_line(error)} Expected the file of {_SOURCE}."
        ) from error
