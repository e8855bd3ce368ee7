"""Check that a pipeline generates images from text alone, in the latent space of its own autoencoder."""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderKL, UNet2DConditionModel

from unet_adapters.hosts.base import unwrap_model

_COMPONENTS = ("unet", "vae", "scheduler", "text_encoder")
_ADVICE = "Expected a text-to-image model: Stable Diffusion 1.5, 2.1 or XL (base), or a model of the same architecture."


def check_text_to_image(pipe: Any) -> None:
    """Refuse pipelines that need more than a prompt, before any work.

    Inpainting and InstructPix2Pix models take an image beside the noise, SDXL's refiner continues the work of another
    model, and Kandinsky, DeepFloyd or video models have other conditions or other latents.

    Raises:
        ValueError: If the pipeline is not a text-to-image pipeline of Stable Diffusion; one sentence says why.
    """
    _check_components(pipe, _COMPONENTS)
    unet: Any = unwrap_model(pipe.unet)
    if not isinstance(unet, UNet2DConditionModel):
        raise ValueError(f"The model's network is a {type(unet).__name__}, not a UNet2DConditionModel. {_ADVICE}")
    if unet.config.addition_embed_type == "text_time":
        _check_components(pipe, ("text_encoder_2",))
    if not isinstance(pipe.vae, AutoencoderKL):
        raise ValueError(f"The model's autoencoder is a {type(pipe.vae).__name__}, not an AutoencoderKL. {_ADVICE}")
    _check_channels(unet.config, int(pipe.vae.config.latent_channels))
    _check_conditions(unet.config)


def _check_components(pipe: Any, names: tuple[str, ...]) -> None:
    missing = [name for name in names if pipe.components.get(name) is None]
    if missing:
        raise ValueError(f"The model has no {', '.join(missing)}. {_ADVICE}")


def _check_channels(config: Any, latent_channels: int) -> None:
    for name in ("in_channels", "out_channels"):
        channels = getattr(config, name)
        if channels != latent_channels:
            purpose = {9: " (an inpainting model)", 8: " (an image-editing model)"}.get(channels, "")
            raise ValueError(
                f"The UNet has {name}={channels}{purpose}, but its autoencoder has {latent_channels} latent channels. "
                f"{_ADVICE}"
            )


def _check_conditions(config: Any) -> None:
    embedding = config.addition_embed_type
    if embedding not in (None, "text_time"):
        raise ValueError(f"The UNet has addition_embed_type={embedding!r}, expected None or 'text_time'. {_ADVICE}")
    for name in ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type"):
        value = getattr(config, name, None)
        if value is not None:
            advice = "Unload the IP-Adapter with unload_ip_adapter()." if value == "ip_image_proj" else _ADVICE
            raise ValueError(f"The UNet has {name}={value!r}, an input that a prompt does not give. {advice}")
