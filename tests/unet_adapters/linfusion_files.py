"""Files in the published LinFusion format, written by hand."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load, save_file
from torch import Tensor

from unet_adapters import find_sites
from unet_adapters.linfusion import CONFIG, WEIGHTS


def module(d: int, mid: int | None) -> dict[str, Tensor]:
    """Random tensors of one published module, written out by hand."""
    shapes = dict.fromkeys(["to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight"], (d, d))
    shapes["to_out.0.bias"] = (d,)
    m = mid or d
    for net in ("to_q_", "to_k_") if mid != -1 else ():
        shapes |= {f"{net}.0.weight": (m, d), f"{net}.0.bias": (m,), f"{net}.1.weight": (m,), f"{net}.1.bias": (m,)}
        shapes |= {f"{net}.3.weight": (d, m), f"{net}.3.bias": (d,)}
    return {name: torch.randn(shape) * shape[-1] ** -0.5 for name, shape in shapes.items()}


def publish(folder: Path, unet: UNet2DConditionModel, mids: list[int | None]) -> Path:
    """A folder as their `save_pretrained` writes it; modules in their order, which is up to the list."""
    selected = list(zip(reversed(find_sites(unet)), mids, strict=True))
    entries = [
        {"dim_n": s.dim, "heads": s.heads, "module_name": s.name, "projection_mid_dim": mid} for s, mid in selected
    ]
    tensors = {f"{i}.{k}": t for i, (s, mid) in enumerate(selected) for k, t in module(s.dim, mid).items()}
    folder.mkdir()
    config = {"_class_name": "LinFusion", "_diffusers_version": "0.30.0", "modules_list": entries}
    (folder / CONFIG).write_text(json.dumps(config))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def load_weights(path: Path) -> dict[str, Tensor]:
    return load(path.read_bytes())  # a copy: tests write over the file, which must not be mapped then
