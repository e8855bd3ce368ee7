"""Mixers under the hooks of other libraries: every sublayer is called, and its result is left alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from mixers import TokenMixer, list_mixers
from mixers.registry import get_mixer_entry
from mixers.testing import ConformanceCase, conformance_cases
from mixers.testing.inputs import grid_of

accelerate = pytest.importorskip("accelerate")
hooks = pytest.importorskip("diffusers.hooks")

LENGTH = 12


def default_configurations() -> list[ConformanceCase]:
    """The published and the drop-in form of every mixer, with the paper's causality and normalization."""
    entries = {name: get_mixer_entry(name) for name in list_mixers()}
    return [
        configuration
        for configuration in conformance_cases(list_mixers())
        if configuration.causality == entries[configuration.name].default_causality
        and configuration.normalize == entries[configuration.name].default_normalize
    ]


CONFIGURATIONS = default_configurations()


def run(mixer: TokenMixer, x: Tensor) -> Tensor:
    return mixer(x, grid=grid_of(mixer, x.shape[1]))


def float32(configuration: ConformanceCase) -> tuple[TokenMixer, Tensor]:
    return configuration().float(), torch.randn(2, LENGTH, 12)


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
@torch.no_grad()
def test_sequential_cpu_offload_changes_nothing(configuration: ConformanceCase) -> None:
    mixer, x = float32(configuration)
    expected = run(mixer, x)
    accelerate.cpu_offload(mixer, execution_device=torch.device("cpu"))
    assert all(parameter.device.type == "meta" for parameter in mixer.parameters())
    for _ in range(2):
        assert torch.equal(run(mixer, x), expected)


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
@torch.no_grad()
def test_layerwise_casting_computes_with_the_stored_weights(configuration: ConformanceCase) -> None:
    """Layers stored in float8 and computed in bfloat16 equal layers whose weights were rounded to float8 once."""
    mixer = configuration().bfloat16()
    x = torch.randn(2, LENGTH, 12, dtype=torch.bfloat16)
    rounded = copy.deepcopy(mixer)
    for layer in _castable(rounded):
        for parameter in layer.parameters(recurse=False):
            parameter.copy_(parameter.to(torch.float8_e4m3fn))
    hooks.apply_layerwise_casting(mixer, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert all(p.dtype == torch.float8_e4m3fn for layer in _castable(mixer) for p in layer.parameters(recurse=False))
    assert torch.equal(run(mixer, x), run(rounded, x))


def _castable(mixer: nn.Module) -> Iterator[nn.Module]:
    for layer in mixer.modules():
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d):
            yield layer


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
@torch.no_grad()
def test_results_of_layers_are_not_overwritten(configuration: ConformanceCase) -> None:
    """A forward hook that keeps a result still has it after the forward."""
    mixer, x = float32(configuration)
    results: list[tuple[str, Tensor, Tensor]] = []
    for name, layer in mixer.named_modules():
        layer.register_forward_hook(
            lambda module, inputs, output, name=name: results.extend(
                (name, t, t.clone()) for t in (output if isinstance(output, tuple) else (output,))
            )
        )
    run(mixer, x)
    assert results
    changed = [name for name, result, value in results if not torch.equal(result, value)]
    assert not changed, f"overwritten after they were returned: {changed}"
