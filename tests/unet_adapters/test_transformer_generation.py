"""Large images with transformers: the same stages, plans and schedules as with UNets."""

from __future__ import annotations

import pytest
import torch

from tests.unet_adapters.transformer_pipelines import PIPELINES
from unet_adapters import MixerAdapter
from unet_adapters.highres import generate, plan_memory
from unet_adapters.highres.schedule import oracle_error
from unet_adapters.hosts import find_host
from unet_adapters.hosts.transformers.profiles import TRANSFORMER_PROFILES

BASE_SIZES = {"PixArt": 16, "SD3.5 medium": 32, "HunyuanDiT": 64}


@pytest.mark.parametrize("kind", BASE_SIZES)
def test_stages_lead_to_a_large_image_and_its_plan(kind) -> None:
    pipe = PIPELINES[kind]()
    base = BASE_SIZES[kind]
    request = {"base_size": base, "steps": 4, "strengths": (0.5,), "guidance": 3.0}
    stock = generate(pipe, "a b c", (base, 2 * base), **request)
    adapter = MixerAdapter.build(pipe, "linear_attention")
    with adapter.mounted():
        plan = plan_memory(pipe, (base, 2 * base), **request)
        mixed = generate(pipe, "a b c", (base, 2 * base), plan=plan, **request)
    assert mixed.pixels.shape == stock.pixels.shape == (base, 2 * base, 3)
    assert not torch.equal(mixed.pixels, stock.pixels)
    assert len(plan.stages) == len(mixed.stages) >= 1 and plan.peak_bytes > 0
    assert torch.equal(generate(pipe, "a b c", (base, 2 * base), **request).pixels, stock.pixels)


def test_one_stage_is_the_pipelines_own_image() -> None:
    pipe = PIPELINES["SD3.5 medium"]()
    pipe.set_progress_bar_config(disable=True)
    ours = generate(pipe, "a b c", (32, 32), base_size=32, steps=3, guidance=3.0, seed=0)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 16, 16, generator=generator)
    call = {"height": 32, "width": 32, "num_inference_steps": 3, "guidance_scale": 3.0, "latents": latents}
    theirs = torch.from_numpy(pipe("a b c", output_type="np", **call).images[0])
    assert (ours.pixels / 255 - theirs).abs().max() < 0.02


@pytest.mark.parametrize("strength", [0.3, 0.7])
def test_a_flow_ends_at_the_image(strength) -> None:
    scheduler = PIPELINES["SD3.5 medium"]().scheduler
    assert oracle_error(scheduler, 20, strength) < 1e-5


def test_what_a_transformer_cannot_do_is_refused() -> None:
    pipe = PIPELINES["SD3.5 medium"]()
    with pytest.raises(ValueError, match="positions for sides of up to 64 pixels"):
        generate(pipe, "a", (128, 32), base_size=32)
    with pytest.raises(ValueError, match="use_dynamic_shifting"):
        generate(PIPELINES["Flux"](), "a", (32, 32), base_size=16)
    with pytest.raises(ValueError, match="convolutions of a UNet"):
        generate(pipe, "a", (32, 32), base_size=32, dilation=2)


PUBLISHED = {"PixArt-Sigma": 610_856_096, "SD3.5-medium": 2_243_171_520, "Flux": 11_901_408_320}


@pytest.mark.parametrize("profile", TRANSFORMER_PROFILES, ids=lambda profile: profile.name)
def test_published_architectures_have_their_size_and_take_mixers(profile) -> None:
    model = profile.model()
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[profile.name]
    sites = find_host(model).sites()
    counts = {"PixArt-Sigma": 28, "SD3.5-medium": 24 + 13, "Flux": 19 + 38}
    assert len(sites) == counts[profile.name]
