"""Memory plans: the estimate is what is allocated, and a budget holds."""

from __future__ import annotations

import re
from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import pytest
import torch
from diffusers import Transformer2DModel
from diffusers.hooks import LayerSkipConfig, apply_layer_skip
from torch import Tensor, nn

from tests.unet_adapters import pipelines
from unet_adapters import MixerAdapter
from unet_adapters.highres import (
    SAVINGS,
    InsufficientMemoryError,
    Tiling,
    decode_tiled,
    memory,
    plan_memory,
    save_memory,
)
from unet_adapters.highres.estimates import estimate_decoding, estimate_unet_call
from unet_adapters.highres.memory import AllocationCounter, estimate_memory
from unet_adapters.highres.pipeline import size_multiple, vae_scale_factor, weight_bytes
from unet_adapters.highres.plan import savings_levels

FAMILIES = ("text-to-image", "SDXL")
CPU = torch.device("cpu")


@pytest.fixture(params=FAMILIES)
def pipe(request: pytest.FixtureRequest) -> Any:
    return pipelines.make(request.param)


def test_peaks_are_counted() -> None:
    def run(x: Tensor) -> Tensor:
        y = x + 1  # 400 bytes
        z = torch.cat([y, y])  # 800 more
        del y
        return z[:10].clone()  # 40 more, while z is alive

    counter = estimate_memory(run, nn.Module(), ((100,), torch.float32), device=CPU)
    assert (counter.peak_bytes, counter.largest_tensor) == (1200, 200)


def test_convolutions_on_a_cpu_copy_their_input_and_their_weights() -> None:
    convolution = nn.Conv2d(4, 2, 3, padding=1, bias=False)
    shape = ((1, 4, 8, 8), torch.float32)
    peaks = [
        estimate_memory(lambda x: convolution(x), convolution, shape, device=CPU, on_cpu=on_cpu).peak_bytes
        for on_cpu in (None, False)
    ]
    assert peaks == [4 * (2 * 64 + 4 * 64 + 2 * 4 * 9), 4 * 2 * 64]


def test_the_estimate_of_a_unet_call_is_what_is_allocated(pipe: Any) -> None:
    for savings in ((), ("guidance", "activations", "feed_forward")):
        estimate = estimate_unet_call(pipe, (64, 96), savings, 3.0)
        counter = AllocationCounter(on_cpu=True)
        batch = 1 if savings else 2
        text = torch.zeros(batch, 77, pipe.unet.config.cross_attention_dim)
        added = {"text_embeds": torch.zeros(batch, pipelines.WORDS), "time_ids": torch.zeros(batch, 6)}
        x = torch.zeros(batch, 4, 32, 48)
        with torch.no_grad(), save_memory(pipe.unet, savings), counter:
            pipe.unet(x, torch.tensor(500), text, return_dict=False, added_cond_kwargs=added)
        assert abs(counter.peak_bytes - estimate.peak_bytes) < 0.02 * counter.peak_bytes


