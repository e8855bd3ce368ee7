"""A mounted UNet that is saved says so in its own config, so that it can be read again as what it was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import safetensors.torch
from diffusers.configuration_utils import FrozenDict
from torch import nn

from unet_adapters.checkpoint import Recipe
from unet_adapters.sites import all_sites

if TYPE_CHECKING:
    from unet_adapters.adapter import MixerAdapter

STAMP = "linear_mixers"


def stamp(unet: nn.Module, recipes: Mapping[str, Recipe], min_tokens: int) -> None:
    """Write which mixer is at which site into the config of a diffusers model; other models have none."""
    entries = {n: {"mixer": r.mixer, "config": dict(r.config), "min_tokens": min_tokens} for n, r in recipes.items()}
    _set(unet, {**_stamped(unet), **entries})


def unstamp(unet: nn.Module, sites: list[str]) -> None:
    """Take these sites out of the config again."""
    _set(unet, {name: entry for name, entry in _stamped(unet).items() if name not in sites})


def load_unet(folder: str | PathLike[str], **settings: Any) -> MixerAdapter:
    """Read a UNet that was saved while mounted, and mount it again; its UNet is the adapter's `unet`.

    diffusers alone reads such a folder as softmax attention and drops the mixers' weights with a warning. The
    projections in the file are the student's: what the teacher's were is lost, so unmounting gives softmax attention
    on the student's projections. `MixerAdapter.save_pretrained` keeps both; this is for what was saved by mistake.

    Args:
        folder: of the UNet, with config.json and safetensors files.
        **settings: of its class's `from_pretrained`. The class is what config.json names: a UNet2DConditionModel, a
            UNetMotionModel, a ControlNetModel.

    Raises:
        ValueError: the UNet was not mounted when it was saved, it is no model of diffusers, its sites are not those of
            its config, or weights of a mixer are missing.
    """
    from unet_adapters.adapter import MixerAdapter

    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    entries = config.get(STAMP)
    if not entries:
        raise ValueError(f"{folder} was saved without mixers: read it with UNet2DConditionModel.from_pretrained")
    kind: Any = getattr(diffusers, str(config.get("_class_name")), None)
    known = isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)
    if not known:
        raise ValueError(f"{folder} holds a {config.get('_class_name')}, which is no model of diffusers")
    unet = kind.from_pretrained(folder, **settings)
    unstamp(unet, list(entries))
    sites = {site.name: site for site in all_sites(unet)}
    unknown = sorted(set(entries) - set(sites))
    if unknown:
        raise ValueError(f"{folder} names sites that its UNet has not: {', '.join(unknown)}")
    recipes = {name: Recipe(entry["mixer"], entry["config"]) for name, entry in entries.items()}
    least = max(entry["min_tokens"] for entry in entries.values())
    adapter = MixerAdapter(unet, [s for n, s in sites.items() if n in recipes], recipes, False, least)
    wanted = adapter.student.state_dict()
    found = {
        n: t for file in sorted(folder.glob("*.safetensors")) for n, t in safetensors.torch.load_file(file).items()
    }
    missing = [name for name in wanted if name not in found]
    if missing:
        raise ValueError(f"{folder} lacks weights of its mixers, {missing[0]} among {len(missing)}")
    adapter.student.load_state_dict({name: found[name] for name in wanted})
    return adapter.mount()


def _stamped(unet: nn.Module) -> dict[str, Any]:
    return dict(getattr(getattr(unet, "config", None), STAMP, None) or {})


def _set(unet: Any, entries: dict[str, Any]) -> None:
    if not hasattr(unet, "register_to_config"):
        return
    rest = {key: value for key, value in unet.config.items() if key != STAMP}
    config = FrozenDict({**rest, STAMP: entries} if entries else rest)
    # An IP-Adapter's loader sets attributes of the config that differ from its entries.
    vars(config).update({key: value for key, value in vars(unet.config).items() if key != STAMP})
    unet._internal_dict = config
