"""The software and hardware that numbers were measured with."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "linear-token-mixers")


def describe_environment() -> dict[str, str]:
    """Return the versions of Python, the system and the main packages, and the device, as a record for results."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed as a package"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {"python": platform.python_version(), "system": platform.platform(terse=True), "device": device, **versions}
