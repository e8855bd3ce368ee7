"""Below `min_tokens` a mounted model is the teacher, whatever is done to it meanwhile and by however many threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy

import accelerate
import pytest
import torch
from diffusers.hooks import apply_layerwise_casting
from peft import LoraConfig
from torch import Tensor

from unet_adapters import MixerAdapter

SMALL = (4, 4)  # latents: 16 and 4 tokens
LARGE = (8, 10)  # 80 and 20 tokens


def inputs(size: tuple[int, int], seed: int = 0) -> tuple[Tensor, int, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 4, *size, generator=generator), 7, torch.randn(2, 3, 12, generator=generator)


@torch.no_grad()
def output(unet, size: tuple[int, int], seed: int = 0) -> Tensor:
    return unet(*inputs(size, seed)).sample


@pytest.fixture
def adapter(unet, train) -> MixerAdapter:
    """Mounted, trained away from the teacher; the teacher for the small size."""
    adapter = MixerAdapter.build(unet, "linfusion", min_tokens=20)
    train(adapter)
    return adapter


def add_lora(unet) -> None:
    torch.manual_seed(5)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), "style")


def cast_layers(unet) -> None:
    apply_layerwise_casting(unet, torch.bfloat16, torch.float32)


CHANGES = {
    "LoRA": add_lora,
    "LoRA, fused": lambda unet: (add_lora(unet), unet.fuse_lora()),
    "LoRA, fused at half scale": lambda unet: (add_lora(unet), unet.fuse_lora(lora_scale=0.5)),
    "LoRA, disabled": lambda unet: (add_lora(unet), unet.disable_lora()),
    "LoRA, fused and unfused": lambda unet: (add_lora(unet), unet.fuse_lora(), unet.unfuse_lora()),
    "fused projections": lambda unet: unet.fuse_qkv_projections(),
    "attention slices": lambda unet: unet.set_attention_slice("max"),
    "sequential offload": lambda unet: accelerate.cpu_offload(unet, execution_device="cpu"),
    "group offload": lambda unet: unet.enable_group_offload(torch.device("cpu"), offload_type="leaf_level"),
    "double precision": lambda unet: unet.double().float(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_acts_on_the_teacher_as_on_a_stock_model(adapter, change) -> None:
    stock = deepcopy(adapter.model)
    change(stock)
    expected = output(stock, SMALL)
    adapter.mount()
    mixed = output(adapter.model, LARGE)
    change(adapter.model)
    torch.testing.assert_close(output(adapter.model, SMALL), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(output(adapter.model, LARGE), output(stock, LARGE), rtol=0, atol=1e-3)
    assert mixed.isfinite().all()


def test_calls_leave_no_trace_on_the_layers(adapter) -> None:
    adapter.mount()
    before = {name: id(parameter) for name, parameter in adapter.model.named_parameters()}
    output(adapter.model, SMALL)
    assert {name: id(parameter) for name, parameter in adapter.model.named_parameters()} == before


@pytest.mark.parametrize("mixer", ["linfusion", "column scan"])
def test_threads_may_share_a_mounted_model(unet, train, mixer) -> None:
    """Nothing of a call is stored on a layer: neither the teacher's weights nor the size of the image."""
    if mixer == "linfusion":
        adapter = MixerAdapter.build(unet, mixer, min_tokens=20)
    else:
        adapter = MixerAdapter.build(unet, "linear_attention", causality="causal", scan="column")
    train(adapter)
    adapter.mount()
    calls = [((4, 4), (8, 10), (10, 8), (4, 6))[i % 4] for i in range(40)]
    expected = {size: output(unet, size) for size in set(calls)}
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda size: output(unet, size), calls))
    for size, result in zip(calls, results, strict=True):
        torch.testing.assert_close(result, expected[size])
