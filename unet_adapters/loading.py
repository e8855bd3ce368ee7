"""Load an adapter in whichever format a folder or a Hub repository has it."""

from __future__ import annotations

from os import PathLike
from typing import Any

from unet_adapters import checkpoint, linfusion
from unet_adapters.adapter import MixerAdapter
from unet_adapters.hub import fetch


def load_adapter(source: str | PathLike[str], pipe_or_model: Any, *, variant: str | None = None) -> MixerAdapter:
    """Read an adapter of this library or a published LinFusion; it is not mounted.

    Args:
        source: a folder, or the id of a Hub repository.
        pipe_or_model: a diffusers pipeline, or its UNet or transformer.
        variant: of LinFusion weights, "fp16" for instance; None for the plain ones. Adapters have no variants.

    Raises:
        FileNotFoundError: `source` has neither of the two formats, or pickled weights only.
        ValueError: the files are damaged or for another model, or there is no such variant.
    """
    folder = fetch(source, [checkpoint.DESCRIPTION, checkpoint.WEIGHTS, *linfusion.DOWNLOADS])
    if (folder / checkpoint.DESCRIPTION).is_file():
        if variant is not None:
            raise ValueError(f"{source} is an adapter, which has no variants: leave out variant={variant!r}")
        return MixerAdapter.from_pretrained(folder, pipe_or_model)
    if (folder / linfusion.CONFIG).is_file():
        return MixerAdapter.from_linfusion(folder, pipe_or_model, variant=variant)
    raise FileNotFoundError(
        f"{source} holds no adapter: expected {checkpoint.DESCRIPTION}, or the {linfusion.CONFIG} of a LinFusion"
    )
