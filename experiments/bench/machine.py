"""The machine and the package versions that a benchmark's numbers hold for."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("transformers", "diffusers", "triton", "flash-linear-attention", "mamba-ssm")


def describe_machine(device: str) -> dict[str, Any]:
    """Return the processor or GPU, the number of threads (None on a GPU), and the versions of torch and the system."""
    is_gpu = device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name(device) if is_gpu else _processor_name(),
        "threads": None if is_gpu else torch.get_num_threads(),
        "torch": torch.__version__,
        "system": platform.platform(terse=True),
    }


def package_versions() -> dict[str, str]:
    """Return the versions of the installed packages that the numbers may depend on."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def _processor_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
