"""Models that need more than a prompt are refused before any work; the conditions of all others are the pipeline's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusionXLPipeline

from tests.unet_adapters import pipelines
from unet_adapters.highres import generate, plan_memory
from unet_adapters.hosts import find_host
from unet_adapters.text_to_image import check_text_to_image


def with_channels(channels: int) -> Any:
    pipe = pipelines.make()
    pipe.unet = pipelines.seeded(lambda: pipelines._unet(pipelines.WORDS, in_channels=channels))
    return pipe


def without(component: str) -> Any:
    pipe = pipelines.make()
    setattr(pipe, component, None)
    return pipe


def with_ip_adapter() -> Any:
    pipe = pipelines.make()
    pipelines.load_ip_adapter(pipe)
    return pipe


def with_tiny_autoencoder() -> Any:
    pipe = pipelines.make()
    pipe.vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    return pipe


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "inpainting": (lambda: with_channels(9), "takes 9 channels and its autoencoder has 4"),
    "InstructPix2Pix": (lambda: with_channels(8), "takes 8 channels and its autoencoder has 4"),
    "SDXL refiner": (lambda: pipelines.make("SDXL refiner"), "has no text_encoder"),
    "no text encoder": (lambda: without("text_encoder"), "has no text_encoder"),
    "no UNet": (lambda: without("unet"), "has no unet"),
    "video": (lambda: pipelines.make("AnimateDiff"), "UNetMotionModel; expected a UNet2DConditionModel"),
    "IP-Adapter": (with_ip_adapter, r"call pipe.unload_ip_adapter\(\) first"),
    "tiny autoencoder": (with_tiny_autoencoder, "AutoencoderTiny; expected an AutoencoderKL"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_models_are_refused_before_any_work(name: str) -> None:
    create, message = REFUSED[name]
    pipe = create()
    with pytest.raises(ValueError, match=f"Cannot generate with this pipeline: .*{message}"):
        check_text_to_image(pipe)
    with pytest.raises(ValueError, match=message):
        plan_memory(pipe, (64, 64))
    with pytest.raises(ValueError, match=message):
        generate(pipe, "abc", (64, 64))


@pytest.mark.parametrize("name", ["text-to-image", "img2img", "ControlNet", "SDXL", "PAG"])
def test_text_to_image_models_are_accepted(name: str) -> None:
    check_text_to_image(pipelines.make(name))


def stock_image(pipe: Any, side: int, **options: Any) -> torch.Tensor:
    """Return what the pipeline itself makes of the noise that `generate` uses for seed 0."""
    noise = torch.randn(1, 4, side // 2, side // 2, generator=torch.Generator().manual_seed(0))
    settings = {"num_inference_steps": 3, "output_type": "pt", "latents": noise}
    return pipe("abc", height=side, width=side, **settings, **options).images[0].permute(1, 2, 0)


def assert_stock(pipe: Any, guidance: float = 7.5, **options: Any) -> None:
    result = generate(pipe, "abc", (32, 32), base_size=32, steps=3, guidance=guidance, **options)
    expected = stock_image(pipe, 32, guidance_scale=guidance, **options)
    assert (result.pixels / 255 - expected).abs().max() < 1 / 255


@pytest.mark.parametrize(("family", "scale"), [("text-to-image", 7.5), ("SDXL", 5.0)])
def test_the_default_guidance_is_that_of_the_pipeline(family: str, scale: float) -> None:
    pipe = pipelines.make(family)
    result = generate(pipe, "abc", (32, 32), base_size=32, steps=3, negative_prompt="")
    assert result.request.guidance == scale
    assert (result.pixels / 255 - stock_image(pipe, 32, negative_prompt="")).abs().max() < 1 / 255


@pytest.mark.parametrize(("sample_size", "side"), [(8, 8), ([8, 8], 8), ((4, 16), 8), (None, None)])
def test_the_native_size_is_read_from_every_kind_of_config(sample_size: Any, side: int | None) -> None:
    pipe = pipelines.make()
    pipe.unet.register_to_config(sample_size=sample_size)
    if side is not None:
        assert find_host(pipe).native_latents == side
        return
    with pytest.raises(ValueError, match="does not say on which sample_size it was trained: pass base_size"):
        plan_memory(pipe, (32, 32))
    plan_memory(pipe, (32, 32), base_size=32)


@pytest.mark.parametrize(
    ("force_zeros", "options"),
    [(True, {}), (False, {}), (True, {"negative_prompt": ""}), (False, {"negative_prompt": "de"})],
    ids=str,
)
def test_sdxl_is_guided_away_from_what_the_pipeline_uses(force_zeros: bool, options: dict[str, str]) -> None:
    parts = pipelines._xl().components
    pipe = StableDiffusionXLPipeline(**parts, force_zeros_for_empty_prompt=force_zeros)
    pipe.set_progress_bar_config(disable=True)
    assert_stock(pipe, **options)


@pytest.mark.parametrize(("family", "guidance"), [("text-to-image", 1.0), ("text-to-image", 7.5), ("SDXL", 7.5)])
def test_an_embedded_guidance_scale_is_passed_to_the_unet(family: str, guidance: float) -> None:
    pipe = pipelines.make(family)
    config = {**pipe.unet.config, "time_cond_proj_dim": 16}
    state = pipe.unet.state_dict()
    pipe.unet = pipelines.seeded(lambda: type(pipe.unet).from_config(config))
    pipe.unet.load_state_dict(state, strict=False)
    assert_stock(pipe, guidance)


def test_an_embedded_guidance_scale_changes_the_plan() -> None:
    plain = pipelines.make()
    embedded = pipelines.make()
    embedded.unet = pipelines.seeded(lambda: pipelines._unet(pipelines.WORDS, time_cond_proj_dim=16))
    plans = [plan_memory(pipe, (32, 32), base_size=32, guidance=7.5).stages[0] for pipe in (plain, embedded)]
    assert plans[1].flops < 0.6 * plans[0].flops
