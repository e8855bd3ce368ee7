"""Which safetensors files of a folder hold a model's weights: one file or shards, of a variant or not."""

from __future__ import annotations

import json
from pathlib import Path

STEM = "diffusion_pytorch_model"
"""How the names of diffusers' weight files begin."""

PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}


def find_weight_files(folder: Path, stem: str, variant: str | None = None) -> list[Path]:
    """The files that diffusers' `from_pretrained(folder, variant=variant)` reads.

    A sharded checkpoint (`<stem>.safetensors.index[.<variant>].json`) goes before a single file
    (`<stem>[.<variant>].safetensors`), as there.

    Raises:
        FileNotFoundError: no such weights; the message says which variants exist, or that the weights are pickled.
        ValueError: the index of a sharded checkpoint is damaged.
    """
    suffix = f".{variant}" if variant else ""
    index = folder / f"{stem}.safetensors.index{suffix}.json"
    if index.is_file():
        return [folder / name for name in _shards(index)]
    single = folder / f"{stem}{suffix}.safetensors"
    if single.is_file():
        return [single]
    raise FileNotFoundError(f"{folder} has no {single.name}: {_explain(folder, stem)}")


def list_variants(folder: Path, stem: str) -> list[str]:
    """Variants with weights in the folder, sorted; the plain weights are not one."""
    singles = (path.name[len(stem) + 1 : -len(".safetensors")] for path in folder.glob(f"{stem}.*.safetensors"))
    indices = (path.name.split(".index.")[1] for path in folder.glob(f"{stem}.safetensors.index.*.json"))
    names = {*singles, *(name.removesuffix(".json") for name in indices)}
    return sorted(name for name in names if name and "-of-" not in name)


def closest_variant(folder: Path, stem: str, variant: str | None = None) -> str | None:
    """Return `variant` if the folder has it, else None for its plain weights, else the only variant that there is."""
    variants = list_variants(folder, stem)
    if variant in variants:
        return variant
    has_plain = any((folder / f"{stem}{ending}").is_file() for ending in (".safetensors", ".safetensors.index.json"))
    return variants[0] if len(variants) == 1 and not has_plain else None


def _shards(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is damaged: expected JSON with a weight_map") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index} is damaged: {name!r} is not the name of a safetensors file")
        if not (index.parent / name).is_file():
            raise FileNotFoundError(f"{index.parent / name} does not exist: {index.name} lists it as a shard")
    return names


def _explain(folder: Path, stem: str) -> str:
    variants = list_variants(folder, stem)
    if variants:
        return f"it has the variant {', '.join(variants)}; pass variant={variants[0]!r}"
    pickles = [path.name for path in sorted(folder.iterdir()) if path.suffix in PICKLES] if folder.is_dir() else []
    if pickles:
        return f"{pickles[0]} is a pickle, which is never read; save the model with safe_serialization=True"
    return "expected weights in the safetensors format"
