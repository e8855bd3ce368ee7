"""Linear token mixers in place of the self-attention of a diffusers model: mount, unmount, save, load."""

from importlib.util import find_spec

_missing = [name for name in ("diffusers", "transformers", "safetensors") if find_spec(name) is None]
if _missing:
    raise ModuleNotFoundError(
        f"unet_adapters needs {', '.join(_missing)}: run pip install 'linear-token-mixers[unet]'.", name=_missing[0]
    )

from unet_adapters.adapter import MixerAdapter
from unet_adapters.capture import capture_outputs
from unet_adapters.hosts import Host, find_host, find_sites, register_host
from unet_adapters.hosts.unet_profiles import PROFILES, UNetProfile, find_profile
from unet_adapters.loading import load_adapter
from unet_adapters.sites import Site

__all__ = [
    "PROFILES",
    "Host",
    "MixerAdapter",
    "Site",
    "UNetProfile",
    "capture_outputs",
    "find_host",
    "find_profile",
    "find_sites",
    "load_adapter",
    "register_host",
]
