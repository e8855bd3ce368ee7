"""What capturing records, mounted or not, with and without gradient checkpointing; and what replaying gives."""

from __future__ import annotations

import pytest
import torch

from unet_adapters import MixerAdapter, capture_outputs
from unet_adapters.capture import capture_sites, replay

TWO_D = {"causality": "causal", "scan": "column"}


def names_of(adapter: MixerAdapter) -> list[str]:
    return [site.name for site in adapter.sites]


@torch.no_grad()
def test_a_site_replayed_on_its_own_input_gives_its_own_output(unet, run) -> None:
    adapter = MixerAdapter.build(unet, "linear_attention", **TWO_D)
    for mounted in (False, True):
        adapter.mount() if mounted else adapter.unmount()
        with capture_sites(unet, names_of(adapter)) as calls:
            run(unet)
        assert calls.keys() == set(names_of(adapter))
        for name, call in calls.items():
            assert call.grid is not None and call.grid[0] * call.grid[1] == call.input.shape[1]
            assert call.input.shape == call.output.shape
            assert torch.equal(replay(unet, name, call), call.output), name
    assert {call.grid for call in calls.values()} == {(8, 10), (4, 5)}


@torch.no_grad()
def test_replaying_on_another_grid_is_another_scan(unet, run) -> None:
    adapter = MixerAdapter.build(unet, "linear_attention", **TWO_D).mount()
    with capture_sites(unet, names_of(adapter)) as calls:
        run(unet)
    name, call = next(iter(calls.items()))
    transposed = type(call)(call.input, call.output, (10, 8))
    assert not torch.allclose(replay(unet, name, transposed), call.output)


@torch.no_grad()
def test_each_forward_replaces_what_the_one_before_left(unet, run) -> None:
    adapter = MixerAdapter.build(unet, "linear_attention")
    with capture_outputs(unet, names_of(adapter)) as outputs:
        run(unet)
        first = dict(outputs)
        with adapter.mounted():
            run(unet)
    assert outputs.keys() == first.keys()
    assert all(not torch.equal(outputs[name], first[name]) for name in outputs)


@pytest.mark.parametrize("inside", [False, True], ids=["backward after", "backward inside"])
def test_gradients_of_what_is_captured_are_those_without_checkpointing(unet, run, inside: bool) -> None:
    unet.requires_grad_(False).train()
    adapter = MixerAdapter.build(unet, "linfusion").mount()

    def gradients() -> dict[str, torch.Tensor]:
        adapter.student.zero_grad()
        with capture_sites(unet, names_of(adapter)) as calls:
            run(unet)
            records = dict(calls)
            loss = sum(call.output.square().mean() + call.input.square().mean() for call in records.values())
            if inside:
                loss.backward()
                assert all(calls[name] is records[name] for name in records), "running again must not replace anything"
        if not inside:
            loss.backward()
        return {n: p.grad.clone() for n, p in adapter.student.named_parameters() if p.grad is not None}

    plain = gradients()
    unet.enable_gradient_checkpointing()
    checkpointed = gradients()
    assert plain.keys() == checkpointed.keys() and plain
    assert any(value.any() for value in plain.values())
    for name, value in plain.items():
        torch.testing.assert_close(checkpointed[name], value, msg=name)


def test_nothing_stays_behind(unet, run) -> None:
    adapter = MixerAdapter.build(unet, "linear_attention", **TWO_D)
    with capture_sites(unet, names_of(adapter)):
        pass
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in unet.modules())
    with pytest.raises(ValueError, match="no layer 'nowhere'"), capture_sites(unet, ["nowhere"]):
        pass
