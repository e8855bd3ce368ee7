"""A mounted model that is saved says so in its own config.json, so that it can be read as what it was."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import safetensors.torch
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn

from unet_adapters.site_mixer import SiteMixer
from unet_adapters.weight_files import STEM, find_weight_files

CONFIG_KEY = "linear_mixers"


def record_mixers(
    model: nn.Module, site_mixers: Mapping[str, SiteMixer], min_tokens: int, train_projections: bool
) -> None:
    """Write which mixer is at which site into the config of a diffusers model; other models have none."""
    entries = {
        name: {
            "mixer": site_mixer.mixer,
            "config": dict(site_mixer.config),
            "min_tokens": min_tokens,
            "train_projections": train_projections,
        }
        for name, site_mixer in site_mixers.items()
    }
    _write(model, {**_read(model), **entries})


def erase_mixers(model: nn.Module, site_names: Iterable[str]) -> None:
    """Remove these sites from the config again."""
    names = set(site_names)
    _write(model, {name: entry for name, entry in _read(model).items() if name not in names})


def read_mounted_model(
    folder: Path, variant: str | None, settings: Mapping[str, Any]
) -> tuple[Any, dict[str, SiteMixer], int]:
    """Read a model that was saved while mounted, without its mixers.

    Returns:
        The model, which has the student's projections and softmax attention; the mixers of its sites; min_tokens.

    Raises:
        ValueError: it was not mounted when it was saved, its class is not a diffusers model, or its sites below
            `min_tokens` cannot be restored.
        FileNotFoundError: no config.json, or no safetensors weights.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: expected the folder of a model, {folder / 'unet'} perhaps")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        entries = config.get(CONFIG_KEY)
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or not the configuration of a model: {error}") from error
    class_name = config.get("_class_name")
    if not entries:
        raise ValueError(f"{folder} was saved without mixers: read it with {class_name}.from_pretrained")
    if not isinstance(entries, dict) or not all(map(_is_well_formed, entries.values())):
        raise ValueError(f"{path} is damaged: entries of {CONFIG_KEY} are missing or of the wrong kind")
    model_class: Any = getattr(diffusers, str(class_name), None)
    if not _is_model(model_class):
        raise ValueError(f"{folder} holds a {class_name}, which is not a diffusers model")
    min_tokens = _common_min_tokens(path, entries)
    find_weight_files(folder, STEM, variant)
    model = model_class.from_pretrained(folder, variant=variant, use_safetensors=True, **settings)
    erase_mixers(model, entries)
    site_mixers = {name: SiteMixer(entry["mixer"], entry["config"]) for name, entry in entries.items()}
    return model, site_mixers, min_tokens


def _common_min_tokens(path: Path, entries: Mapping[str, Mapping[str, Any]]) -> int:
    """The `min_tokens` of all sites.

    Raises:
        ValueError: it differs between them, or a site needs the teacher's projections below it.
    """
    values = sorted({entry["min_tokens"] for entry in entries.values()})
    if len(values) > 1:
        listing = " and ".join(map(str, values))
        raise ValueError(
            f"{path} has sites with min_tokens {listing}, of more than one adapter, and can be restored with one value "
            "only: save each adapter with save_pretrained"
        )
    if values[0] and any(entry["train_projections"] for entry in entries.values()):
        raise ValueError(
            f"{path}: below min_tokens={values[0]} its sites use the teacher's projections, which a saved model lacks: "
            "save the adapter with save_pretrained, or set min_tokens to 0 in the file to run the mixers at every size"
        )
    return int(values[0])


def _is_well_formed(entry: Any) -> bool:
    kinds = {"mixer": str, "config": dict, "min_tokens": int, "train_projections": bool}
    return isinstance(entry, dict) and all(type(entry.get(name)) is kind for name, kind in kinds.items())


def read_mixer_weights(folder: Path, variant: str | None, names: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of these names, from the files that `from_pretrained` reads.

    Raises:
        ValueError: a tensor is missing.
    """
    expected = set(names)
    tensors: dict[str, Tensor] = {}
    for file in find_weight_files(folder, STEM, variant):
        with safetensors.safe_open(file, framework="pt") as weights:
            tensors |= {name: weights.get_tensor(name) for name in expected & set(weights.keys())}
    missing = sorted(expected - set(tensors))
    if missing:
        raise ValueError(f"{folder} lacks weights of its mixers, {missing[0]} among {len(missing)}")
    return tensors


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)


def _read(model: nn.Module) -> dict[str, Any]:
    return dict(getattr(getattr(model, "config", None), CONFIG_KEY, None) or {})


def _write(model: Any, entries: dict[str, Any]) -> None:
    if not hasattr(model, "register_to_config"):
        return
    others = {key: value for key, value in model.config.items() if key != CONFIG_KEY}
    config = FrozenDict({**others, CONFIG_KEY: entries} if entries else others)
    # An IP-Adapter's loader sets attributes of the config that differ from its entries.
    vars(config).update({key: value for key, value in vars(model.config).items() if key != CONFIG_KEY})
    model._internal_dict = config
