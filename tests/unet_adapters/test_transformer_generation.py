"""Large images with transformers: the same stages, plans and schedules as with UNets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

from tests.unet_adapters.transformer_pipelines import PIPELINES
from unet_adapters import MixerAdapter
from unet_adapters.highres import ControlNetCondition, generate, plan_memory
from unet_adapters.highres.pipeline import timestep_options
from unet_adapters.highres.schedule import oracle_error
from unet_adapters.hosts import find_host
from unet_adapters.hosts.calls import default_argument
from unet_adapters.hosts.transformers.flux import pack
from unet_adapters.hosts.transformers.profiles import TRANSFORMER_PROFILES

BASE_SIZES = {"PixArt": 16, "SD3.5 medium": 32, "Flux": 32, "HunyuanDiT": 64}


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


@pytest.mark.parametrize("guidance", [3.0, None])
@pytest.mark.parametrize("kind", BASE_SIZES)
def test_one_stage_is_the_pipelines_own_image(kind, guidance) -> None:
    pipe = PIPELINES[kind]()
    pipe.set_progress_bar_config(disable=True)
    host = find_host(pipe)
    height, width = (side * pipe.vae_scale_factor for side in (12, 16))
    ours = generate(pipe, "a b c", (height, width), mode="direct", steps=3, guidance=guidance, seed=0)
    latents = torch.randn(1, 4, 12, 16, generator=torch.Generator().manual_seed(0))
    call = {"height": height, "width": width, "num_inference_steps": 3}
    call |= {} if guidance is None else {"guidance_scale": guidance}
    call |= {"latents": pack(latents) if kind == "Flux" else latents, **host.sampling_options(pipe)}
    theirs = torch.from_numpy(pipe("a b c", output_type="np", **call).images[0])
    assert (ours.pixels / 255 - theirs).abs().max() < 0.02


def test_captions_are_cleaned_as_the_pipeline_cleans_them(monkeypatch) -> None:
    pipe = PIPELINES["PixArt"]()
    pipe.set_progress_bar_config(disable=True)
    cleaned = []

    def record(text: Any, clean_caption: bool = False) -> list[str]:
        cleaned.append(clean_caption)
        return text if isinstance(text, list) else [text]

    monkeypatch.setattr(pipe, "_text_preprocessing", record)
    host = find_host(pipe)
    pipe("a", height=16, width=16, num_inference_steps=1, output_type="latent", **host.sampling_options(pipe))
    stock = list(cleaned)
    cleaned.clear()
    host.encode_prompts(pipe, ["a"])
    assert cleaned == stock == [True, True]


def test_estimates_count_the_text_tokens_of_each_model() -> None:
    counts = {kind: find_host(PIPELINES[kind]()).condition_shapes()["text"][1] for kind in BASE_SIZES}
    limits = {
        kind: default_argument(PIPELINES[kind]().encode_prompt, "max_sequence_length") for kind in ("PixArt", "Flux")
    }
    t5 = default_argument(PIPELINES["SD3.5 medium"]().encode_prompt, "max_sequence_length")
    assert counts == {**limits, "SD3.5 medium": 77 + t5, "HunyuanDiT": 77}


@pytest.mark.parametrize("strength", [0.3, 0.7])
@pytest.mark.parametrize("kind", ["SD3.5 medium", "Flux"])
def test_a_flow_ends_at_the_image(kind, strength) -> None:
    pipe = PIPELINES[kind]()
    assert oracle_error(pipe.scheduler, 20, strength, timestep_options(pipe, (64, 96), 20)) < 1e-5


def test_the_noise_levels_of_flux_depend_on_the_size() -> None:
    pipe = PIPELINES["Flux"]()
    shifts = [timestep_options(pipe, size, 4)["mu"] for size in ((64, 64), (64, 128))]
    assert shifts[0] < shifts[1]


def test_a_plan_of_flux_needs_no_positions() -> None:
    pipe = PIPELINES["Flux"]()
    with MixerAdapter.build(pipe, "linear_attention", causality="causal", scan="column").mounted():
        assert plan_memory(pipe, (32, 64), base_size=32, steps=3, guidance=3.0).peak_bytes > 0


def test_what_a_transformer_cannot_do_is_refused() -> None:
    pipe = PIPELINES["SD3.5 medium"]()
    with pytest.raises(ValueError, match="positions for sides of up to 64 pixels"):
        generate(pipe, "a", (128, 32), base_size=32)
    with pytest.raises(ValueError, match="convolutions of a UNet"):
        generate(pipe, "a", (32, 32), base_size=32, dilation=2)
    control = ControlNetCondition(nn.Identity(), torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"a ControlNet guides the levels of a UNet.*SD3Transformer2DModel"):
        generate(pipe, "a", (32, 32), base_size=32, control=control)


@pytest.mark.parametrize("kind", BASE_SIZES)
def test_a_scheduler_of_the_other_kind_is_refused_and_one_of_the_models_kind_is_named(kind) -> None:
    pipe = PIPELINES[kind]()
    schedulers = (DDIMScheduler, FlowMatchEulerDiscreteScheduler)
    own = schedulers[bool(find_host(pipe).predicts_flow)]
    other = schedulers[not find_host(pipe).predicts_flow]
    assert isinstance(pipe.scheduler, own)
    side = BASE_SIZES[kind]
    for scheduler in (other(), EDMEulerScheduler()):
        pipe.scheduler = scheduler
        for mode in ("progressive", "direct"):
            with pytest.raises(ValueError, match=f"Cannot generate with {type(scheduler).__name__}.*{own.__name__}"):
                generate(pipe, "a b c", (side, side), base_size=side, steps=3, mode=mode)


PUBLISHED = {"PixArt-Sigma": 610_856_096, "SD3.5-medium": 2_243_171_520, "Flux": 11_901_408_320}


@pytest.mark.parametrize("profile", TRANSFORMER_PROFILES, ids=lambda profile: profile.name)
def test_published_architectures_have_their_size_and_take_mixers(profile) -> None:
    model = profile.model()
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[profile.name]
    sites = find_host(model).sites()
    counts = {"PixArt-Sigma": 28, "SD3.5-medium": 24 + 13, "Flux": 19 + 38}
    assert len(sites) == counts[profile.name]
