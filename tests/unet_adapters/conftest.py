"""A tiny random UNet with four self-attention sites, its inputs, and what tests do with them again and again."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from unet_adapters import MixerAdapter

Run = Callable[[nn.Module], Tensor]


@cache
def _original() -> UNet2DConditionModel:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(1)
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=2,
            cross_attention_dim=12,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )
        for name, parameter in unet.named_parameters():  # sharper attention: a mixer must change the output visibly
            if ".attn1.to_" in name:
                parameter.data.mul_(4)
    return unet.eval()


@pytest.fixture(scope="session")
def tiny_unet() -> UNet2DConditionModel:
    """The random UNet itself, for tests that copy it."""
    return _original()


@pytest.fixture
def unet() -> UNet2DConditionModel:
    """A fresh copy of one random UNet, in eval mode."""
    return deepcopy(_original())


@pytest.fixture
def run() -> Run:
    """Forward of a UNet on fixed inputs, (2, 4, 8, 10): not square."""
    generator = torch.Generator().manual_seed(2)
    sample = torch.randn(2, 4, 8, 10, generator=generator)
    words = torch.randn(2, 3, 12, generator=generator)

    def forward(unet: Any) -> Tensor:
        return unet(sample.to(unet.dtype), 7, words.to(unet.dtype)).sample

    return forward


@pytest.fixture
def train(run: Run) -> Callable[..., None]:
    """A few steps of the student towards zero, mounted."""

    def steps(adapter: MixerAdapter, count: int = 3) -> None:
        optimizer = torch.optim.SGD(adapter.student.parameters(), lr=1e-2)
        for _ in range(count):
            with adapter.mounted():
                optimizer.zero_grad()
                run(adapter.model).square().mean().backward()
                optimizer.step()
        adapter.model.zero_grad()

    return steps


@pytest.fixture
def weights() -> Callable[[nn.Module], dict[str, Tensor]]:
    """A copy of a module's weights, to compare with later."""
    return lambda module: {name: tensor.clone() for name, tensor in module.state_dict().items()}
