"""Plans of large images: what is foreseen is what is used, and a budget is kept."""

from __future__ import annotations

import re
from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import pytest
import torch
from diffusers import Transformer2DModel
from torch import Tensor, nn

from tests.unet_adapters import pipelines
from unet_adapters import MixerAdapter
from unet_adapters.highres import SAVINGS, Tiling, TooLittleMemory, decode, memory
from unet_adapters.highres.memory import Allocations, foresee
from unet_adapters.highres.plan import (
    _choices,
    foresee_decoding,
    foresee_step,
    latent_unit,
    make_plan,
    pixels_a_place,
    weight_bytes,
)
from unet_adapters.highres.savings import save_memory

FAMILIES = ("text-to-image", "SDXL")


@pytest.fixture(params=FAMILIES)
def pipe(request: pytest.FixtureRequest) -> Any:
    made = pipelines.make(request.param)
    made.set_progress_bar_config(disable=True)
    return made


def test_peaks_are_counted() -> None:
    def run(x: Tensor) -> Tensor:
        y = x + 1  # 400 bytes
        z = torch.cat([y, y])  # 800 more
        del y
        return z[:10].clone()  # 40 more, while z lives

    found = foresee(run, nn.Module(), ((100,), torch.float32), device=torch.device("cpu"))
    assert (found.peak, found.largest) == (1200, 200)


def test_convolutions_on_a_cpu_copy_their_input_and_their_weights() -> None:
    convolution = nn.Conv2d(4, 2, 3, padding=1, bias=False)
    shape = ((1, 4, 8, 8), torch.float32)
    peaks = [
        foresee(lambda x: convolution(x), convolution, shape, device=torch.device("cpu"), on_cpu=on_cpu).peak
        for on_cpu in (None, False)
    ]
    assert peaks == [4 * (2 * 64 + 4 * 64 + 2 * 4 * 9), 4 * 2 * 64]


def test_what_is_foreseen_is_what_is_allocated(pipe: Any) -> None:
    for savings in ((), ("guidance", "activations", "feed_forward")):
        foreseen = foresee_step(pipe, (64, 96), savings, 3.0)
        real = Allocations(on_cpu=True)
        batch = 1 if savings else 2
        text = torch.zeros(batch, 77, pipe.unet.config.cross_attention_dim)
        told = {"text_embeds": torch.zeros(batch, pipelines.WORDS), "time_ids": torch.zeros(batch, 6)}
        x = torch.zeros(batch, 4, 32, 48)
        with torch.no_grad(), save_memory(pipe.unet, savings), real:
            pipe.unet(x, torch.tensor(500), text, return_dict=False, added_cond_kwargs=told)
        assert abs(real.peak - foreseen.peak) < 0.02 * real.peak


@pytest.mark.parametrize("size", [(128, 128), (192, 80), (48, 192)])
def test_the_decoding_foreseen_is_that_of_the_real_tiles(size: tuple[int, int]) -> None:
    pipe, tiling = pipelines.make(), Tiling(tile=24, margin=4, blend=2, overview=40, whole_middle=0)
    foreseen = foresee_decoding(pipe, size, tiling)
    real = Allocations(on_cpu=True)
    latents = pipelines.noise(1, 4, *(side // pixels_a_place(pipe) for side in size))
    with real:
        decode(pipe.vae, latents, tiling)
    image = size[0] * size[1] * 3 * (1 + 4)  # the bytes of the image, and rows that are not finished
    assert real.peak - image < 1.02 * foreseen.peak
    assert 0.98 * foreseen.peak < real.peak


def test_a_plan_keeps_to_its_budget_or_says_what_is_enough(pipe: Any) -> None:
    size = (latent_unit(pipe) * 16,) * 2
    free = make_plan(pipe, size, base=32, device="cuda")
    assert free.savings == ("activations",) and free.stages[-1].stage.size == size
    assert [s.peak for s in free.stages] == sorted(s.peak for s in free.stages)
    tight = make_plan(pipe, size, base=64, device="cuda", budget=free.peak - 1)
    assert len(tight.savings) > 1 and tight.peak < free.peak
    with pytest.raises(TooLittleMemory, match="with every saving it needs") as refusal:
        make_plan(pipe, size, base=64, device="cuda", budget=weight_bytes(pipe))
    enough = re.search(r"it needs ([\d.]+) ([KM])iB", str(refusal.value))
    assert enough is not None
    budget = int(float(enough[1]) * 1024 ** (1 + "KM".index(enough[2])))
    assert weight_bytes(pipe) < make_plan(pipe, size, base=64, device="cuda", budget=budget).peak <= budget


def test_a_gpu_that_is_not_there_can_be_planned_for() -> None:
    pipe, size = pipelines.make(), (64, 64)
    there, here = make_plan(pipe, size, device="cuda"), make_plan(pipe, size)
    assert there.savings == here.savings and there.peak <= here.peak
    assert there.stages[0].decoding < here.stages[0].decoding, "a CPU's convolutions copy"
    gpu, cpu = ({name for names, _ in _choices(torch.device(kind)) for name in names} for kind in ("cuda", "cpu"))
    assert gpu == set(SAVINGS) and cpu == gpu - {"skips"}


class Workspace(nn.Module):
    """Takes memory that does not depend on the image: there a small one has its peak, and not a large one."""

    def forward(self, x: Tensor) -> Tensor:
        torch.empty(500_000)
        return x


@pytest.mark.parametrize("middle", [nn.Identity(), Workspace()], ids=["plain", "workspace"])
@pytest.mark.parametrize("savings", [("activations",), ("activations", "guidance", "feed_forward")])
def test_a_line_through_small_sizes_ends_at_the_large_one(
    pipe: Any, savings: tuple[str, ...], middle: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (128, 192)
    pipe.unet.mid_block.resnets[0].dropout = middle
    with MixerAdapter.build(pipe, "linfusion").mounted():
        monkeypatch.setattr("unet_adapters.highres.plan.CHUNK_TOKENS", 256)
        looked = foresee_step(pipe, size, savings, 3.0)
        monkeypatch.setattr("unet_adapters.highres.plan.LOOKED_AT", 64 * 96 // 4)
        monkeypatch.setattr("unet_adapters.highres.plan.LEAST_CHUNK", 1)
        reckoned = foresee_step(pipe, size, savings, 3.0)
    for truth, guess in zip(looked, reckoned, strict=True):
        assert abs(guess - truth) < 0.05 * truth


def test_what_no_saving_mends_is_told_apart_from_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unet_adapters.highres.plan.LARGEST", 100)
    with pytest.raises(ValueError, match="cannot be made: with every saving a tensor has"):
        make_plan(pipelines.make(), (64, 64))


@pytest.mark.parametrize("layers", [1, 3])
def test_layers_that_are_alike_are_gone_through_once(layers: int) -> None:
    pipe = pipelines.make("SDXL")
    for module in pipe.unet.modules():
        if isinstance(module, Transformer2DModel):
            module.transformer_blocks.extend([deepcopy(module.transformer_blocks[0]) for _ in range(layers)])
    seen, once = [], memory.one_of_each
    for way in (once, lambda *_: nullcontext()):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(memory, "one_of_each", way)
            seen.append(foresee_step(pipe, (64, 96), ("activations",), 3.0))
    assert seen[0] == seen[1] and seen[0].flops > 0
