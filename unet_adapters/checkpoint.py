"""Adapters on disk: `adapter.json` (what it is, for which UNet) and `adapter.safetensors` (its weights only).

Nothing is ever unpickled. The JSON holds the format's version, the library's version, the UNet's fingerprint (name, dim
and heads of every site), the mixer and its config for each site of the adapter, and the SHA-256 of the weights, so that
two files that do not belong together are noticed. Both are written aside and moved into place, weights first.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from mixers import create_mixer
from unet_adapters.hub import fetch
from unet_adapters.sites import Site, all_sites

FORMAT = 1
DESCRIPTION, WEIGHTS = "adapter.json", "adapter.safetensors"
DISTRIBUTION = "linear-token-mixers"
OF_THE_SITE = frozenset({"name", "dim", "heads", "own_projections"})  # config entries that a site or its file decides


@dataclass(frozen=True)
class Recipe:
    """How to make the mixer of one site again: its registered name and its config, as plain JSON."""

    mixer: str
    config: Mapping[str, Any]

    def make(self, site: Site) -> Any:
        """A new mixer, without projections, with random weights."""
        options = {key: value for key, value in self.config.items() if key not in OF_THE_SITE}
        return create_mixer(self.mixer, site.dim, site.heads, own_projections=False, **options)


@dataclass(frozen=True)
class Saved:
    """An adapter as read from disk: its sites, the recipe of each, and its weights by name."""

    sites: list[Site]
    recipes: dict[str, Recipe]
    train_projections: bool
    min_tokens: int
    weights: dict[str, Tensor]


def save(
    directory: str | os.PathLike[str],
    unet: nn.Module,
    recipes: Mapping[str, Recipe],
    train_projections: bool,
    min_tokens: int,
    student: nn.Module,
) -> None:
    """Write an adapter's two files; a directory that has them already is updated. Cost: one copy of the weights."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in student.state_dict().items()}
    payload = safetensors.torch.save(weights, metadata={"format": "pt"})
    description = {
        "format": FORMAT,
        "library": {DISTRIBUTION: _library_version()},
        "train_projections": train_projections,
        "min_tokens": min_tokens,
        "sites": {name: {"mixer": recipe.mixer, "config": dict(recipe.config)} for name, recipe in recipes.items()},
        "fingerprint": fingerprint(unet),
        "weights_sha256": hashlib.sha256(payload).hexdigest(),
    }
    text = json.dumps(description, indent=2) + "\n"
    _write(folder / WEIGHTS, payload)
    _write(folder / DESCRIPTION, text.encode())


def load(source: str | os.PathLike[str], unet: nn.Module) -> Saved:
    """Read an adapter for `unet`, which is only looked at.

    Raises:
        FileNotFoundError: no such adapter, here or on the Hub.
        ValueError: damaged files, a newer format, or a UNet with other sites.
    """
    folder = fetch(source, [DESCRIPTION, WEIGHTS])
    description = _describe(folder / DESCRIPTION)
    _compare(description["fingerprint"], fingerprint(unet))
    sites = {site.name: site for site in all_sites(unet)}
    recipes = {name: Recipe(entry["mixer"], entry["config"]) for name, entry in description["sites"].items()}
    unknown = sorted(set(recipes) - set(sites))
    if unknown or not recipes:
        raise ValueError(f"{folder / DESCRIPTION} is damaged: its sites {unknown} are not in its fingerprint")
    weights = _read_weights(folder / WEIGHTS, description["weights_sha256"])
    chosen = [sites[name] for name in sites if name in recipes]
    return Saved(chosen, recipes, description["train_projections"], description["min_tokens"], weights)


def fill(student: nn.Module, saved: Saved) -> None:
    """Copy saved weights into a student of the same shape.

    Raises:
        ValueError: names or shapes differ (the student is then thrown away by its maker; the UNet has no part in it).
    """
    try:
        student.load_state_dict(saved.weights, strict=True)
    except RuntimeError as error:
        raise ValueError(f"{WEIGHTS} does not fit the mixers of {DESCRIPTION}: {error}") from error


def fingerprint(unet: nn.Module) -> dict[str, dict[str, int]]:
    """Name -> dim and heads of every site of a UNet: an adapter fits a UNet with the same."""
    return {site.name: {"dim": site.dim, "heads": site.heads} for site in all_sites(unet)}


def _compare(saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    differing = [name for name in {**saved, **here} if saved.get(name) != here.get(name)]
    if differing:
        lines = "".join(f"\n  {n}: saved {saved.get(n, 'none')}, here {here.get(n, 'none')}" for n in differing)
        raise ValueError(f"the adapter was made for another UNet; these sites differ:{lines}")


def _describe(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: not an adapter")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        found = description["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged or not an adapter's description: {error}") from error
    if found != FORMAT:
        raise ValueError(f"{path} has format {found!r}; this version of {DISTRIBUTION} reads format {FORMAT}")
    if not _well_formed(description):
        raise ValueError(f"{path} is damaged: entries are missing or of the wrong kind")
    return description


def _well_formed(description: dict[str, Any]) -> bool:
    kinds = {"sites": dict, "fingerprint": dict, "weights_sha256": str, "train_projections": bool, "min_tokens": int}
    if not all(isinstance(description.get(key), kind) for key, kind in kinds.items()):
        return False
    entries = description["sites"].values()
    return all(
        isinstance(e, dict) and isinstance(e.get("mixer"), str) and isinstance(e.get("config"), dict) for e in entries
    )


def _read_weights(path: Path, digest: str) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: the adapter has no weights")
    payload = path.read_bytes()
    if hashlib.sha256(payload).hexdigest() != digest:
        raise ValueError(f"{path} is truncated, damaged or from another save than its {DESCRIPTION}")
    try:
        return safetensors.torch.load(payload)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error


def _write(path: Path, content: bytes) -> None:
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _library_version() -> str:
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return "unknown"
