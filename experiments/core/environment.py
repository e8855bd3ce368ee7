"""The software and hardware that numbers were measured with."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "linear-token-mixers")


def describe_environment() -> dict[str, str]:
    """Return the versions of Python, the system and the main packages, the device and the commit, for records."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed as a package"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
        "device": device,
        **versions,
        "commit": _commit(),
    }


def _commit() -> str:
    """The short hash of the code's commit, with + if tracked files differ from it; empty outside a git checkout."""
    if not _git("ls-files", Path(__file__).name):  # installed inside the checkout of another project
        return ""
    return _git("describe", "--always", "--exclude=*", "--dirty=+")


def _git(*arguments: str) -> str:
    """Run git beside this file; returns "" if it fails or is not installed."""
    try:
        completed = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return completed.stdout.strip()
