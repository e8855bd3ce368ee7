"""Every registered mixer under everything that hooks, moves, casts or runs a layer again.

A mixer that reads a weight past its layer's call sees what the hooks left behind: nothing, or numbers of float8. The
rows of the table in docs/howto/works_with.md are asserted for one mixer elsewhere; here each mixer meets each hook.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from torch import nn

from mixers import list_mixers
from unet_adapters import MixerAdapter

Host = Any


def offload_sequentially(unet: Host) -> None:
    accelerate.cpu_offload(unet, execution_device="cpu")


def offload_the_model(unet: Host) -> None:
    accelerate.cpu_offload_with_hook(unet, execution_device="cpu")


def offload_groups(unet: Host) -> None:
    unet.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")


EXACT: dict[str, Callable[[Host], Any]] = {
    "sequential CPU offload": offload_sequentially,
    "model CPU offload": offload_the_model,
    "group offload": offload_groups,
    "gradient checkpointing": lambda unet: unet.train().enable_gradient_checkpointing(),
}

every_mixer = pytest.mark.parametrize("name", list_mixers())


def mount(unet: Host, name: str) -> MixerAdapter:
    """Mounted, with weights that are all off their start."""
    torch.manual_seed(3)
    adapter = MixerAdapter.build(unet, name)
    for parameter in adapter.student.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return adapter.mount()


@every_mixer
@pytest.mark.parametrize("hook", EXACT.values(), ids=EXACT)
@torch.no_grad()
def test_hooks_change_nothing(unet, run, name, hook) -> None:
    mount(unet, name)
    expected = run(unet)
    hook(unet)
    torch.testing.assert_close(run(unet), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(run(unet), expected, rtol=1e-4, atol=1e-5)  # also when called again


@every_mixer
@torch.no_grad()
def test_layerwise_casting_computes_with_the_rounded_weights(unet, run, name) -> None:
    mount(unet, name)
    cast = copy.deepcopy(unet)
    cast.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    for module, twin in zip(unet.modules(), cast.modules(), strict=True):
        if _is_cast(twin):
            for parameter in module.parameters(recurse=False):
                parameter.copy_(parameter.to(torch.float8_e4m3fn))
    result = run(cast)
    assert result.isfinite().all()
    torch.testing.assert_close(result, run(unet), rtol=1e-3, atol=1e-4)


def _is_cast(module: nn.Module) -> bool:
    hooks = getattr(module, "_diffusers_hook", None)
    return hooks is not None and hooks.get_hook("layerwise_casting") is not None


@every_mixer
@torch.no_grad()
def test_a_mounted_model_is_copied_and_pickled(unet, run, name) -> None:
    mount(unet, name)
    expected = run(unet)
    assert torch.equal(run(copy.deepcopy(unet)), expected)
    assert torch.equal(run(pickle.loads(pickle.dumps(unet))), expected)
