"""Linear token mixers in the self-attention places of a diffusers UNet: find, mount, unmount, save, load."""

from importlib.util import find_spec

_missing = [name for name in ("diffusers", "transformers", "safetensors") if find_spec(name) is None]
if _missing:
    raise ModuleNotFoundError(
        f"unet_adapters needs {', '.join(_missing)}: run pip install 'linear-token-mixers[unet]'.", name=_missing[0]
    )

from unet_adapters.adapter import MixerAdapter
from unet_adapters.capture import capture_outputs
from unet_adapters.profiles import PROFILES, Profile, profile_of
from unet_adapters.sites import Site, find_sites
from unet_adapters.stamp import load_unet

__all__ = [
    "PROFILES",
    "MixerAdapter",
    "Profile",
    "Site",
    "capture_outputs",
    "find_sites",
    "load_unet",
    "profile_of",
]
