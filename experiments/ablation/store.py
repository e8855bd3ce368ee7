"""Records on disk: JSON files that are there whole or not at all."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def finished(directory: Path) -> bool:
    """Whether the cell in `directory` is done; a failed, damaged or unfinished one is not and runs again."""
    try:
        return json.loads((directory / "result.json").read_text(encoding="utf-8"))["status"] == "done"
    except (OSError, ValueError, KeyError, TypeError):
        return False


def failure(cell: str, variant: str, seed: int, error: Exception) -> dict[str, Any]:
    """The record of a cell that failed."""
    return {
        "cell": cell,
        "variant": variant,
        "seed": seed,
        "status": "failed",
        "error": f"{type(error).__name__}: {error}",
        "trained_parameters": 0,
        "train_seconds": 0.0,
        "steps": 0,
        "fidelity": [],
        "speed": [],
    }


def environment() -> dict[str, str]:
    """What the numbers were measured with."""
    packages = ("torch", "diffusers", "transformers", "accelerate", "linear-token-mixers")
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except ModuleNotFoundError:
            found[name] = "not installed as a package"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {"python": platform.python_version(), "system": platform.platform(terse=True), "device": device, **found}
