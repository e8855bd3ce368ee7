"""Large images: the same as the pipeline's own, resumable, with savings and tiles that do not change them."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image
from torch import Tensor, nn
from transformers import BatchFeature

from tests.unet_adapters import pipelines
from unet_adapters import MixerAdapter
from unet_adapters.highres import (
    SAVINGS,
    ControlNetCondition,
    GenerationRequest,
    MemoryPlan,
    generate,
    plan_memory,
)
from unet_adapters.highres.denoising import ClassifierFreeGuidance, denoise
from unet_adapters.highres.pipeline import size_multiple
from unet_adapters.highres.schedule import DenoisingSchedule
from unet_adapters.hosts import find_host

FAMILIES = ("text-to-image", "SDXL")
SHORT = {"steps": 3, "guidance": 3.0}


@pytest.fixture(params=FAMILIES)
def pipe(request: pytest.FixtureRequest) -> Any:
    return pipelines.make(request.param)


@cache
def plan_for(family: str, size: tuple[int, int]) -> MemoryPlan:
    """Return a plan without a budget, once: it takes seconds."""
    return plan_memory(pipelines.make(family), size, base_size=32, steps=3, guidance=3.0)


def family_of(pipe: Any) -> str:
    return FAMILIES[hasattr(pipe, "text_encoder_2")]


def random_image(side: int, seed: int = 0) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 256, (side, side, 3), dtype=torch.uint8, generator=generator).numpy())


def test_one_stage_is_the_image_of_the_pipeline(pipe: Any) -> None:
    side = size_multiple(pipe) * 4
    result = generate(pipe, "abc", (side, side), base_size=side, seed=3, **SHORT)
    noise = torch.randn(1, 4, side // 2, side // 2, generator=torch.Generator().manual_seed(3 * 1_000_003))
    options = {"num_inference_steps": 3, "guidance_scale": 3.0, "negative_prompt": "", "output_type": "pt"}
    expected = pipe("abc", height=side, width=side, latents=noise, **options).images[0]
    assert (result.pixels / 255 - expected.permute(1, 2, 0)).abs().max() < 1 / 255


class Killed(Exception):
    pass


@pytest.mark.parametrize("upscale", ["pixels", "latents"])
def test_a_killed_run_resumes_after_its_last_stage(pipe: Any, tmp_path: Path, upscale: str) -> None:
    size = (64, 96)
    options = {
        "base_size": 32,
        "upscale": upscale,
        "skip_residual": 3.0,
        "plan": plan_for(family_of(pipe), size),
        **SHORT,
    }
    uninterrupted = generate(pipe, "abc", size, **options)
    assert len(uninterrupted.stages) == 3

    def kill(part: str, completed: int, total: int) -> None:
        if part == "96 × 64":
            raise Killed

    with pytest.raises(Killed):
        generate(pipe, "abc", size, stage_dir=tmp_path, progress=kill, **options)
    assert len(list(tmp_path.iterdir())) == 2
    resumed = generate(pipe, "abc", size, stage_dir=tmp_path, **options)
    assert resumed.restored_stages == 2 and torch.equal(resumed.pixels, uninterrupted.pixels)
    for path in tmp_path.iterdir():  # damaged files: the stages are computed again
        path.write_bytes(path.read_bytes()[:100])
    assert torch.equal(generate(pipe, "abc", size, stage_dir=tmp_path, **options).pixels, uninterrupted.pixels)
    assert generate(pipe, "other", size, stage_dir=tmp_path, **options).restored_stages == 0
    with MixerAdapter.build(pipe, "linfusion").mounted():
        assert generate(pipe, "abc", size, stage_dir=tmp_path, **options).restored_stages == 0


def test_savings_and_tiles_give_the_same_image(pipe: Any) -> None:
    size = (64, 64)
    plain = generate(pipe, "abc", size, plan=plan_for(family_of(pipe), size), base_size=32, **SHORT)
    plan = replace(plain.plan, savings=SAVINGS, chunk_tokens=37)
    saving = generate(pipe, "abc", size, plan=plan, base_size=32, **SHORT)
    assert (saving.pixels.int() - plain.pixels.int()).abs().max() <= 1


def test_an_image_is_enlarged_or_changed(tmp_path: Path) -> None:
    pipe = pipelines.make()
    image = random_image(32)
    larger = generate(pipe, "abc", (64, 64), image=image, base_size=32, **SHORT)
    assert [s.size for s in larger.stages] == [(32, 32), (64, 64)] and larger.pixels.shape == (64, 64, 3)
    changed = generate(pipe, "abc", (32, 32), image=image, strength=0.4, base_size=32, **SHORT)
    assert changed.stages[0].strength == 0.4 and changed.pixels.shape == (32, 32, 3)
    with pytest.raises(ValueError, match="already has 32 × 32 pixels"):
        generate(pipe, "abc", (32, 32), image=image, **SHORT)
    with pytest.raises(ValueError, match="expected mode RGB, got L"):
        generate(pipe, "abc", (64, 64), image=image.convert("L"), **SHORT)
    with pytest.raises(ValueError, match="use mode progressive"):
        generate(pipe, "abc", (64, 64), image=image, mode="direct", **SHORT)
    larger.save(tmp_path / "image.png", model="tiny")
    metadata = json.loads(Image.open(tmp_path / "image.png").text["mixers"])
    assert metadata["mode"] == "progressive" and metadata["prompt"] == "abc" and len(metadata["stages"]) == 2
    assert metadata["model"] == "tiny" and metadata["savings"] == ["activations"]


@pytest.mark.parametrize("side", [16, 24, 32, 40])
def test_an_image_of_any_size_is_enlarged(side: int) -> None:
    pipe = pipelines.make()
    options = {"base_size": 32, "plan": plan_for(FAMILIES[0], (64, 64)), **SHORT}
    results = [generate(pipe, "abc", (64, 64), image=random_image(side, seed), **options) for seed in (0, 1)]
    assert results[0].stages[0].size == (side, side) and results[0].stages[-1].size == (64, 64)
    assert all(stage.strength < 1 for stage in results[0].stages[1:])
    assert not torch.equal(results[0].pixels, results[1].pixels)


@pytest.mark.parametrize("mode", ["progressive", "direct"])
@pytest.mark.parametrize("strength", [-1, 0, 1.5, float("nan"), 0.5])
def test_an_invalid_strength_raises(strength: float, mode: str) -> None:
    image = None if strength == 0.5 else random_image(32)
    with pytest.raises(ValueError, match=r"strength=.*above 0 and up to 1, together with an image"):
        generate(pipelines.make(), "abc", (32, 32), image=image, strength=strength, mode=mode, **SHORT)


def control_of(pipe: Any) -> ControlNetCondition:
    network = pipelines.seeded(lambda: ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(4, 8)))
    return ControlNetCondition(network, torch.zeros(1, 3, 32, 32))


def test_a_plan_that_does_not_work_with_a_controlnet_is_refused() -> None:
    pipe = pipelines.make()
    plan = replace(plan_for(FAMILIES[0], (32, 32)), savings=SAVINGS)
    with pytest.raises(ValueError, match=r"skips does not work with a ControlNet.*with_control=True"):
        generate(pipe, "abc", (32, 32), base_size=32, plan=plan, control=control_of(pipe), **SHORT)


OFFLOADING = {
    "model": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "sequential": lambda pipe: accelerate.cpu_offload(pipe.unet, execution_device="cpu"),
    "text encoder": lambda pipe: accelerate.cpu_offload(pipe.text_encoder, execution_device="cpu"),
    "blocks": lambda pipe: pipe.unet.enable_group_offload(
        torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    ),
    "leaves": lambda pipe: pipe.vae.enable_group_offload(torch.device("cpu"), offload_type="leaf_level"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", OFFLOADING)
def test_an_offloaded_pipeline_is_refused(kind: str) -> None:
    pipe = pipelines.make()
    OFFLOADING[kind](pipe)
    message = (
        "is offloaded.*Load it without group" if kind in ("blocks", "leaves") else r"Call pipe.remove_all_hooks\(\)"
    )
    with pytest.raises(ValueError, match=message):
        generate(pipe, "abc", (32, 32), base_size=32, **SHORT)
    with pytest.raises(ValueError, match=message):
        plan_memory(pipe, (32, 32), base_size=32)
    if kind == "model":
        pipe.remove_all_hooks()
        generate(pipe, "abc", (32, 32), base_size=32, **SHORT)


class SafetyChecker(nn.Module):
    """A safety checker that objects to everything or to nothing."""

    def __init__(self, objects: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.objects = objects
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, clip_input: Tensor, images: Any) -> tuple[Any, list[bool]]:
        self.shapes.append(images.shape)
        return images, [self.objects]


@pytest.mark.parametrize("objects", [True, False])
def test_a_safety_checker_sees_the_image(objects: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unet_adapters.highres.pipeline.SAFETY_SIDE", 40)
    options = {"base_size": 32, "plan": plan_for(FAMILIES[0], (32, 64)), **SHORT}
    expected = generate(pipelines.make(), "abc", (32, 64), **options).pixels
    pipe = pipelines.make()
    pipe.safety_checker = SafetyChecker(objects)
    pipe.feature_extractor = lambda images, return_tensors: BatchFeature({"pixel_values": torch.zeros(1, 3, 4, 4)})
    pixels = generate(pipe, "abc", (32, 64), **options).pixels
    assert pipe.safety_checker.shapes == [(1, 20, 40, 3)]
    assert torch.equal(pixels, torch.zeros_like(expected) if objects else expected)


def test_a_compiled_network_runs_compiled() -> None:
    options = {"base_size": 32, "plan": plan_for(FAMILIES[0], (32, 32)), **SHORT}
    pipe = pipelines.make()
    expected = generate(pipe, "abc", (32, 32), **options).pixels
    calls: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        def run(*arguments: Any) -> Any:
            calls.append("graph")
            return graph.forward(*arguments)

        return run

    pipe.unet = torch.compile(pipe.unet, backend=backend)
    pixels = generate(pipe, "abc", (32, 32), **options).pixels
    assert calls and (pixels.int() - expected.int()).abs().max() <= 1
    assert plan_memory(pipe, (32, 32), base_size=32, steps=3, guidance=3.0) == options["plan"]


def test_stages_of_another_start_image_are_not_restored(tmp_path: Path) -> None:
    pipe = pipelines.make()
    options = {"base_size": 32, "plan": plan_for(FAMILIES[0], (64, 64)), **SHORT}
    for seed, restored_stages in ((0, 0), (0, 2), (1, 0)):
        result = generate(pipe, "abc", (64, 64), image=random_image(32, seed), stage_dir=tmp_path, **options)
        assert result.restored_stages == restored_stages and result.pixels.shape == (64, 64, 3)


def test_dilation_changes_the_image_and_is_undone(pipe: Any) -> None:
    before = [(m.dilation, m.padding) for m in pipe.unet.modules() if isinstance(m, nn.Conv2d)]
    plain, dilated = (
        generate(pipe, "abc", (64, 64), base_size=32, mode="direct", dilation=dilation, **SHORT).pixels
        for dilation in (1, 2)
    )
    assert not torch.equal(plain, dilated)
    assert before == [(m.dilation, m.padding) for m in pipe.unet.modules() if isinstance(m, nn.Conv2d)]


@pytest.mark.parametrize("option", [{"mode": "sideways"}, {"steps": 0}, {"upscale": "words"}])
def test_an_invalid_request_raises(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(option))}.*expected"):
        GenerationRequest("abc", **option)


def test_progress_is_reported_before_the_first_step_and_after_every_step() -> None:
    pipe = pipelines.make()
    schedule = DenoisingSchedule.create(pipe.scheduler, 10, 0.3, "cpu")
    conditions = {"text": torch.zeros(1, 3, pipe.unet.config.cross_attention_dim)}
    completed_steps: list[int] = []
    denoise(
        find_host(pipe),
        ClassifierFreeGuidance(conditions, conditions),
        schedule,
        pipelines.noise(1, 4, 8, 8),
        torch.Generator(),
        lambda completed, total: completed_steps.append(completed),
    )
    assert completed_steps == [0, 1, 2, 3]
