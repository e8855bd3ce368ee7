"""Adapters on disk: `adapter.json` (what it is, and for which model) and `adapter.safetensors` (its weights only).

Nothing is ever unpickled. The JSON holds the format's version, the library's version, the fingerprint of the host
(name, dim and heads of every site), the mixer and its config for each site of the adapter, and the SHA-256 of the
weights, so that two files that do not belong together are noticed. Both are written atomically, weights first.
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

from mixers.files import atomic_path
from unet_adapters.hosts import Host
from unet_adapters.hosts.base import Fingerprint
from unet_adapters.hub import fetch
from unet_adapters.site_mixer import SiteMixer
from unet_adapters.sites import Site

FORMAT = 1
DESCRIPTION = "adapter.json"
WEIGHTS = "adapter.safetensors"
DISTRIBUTION = "linear-token-mixers"


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter as read from disk.

    Attributes:
        sites: where its mixers go, in the order of the host.
        site_mixers: the mixer of each site, by site name.
        train_projections: whether `weights` has projections too.
        min_tokens: see `MixerAdapter.build`.
        weights: all tensors of the student, by their names in it.
    """

    sites: list[Site]
    site_mixers: dict[str, SiteMixer]
    train_projections: bool
    min_tokens: int
    weights: dict[str, Tensor]


def save_adapter(
    directory: str | os.PathLike[str],
    fingerprint: Fingerprint,
    site_mixers: Mapping[str, SiteMixer],
    train_projections: bool,
    min_tokens: int,
    student: nn.Module,
) -> None:
    """Write an adapter's two files; existing ones are replaced. Cost: one copy of the weights.

    `fingerprint` is that of the host when the adapter was built: wrapped modules have other names afterwards.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in student.state_dict().items()}
    payload = safetensors.torch.save(weights, metadata={"format": "pt"})
    description = {
        "format": FORMAT,
        "library": {DISTRIBUTION: library_version()},
        "train_projections": train_projections,
        "min_tokens": min_tokens,
        "sites": {
            name: {"mixer": site_mixer.mixer, "config": dict(site_mixer.config)}
            for name, site_mixer in site_mixers.items()
        },
        "fingerprint": fingerprint,
        "weights_sha256": hashlib.sha256(payload).hexdigest(),
    }
    with atomic_path(folder / WEIGHTS, durable=True) as path:
        path.write_bytes(payload)
    with atomic_path(folder / DESCRIPTION, durable=True) as path:
        path.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def read_adapter(source: str | os.PathLike[str], host: Host) -> SavedAdapter:
    """Read an adapter for a host, which is not changed.

    Raises:
        FileNotFoundError: no such adapter, here or on the Hub.
        ValueError: damaged files, a newer format, or a model with other sites.
    """
    folder = fetch(source, [DESCRIPTION, WEIGHTS])
    description = _read_description(folder / DESCRIPTION)
    _require_same_sites(description["fingerprint"], host.fingerprint())
    site_mixers = {name: SiteMixer(entry["mixer"], entry["config"]) for name, entry in description["sites"].items()}
    sites = [site for site in host.sites() if site.name in site_mixers]
    unknown = sorted(set(site_mixers) - {site.name for site in sites})
    if unknown or not site_mixers:
        raise ValueError(f"{folder / DESCRIPTION} is damaged: its sites {unknown} are not in its fingerprint")
    weights = _read_weights(folder / WEIGHTS, description["weights_sha256"])
    return SavedAdapter(sites, site_mixers, description["train_projections"], description["min_tokens"], weights)


def load_weights(student: nn.Module, saved: SavedAdapter) -> None:
    """Copy saved weights into a student of the same shape.

    Raises:
        ValueError: names or shapes differ; the student may have some of the weights already.
    """
    try:
        student.load_state_dict(saved.weights, strict=True)
    except RuntimeError as error:
        reasons = " ".join(str(error).split())
        raise ValueError(f"{WEIGHTS} does not fit the mixers of {DESCRIPTION}: {reasons}") from error


def _require_same_sites(saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    differing = [name for name in {**saved, **here} if saved.get(name) != here.get(name)]
    if differing:
        lines = "".join(f"\n  {n}: saved {saved.get(n, 'none')}, here {here.get(n, 'none')}" for n in differing)
        raise ValueError(f"the adapter was made for another model; these sites differ:{lines}")


def _read_description(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: not an adapter")
    try:
        description: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        file_format = description["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or not an adapter's description: {error}") from error
    if file_format != FORMAT:
        raise ValueError(f"{path} has format {file_format!r}; this version of {DISTRIBUTION} reads format {FORMAT}")
    if not _is_well_formed(description):
        raise ValueError(f"{path} is damaged: entries are missing or of the wrong kind")
    return description


def _is_well_formed(description: dict[str, Any]) -> bool:
    kinds = {"sites": dict, "fingerprint": dict, "weights_sha256": str, "train_projections": bool, "min_tokens": int}
    if not all(type(description.get(key)) is kind for key, kind in kinds.items()) or description["min_tokens"] < 0:
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


def library_version() -> str:
    """Return the version of the installed distribution."""
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return "unknown"
