"""Networks that look at pictures for the metrics: the embedded CLIP, any other CLIP, and Inception's own weights."""

from __future__ import annotations

import hashlib
import json
import pickle
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from experiments.teacher.load import EMBEDDED

INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
_SOURCE = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION}"


class Network(nn.Module):
    """Pictures (b, 3, h, w), uint8 -> features (b, d), float64.

    Attributes:
        name: as records name it.
        num_features: d.
    """

    name: str
    num_features: int

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of its weights."""
        return weights_digest(self)


class Clip(Network):
    """A CLIP with its tokenizer and normalization; features are its picture embeddings.

    Pictures are cropped to their central square and resized to the network's size, bicubic and antialiased. It has the
    methods that torchmetrics' `CLIPScore` calls of a model and, as `process`, of a processor.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, model: Any, tokenizer: Any, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.name, self.clip, self.num_features, self._tokenizer = name, model, model.config.projection_dim, tokenizer
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, pictures: Tensor) -> Tensor:
        """See the class."""
        return self.get_image_features(self.pixels(pictures)).double()

    @property
    def config(self) -> Any:
        """The CLIP's."""
        return self.clip.config

    def pixels(self, pictures: Tensor) -> Tensor:
        """uint8 (b, 3, h, w) -> what the CLIP is trained on, (b, 3, s, s)."""
        side, (height, width) = min(pictures.shape[-2:]), pictures.shape[-2:]
        top, left, size = (height - side) // 2, (width - side) // 2, self.clip.config.vision_config.image_size
        square = pictures[..., top : top + side, left : left + side].to(self.mean) / 255
        if side != size:
            square = interpolate(square, (size, size), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        return (square - self.mean) / self.std

    def process(self, *, text: list[str] | None = None, images: list[Tensor] | None = None, **_: Any) -> dict[str, Any]:
        """What a CLIP processor does, of captions or of pictures (3, h, w)."""
        if images is not None:
            return {"pixel_values": self.pixels(torch.stack(images).to(self.mean.device))}
        length = self.clip.config.text_config.max_position_embeddings
        options = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
        return dict(self._tokenizer(text, **options))

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Pixels -> embeddings (b, d)."""
        return self.clip.get_image_features(pixel_values=pixel_values).pooler_output

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Tokens -> embeddings (b, d)."""
        return self.clip.get_text_features(input_ids=input_ids, attention_mask=attention_mask).pooler_output


class Inception(Network):
    """The Inception-v3 of published Fréchet distances, by torchmetrics and torch-fidelity; its last 2,048 features.

    It resizes pictures to 299 × 299 itself, bilinear and antialiased.
    """

    name, num_features = "inception", 2048

    def __init__(self, weights: Path) -> None:
        super().__init__()
        from torchmetrics.image.fid import NoTrainInceptionV3

        torch.load(weights, map_location="cpu", weights_only=True, mmap=True)  # raises where there is code in the file
        self.network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(weights))

    def forward(self, pictures: Tensor) -> Tensor:
        """See the class."""
        return self.network(pictures).double()


@lru_cache(maxsize=4)
def open_network(source: str, device: str = "cpu") -> Network:
    """A feature network that is at hand; nothing is downloaded and no code is read from files.

    Args:
        source: "embedded", the CLIP that was trained with the embedded teacher, for pictures like its own;
            "clip:WHERE", a folder in transformers format or the id of a model in the Hub's cache;
            "inception:FILE", torch-fidelity's file of weights, or "inception" for the one in torch.hub's folder.

    Raises:
        ValueError: there is no such network, or it cannot be read; the message says what to do.
    """
    kind, _, where = source.partition(":")
    openers = {"embedded": _embedded, "clip": _clip, "inception": _inception}
    if kind not in openers or (kind == "embedded" and where) or (kind == "clip" and not where):
        raise ValueError(f"No feature network {source!r}: expected embedded, clip:WHERE, inception or inception:FILE.")
    return openers[kind](where).requires_grad_(False).eval().to(device)


def weights_digest(network: nn.Module) -> str:
    """The SHA-256 of a network's parameters and buffers: names, types, shapes and values. About a second per GB."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _embedded(_: str) -> Network:
    from transformers import CLIPModel, CLIPTokenizer

    model = CLIPModel.from_pretrained(EMBEDDED / "evaluator", dtype=torch.float32)
    return Clip("embedded CLIP", model, CLIPTokenizer.from_pretrained(EMBEDDED / "tokenizer"), [0.5] * 3, [0.5] * 3)


def _clip(where: str) -> Network:
    from transformers import AutoTokenizer, CLIPModel
    from transformers.utils import cached_file

    local: dict[str, Any] = {"local_files_only": True}
    try:
        settings = json.loads(Path(cached_file(where, "preprocessor_config.json", **local)).read_text(encoding="utf-8"))
        model = CLIPModel.from_pretrained(where, dtype=torch.float32, use_safetensors=True, **local)
        return Clip(
            where, model, AutoTokenizer.from_pretrained(where, **local), settings["image_mean"], settings["image_std"]
        )
    except Exception as error:  # transformers, tokenizers, safetensors and the Hub: each has its own
        told = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"Cannot open the features 'clip:{where}': {told} Expected a folder with a CLIP's config.json, "
            "model.safetensors, tokenizer and preprocessor_config.json, or the id of one in the Hub's cache "
            f"(fetch it once: hf download {where})."
        ) from error


def _inception(where: str) -> Network:
    path = Path(where or Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION)
    if not path.is_file():
        raise ValueError(
            f"Cannot open the features 'inception': there is no file {path}. Download {_SOURCE} and name it as "
            "inception:FILE, or use the features 'embedded' or 'clip:WHERE'."
        )
    try:
        return Inception(path)
    except ModuleNotFoundError as error:
        raise ValueError(
            "The features 'inception' need torch-fidelity: pip install 'linear-token-mixers[metrics]'."
        ) from error
    except pickle.UnpicklingError as error:
        raise ValueError(f"Cannot read Inception's weights from {path}: it is no file of weights alone.") from error
    except Exception as error:  # torch's readers of damaged files raise whatever they come across
        told = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"Cannot read Inception's weights from {path}: {told} Expected the file of {_SOURCE}."
        ) from error
