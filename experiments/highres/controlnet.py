"""Load a ControlNet that fits a UNet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import ControlNetModel

from experiments.core.errors import first_line
from unet_adapters.weight_files import STEM, closest_variant

_SHARED_SETTINGS = ("in_channels", "block_out_channels", "cross_attention_dim", "addition_embed_type")


def load_controlnet(source: str, unet: Any, variant: str | None = None) -> ControlNetModel:
    """Load a ControlNet for `unet`, frozen, in its dtype and on its device.

    Args:
        source: folder or Hub id.
        unet: the UNet that its residuals are added to.
        variant: the weight files to read. If a folder does not have them, its plain weights or its only variant are
            read, because the command line names the variant of the model.

    Raises:
        ValueError: If there is no ControlNet, or it belongs to another architecture.
    """
    try:
        config = ControlNetModel.load_config(source)
        kind = config.get("_class_name")
        if kind != ControlNetModel.__name__:
            raise ValueError(f"it is a {kind}, not a {ControlNetModel.__name__}.")
        for name in _SHARED_SETTINGS:
            expected = unet.config[name]
            received = config.get(name)
            if not _equal(received, expected):
                raise ValueError(f"it has {name}={received}, but the model's UNet has {expected}.")
        variant = closest_variant(Path(source), STEM, variant) if Path(source).is_dir() else variant
        network = ControlNetModel.from_pretrained(source, dtype=unet.dtype, variant=variant)
    except Exception as error:  # diffusers, safetensors and the Hub: each has its own
        raise ValueError(
            f"--control {source}: cannot be loaded as a ControlNet: {first_line(error)} Pass the folder or Hub id of a "
            "ControlNet that was trained for this model."
        ) from error
    return network.to(unet.device).requires_grad_(False).eval()


def _equal(one: Any, other: Any) -> bool:
    """Compare settings of which JSON has lists and configs have tuples."""
    return (list(one) if isinstance(one, tuple | list) else one) == (
        list(other) if isinstance(other, tuple | list) else other
    )
