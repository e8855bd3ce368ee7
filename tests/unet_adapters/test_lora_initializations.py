"""LoRAs whose initialization changes the base weights (PiSSA): an adapter built afterwards starts from the change."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig

from unet_adapters import MixerAdapter, find_sites

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def add_pissa(unet) -> None:
    torch.manual_seed(5)
    unet.add_adapter(LoraConfig(r=2, target_modules=TARGETS, init_lora_weights="pissa"), "pissa")


def base_weights(unet) -> dict[str, torch.Tensor]:
    names = [f"{site.name}.{projection}" for site in find_sites(unet) for projection in TARGETS]
    return {name: unet.get_submodule(name).get_base_layer().weight for name in names}


@pytest.mark.parametrize("train_projections", [True, False])
def test_an_adapter_built_afterwards_computes_with_the_changed_weights(unet, run, train_projections: bool) -> None:
    before = run(unet)
    original = {name: module.weight.clone() for name, module in unet.named_modules() if name.endswith(tuple(TARGETS))}
    add_pissa(unet)
    torch.testing.assert_close(run(unet), before, rtol=1e-4, atol=1e-5)  # what is subtracted, the LoRA adds
    changed = {name: weight.clone() for name, weight in base_weights(unet).items()}
    assert all(not torch.allclose(weight, original[name]) for name, weight in changed.items())
    adapter = MixerAdapter.build(unet, "softmax", train_projections=train_projections)
    for name, parameter in adapter.parameters_by_name().items():
        assert name.endswith(".bias") or torch.equal(parameter, changed[name.removesuffix(".weight")]), name
    with adapter.mounted():
        assert all(torch.equal(weight, changed[name]) for name, weight in base_weights(unet).items())
        torch.testing.assert_close(run(unet), before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(run(unet), before, rtol=1e-4, atol=1e-5)


def test_without_trained_projections_a_later_change_is_seen(unet, run) -> None:
    before = run(unet)
    adapter = MixerAdapter.build(unet, "softmax", train_projections=False)
    add_pissa(unet)
    with adapter.mounted():
        torch.testing.assert_close(run(unet), before, rtol=1e-4, atol=1e-5)


def test_a_change_while_mounted_is_the_student_s_alone(unet, run) -> None:
    teacher = {site.name: unet.get_submodule(f"{site.name}.to_q").weight.clone() for site in find_sites(unet)}
    adapter = MixerAdapter.build(unet, "softmax").mount()
    before = run(unet)
    add_pissa(unet)
    torch.testing.assert_close(run(unet), before, rtol=1e-4, atol=1e-5)
    adapter.unmount()
    for name, weight in teacher.items():
        assert torch.equal(unet.get_submodule(f"{name}.to_q").get_base_layer().weight, weight)
