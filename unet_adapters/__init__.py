"""Linear token mixers in the self-attention places of a diffusers UNet: find, mount, unmount, save, load."""

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
