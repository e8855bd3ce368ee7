"""Check that a pipeline generates images from text alone, in the latent space of its own autoencoder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from diffusers import AutoencoderKL, UNet2DConditionModel

from unet_adapters.hosts.base import find_host, unwrap_model
from unet_adapters.hosts.unet import TIME_IDS

_COMPONENTS = ("vae", "scheduler", "text_encoder")


def check_text_to_image(pipe: Any) -> None:
    """Refuse pipelines that need more than a prompt, before any work.

    Inpainting and InstructPix2Pix models take an image beside the noise, SDXL's refiner continues the work of another
    model, and Kandinsky, DeepFloyd or video models have other conditions or other latents.

    Args:
        pipe: a diffusers pipeline; it is only inspected.

    Raises:
        ValueError: If it is not a text-to-image pipeline of Stable Diffusion 1.5, 2.1 or XL (base), of one of the
            supported transformers, or of the same architecture; one sentence says why.
    """
    for reason in _reasons_against(pipe):
        raise ValueError(f"Cannot generate with this pipeline: {reason}")


def _reasons_against(pipe: Any) -> Iterator[str]:
    """Yield the reasons why the pipeline does not turn a prompt and noise into an image; the first one is enough."""
    components = pipe.components
    missing = [name for name in _COMPONENTS if components.get(name) is None]
    if components.get("unet") is None and components.get("transformer") is None:
        missing.insert(0, "unet or transformer")
    if missing:
        yield f"it has no {', '.join(missing)}, which every text-to-image pipeline has."
    if not isinstance(pipe.vae, AutoencoderKL):
        yield f"its autoencoder is a {type(pipe.vae).__name__}; expected an AutoencoderKL."
    if components.get("unet") is None:
        yield from _reasons_against_transformer(pipe)
    else:
        yield from _reasons_against_unet(pipe)


def _reasons_against_transformer(pipe: Any) -> Iterator[str]:
    try:
        host = find_host(pipe)
    except TypeError as error:
        yield f"{error}."
        return
    channels = host.latent_shape((2, 2))[1]
    if channels != pipe.vae.config.latent_channels:
        yield (
            f"its transformer takes {channels} channels and its autoencoder has {pipe.vae.config.latent_channels}: it "
            "is an inpainting or editing model. Use the text-to-image model that it was made from."
        )


def _reasons_against_unet(pipe: Any) -> Iterator[str]:
    unet: Any = unwrap_model(pipe.unet)
    if not isinstance(unet, UNet2DConditionModel):
        yield f"its network is a {type(unet).__name__}; expected a UNet2DConditionModel."
    config = unet.config
    channels = pipe.vae.config.latent_channels
    if config.in_channels != channels:
        yield (
            f"its UNet takes {config.in_channels} channels and its autoencoder has {channels}: it is an inpainting, "
            "editing or upscaling model. Use the text-to-image model that it was made from."
        )
    if config.out_channels != channels:
        yield f"its UNet predicts {config.out_channels} channels and its autoencoder has {channels}."
    if config.class_embed_type is not None or config.num_class_embeds is not None:
        yield "its UNet is conditioned on classes or noise levels, which a prompt does not give."
    yield from _reasons_against_conditions(pipe, config)


def _reasons_against_conditions(pipe: Any, config: Any) -> Iterator[str]:
    if config.encoder_hid_dim_type == "ip_image_proj":
        yield "its UNet expects the images of an IP-Adapter: call pipe.unload_ip_adapter() first."
    elif config.encoder_hid_dim_type is not None:
        yield f"its UNet is conditioned through encoder_hid_dim_type={config.encoder_hid_dim_type!r}."
    if config.addition_embed_type not in (None, "text_time"):
        yield f"its UNet has addition_embed_type={config.addition_embed_type!r}; expected none, or SDXL's text_time."
    if config.addition_embed_type != "text_time":
        return
    second = pipe.components.get("text_encoder_2")
    if second is None:
        yield "its UNet takes pooled captions, and it has no text_encoder_2 to make them."
    elif hasattr(second, "config"):
        pooled = second.config.projection_dim
        ids = (config.projection_class_embeddings_input_dim - pooled) / config.addition_time_embed_dim
        if ids != TIME_IDS:
            yield f"its UNet takes {ids:g} micro-conditions, and SDXL's base model {TIME_IDS}: it is a refiner."
