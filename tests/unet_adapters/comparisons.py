"""Compare outputs, and models before and after."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from unet_adapters import find_sites
from unet_adapters.attention import MixerAttention


def fingerprint(unet: nn.Module) -> dict[str, Any]:
    """What must be the same after everything is undone: weights, classes, processors, hooks, config."""
    return {
        "weights": {name: tensor.clone() for name, tensor in unet.state_dict().items()},
        "classes": [(name, type(module)) for name, module in unet.named_modules()],
        "processors": {name: type(processor) for name, processor in unet.attn_processors.items()},
        "hooks": sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in unet.modules()),
        "config": {key: value for key, value in unet.config.items() if key[0] != "_"},
        "attributes": {site.name: sorted(vars(unet.get_submodule(site.name))) for site in find_sites(unet)},
    }


def assert_same_model(now: dict[str, Any], then: dict[str, Any]) -> None:
    """Bit-identical."""
    weights = now["weights"]
    before = then["weights"]
    assert weights.keys() == before.keys()
    assert all(torch.equal(weights[name], before[name]) for name in weights)
    for key in now.keys() - {"weights"}:
        assert now[key] == then[key], key


def close(left: Tensor, right: Tensor, atol: float = 1e-4) -> bool:
    """Of the same shape and equal within `atol`."""
    return left.shape == right.shape and torch.allclose(left, right, rtol=0, atol=atol)


def mounted_layers(unet: Any) -> list[str]:
    """Names of the layers with a mixer."""
    return [name for name, module in unet.named_modules() if isinstance(module, MixerAttention)]