@pytest.mark.parametrize("size", [(128, 128), (192, 80), (48, 192)])
def test_the_estimate_of_decoding_is_what_is_allocated(size: tuple[int, int]) -> None:
    pipe = pipelines.make()
    tiling = Tiling(tile=24, margin=4, blend=2, overview=40, whole_middle=0)
    estimate = estimate_decoding(pipe, size, tiling)
    counter = AllocationCounter(on_cpu=True)
    factor = vae_scale_factor(pipe)
    latents = pipelines.noise(1, 4, size[0] // factor, size[1] // factor)
    with counter:
        decode_tiled(pipe.vae, latents, tiling)
    image = size[0] * size[1] * 3 * (1 + 4)  # the image's bytes, and rows that are not complete
    assert counter.peak_bytes - image < 1.02 * estimate.peak_bytes
    assert 0.98 * estimate.peak_bytes < counter.peak_bytes


def test_a_plan_keeps_to_its_budget_or_names_a_sufficient_one(pipe: Any) -> None:
    side = size_multiple(pipe) * 16
    size = (side, side)
    unlimited = plan_memory(pipe, size, base_size=32, device="cuda")
    assert unlimited.savings == ("activations",) and unlimited.stages[-1].stage.size == size
    peaks = [stage.peak_bytes for stage in unlimited.stages]
    assert peaks == sorted(peaks)
    tight = plan_memory(pipe, size, base_size=64, device="cuda", memory_budget=unlimited.peak_bytes - 1)
    assert len(tight.savings) > 1 and tight.peak_bytes < unlimited.peak_bytes
    with pytest.raises(InsufficientMemoryError, match="with every saving it needs") as refusal:
        plan_memory(pipe, size, base_size=64, device="cuda", memory_budget=weight_bytes(pipe))
    amount = re.search(r"it needs ([\d.]+) ([KM])iB", str(refusal.value))
    assert amount is not None
    budget = int(float(amount[1]) * 1024 ** (1 + "KM".index(amount[2])))
    sufficient = plan_memory(pipe, size, base_size=64, device="cuda", memory_budget=budget)
    assert weight_bytes(pipe) < sufficient.peak_bytes <= budget


def test_a_plan_for_a_gpu_needs_no_gpu() -> None:
    pipe = pipelines.make()
    gpu = plan_memory(pipe, (64, 64), device="cuda")
    cpu = plan_memory(pipe, (64, 64))
    assert gpu.savings == cpu.savings and gpu.peak_bytes <= cpu.peak_bytes
    assert gpu.stages[0].decoding_bytes < cpu.stages[0].decoding_bytes, "convolutions on a CPU copy"
    gpu_savings = {name for level in savings_levels(torch.device("cuda")) for name in level.savings}
    cpu_savings = {name for level in savings_levels(CPU) for name in level.savings}
    assert gpu_savings == set(SAVINGS) and cpu_savings == gpu_savings - {"skips"}


def test_a_plan_for_a_controlnet_leaves_skip_connections_where_the_residuals_are() -> None:
    pipe = pipelines.make()
    size = (64, 64)
    for with_control in (False, True):
        levels = savings_levels(torch.device("cuda"), with_control)
        assert with_control != any("skips" in level.savings for level in levels)
    budgets = (None, plan_memory(pipe, size, base_size=32, device="cuda", with_control=True).peak_bytes - 1)
    for budget in budgets:
        plan = plan_memory(pipe, size, base_size=32, device="cuda", memory_budget=budget, with_control=True)
        assert "skips" not in plan.savings


def test_planning_leaves_the_hooks_of_blocks_in_place() -> None:
    pipe = pipelines.make("SDXL")
    stack = "mid_block.attentions.0.transformer_blocks"
    apply_layer_skip(pipe.unet, LayerSkipConfig(indices=[1], fqn=stack))
    before = {name: vars(module).get("forward") for name, module in pipe.unet.named_modules()}
    assert before[f"{stack}.1"] is not None
    plan_memory(pipe, (32, 32), base_size=32, steps=1)
    assert {name: vars(module).get("forward") for name, module in pipe.unet.named_modules()} == before


@pytest.mark.parametrize("min_tokens", [0, 16])
@pytest.mark.parametrize("train_projections", [True, False])
def test_the_weights_of_a_mounted_pipeline_are_the_students_and_the_teachers(
    train_projections: bool, min_tokens: int
) -> None:
    pipe = pipelines.make()
    teacher = weight_bytes(pipe)
    options = {"train_projections": train_projections, "min_tokens": min_tokens}
    adapter = MixerAdapter.build(pipe, "linfusion", **options)
    student = sum(parameter.nbytes for parameter in adapter.student.parameters())
    with adapter.mounted():
        assert weight_bytes(pipe) == teacher + student
    assert weight_bytes(pipe) == teacher


class Workspace(nn.Module):
    """Allocates memory that does not depend on the image: the peak of a small image, but not of a large one."""

    def forward(self, x: Tensor) -> Tensor:
        torch.empty(500_000)
        return x


@pytest.mark.parametrize("middle", [nn.Identity(), Workspace()], ids=["plain", "workspace"])
@pytest.mark.parametrize("savings", [("activations",), ("activations", "guidance", "feed_forward")])
def test_the_extrapolation_from_small_sizes_is_within_5_percent(
    pipe: Any, savings: tuple[str, ...], middle: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (128, 192)
    pipe.unet.mid_block.resnets[0].dropout = middle
    with MixerAdapter.build(pipe, "linfusion").mounted():
        monkeypatch.setattr("unet_adapters.highres.estimates.CHUNK_TOKENS", 256)
        traced = estimate_unet_call(pipe, size, savings, 3.0)
        monkeypatch.setattr("unet_adapters.highres.estimates.TRACED_LATENT_PIXELS", 64 * 96 // 4)
        monkeypatch.setattr("unet_adapters.highres.estimates.MIN_CHUNK_TOKENS", 1)
        extrapolated = estimate_unet_call(pipe, size, savings, 3.0)
    for exact, estimate in zip(traced, extrapolated, strict=True):
        assert abs(estimate - exact) < 0.05 * exact


def test_tensors_that_no_saving_makes_smaller_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unet_adapters.highres.plan.MAX_TENSOR_ELEMENTS", 100)
    with pytest.raises(ValueError, match="cannot be made: even with every saving a tensor has"):
        plan_memory(pipelines.make(), (64, 64))


@pytest.mark.parametrize("layers", [1, 3])
def test_identical_blocks_reuse_the_measurement_of_the_first(layers: int) -> None:
    pipe = pipelines.make("SDXL")
    for module in pipe.unet.modules():
        if isinstance(module, Transformer2DModel):
            module.transformer_blocks.extend([deepcopy(module.transformer_blocks[0]) for _ in range(layers)])
    estimates = []
    for reuse in (memory.reuse_identical_blocks, lambda *_: nullcontext()):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(memory, "reuse_identical_blocks", reuse)
            estimates.append(estimate_unet_call(pipe, (64, 96), ("activations",), 3.0))
    assert estimates[0] == estimates[1] and estimates[0].flops > 0
