"""FLOPs of joint attention: image and text tokens are both counted, as an explicit count of every product says."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from diffusers import HunyuanDiT2DModel
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from experiments.metrics.cost import count_operations
from mixers.context import TEXT_ATTENTIONS
from tests.unet_adapters.host_models import make_model
from unet_adapters import MixerAdapter, Site, find_host, find_sites
from unet_adapters.highres.memory import CPU_ATTENTION, estimate_memory

KINDS = ["PixArt", "SD3", "SD3.5 medium", "Flux", "HunyuanDiT"]
PIXELS = 8  # along a side of a latent pixel


def make_forward(model: Any, side: int, text_tokens: int) -> Any:
    """A forward pass on latents of side × side, with this many text tokens where the model takes any number."""
    host = find_host(model)
    conditions = host.dummy_conditions()
    if not isinstance(model, HunyuanDiT2DModel):
        conditions["text"] = conditions["text"][:, :text_tokens]
    noisy = torch.randn(host.latent_shape((side, side)))
    return partial(host.predict, noisy, torch.tensor(500), conditions)


def softmax_flops(site: Site, queries: int, keys: int) -> int:
    return 4 * queries * keys * site.dim


def linear_flops(site: Site, length: int, text_tokens: int, mode: str) -> int:
    """Products of linear attention among image tokens and of image tokens with the text."""
    channels = site.dim // site.heads
    numerator = 4 * length * site.dim * channels
    denominator = 4 * length * site.dim
    if not site.text:
        return numerator + (denominator if site.rotary else 0)  # without a rotation, row sums are elementwise work
    if mode == "softmax":
        text = softmax_flops(site, length, text_tokens)
        return numerator + text + (denominator if site.rotary else 0)
    if mode == "shared":  # one more key, and one more channel of the values
        text = 2 * length * (text_tokens + 1) * (2 * channels + 1) * site.heads
    else:
        text = 2 * (length + text_tokens) * site.dim * (channels + 1)
    return numerator + denominator + text


@pytest.mark.parametrize("kind", KINDS)
@given(side=st.sampled_from([4, 8, 12]), text_tokens=st.integers(2, 9), mode=st.sampled_from(TEXT_ATTENTIONS))
@torch.no_grad()
def test_image_and_text_tokens_are_counted(kind: str, side: int, text_tokens: int, mode: str) -> None:
    model = make_model(kind)
    sites = find_sites(model)
    forward = make_forward(model, side, text_tokens)
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        forward()
    expected = stock = counter.get_total_flops()
    length = (side // 2) ** 2
    for site in sites:
        texts = text_tokens if site.text else 0
        expected -= softmax_flops(site, length + texts, length + texts)
        expected += softmax_flops(site, texts, length + texts) + linear_flops(site, length, texts, mode)
    options = {"text": mode} if any(site.text for site in sites) else {}
    with MixerAdapter.build(model, "linear_attention", **options).mounted() as adapter:
        assert count_operations(adapter, side * PIXELS, forward)[0] == expected
    with MixerAdapter.build(model, "softmax").mounted() as adapter:
        assert count_operations(adapter, side * PIXELS, forward)[0] == stock


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["linear_attention", "softmax"])
@torch.no_grad()
def test_a_plan_counts_what_a_call_takes(kind: str, name: str) -> None:
    model = make_model(kind)
    host = find_host(model)
    forward = make_forward(model, 8, 77)
    shapes = host.condition_shapes(text_tokens=77)

    def predict(latents: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        return host.predict(latents, torch.tensor(500), dict(zip(shapes, tensors, strict=True)))

    inputs = [(shape, torch.float32) for shape in (host.latent_shape((8, 8)), *shapes.values())]
    with MixerAdapter.build(model, name).mounted() as adapter:
        counted, _ = count_operations(adapter, 8 * PIXELS, forward)
        assert estimate_memory(predict, model, *inputs, device=torch.device("cpu")).flops == counted
