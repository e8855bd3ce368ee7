"""What diffusers' own fast tests of these transformers and pipelines assert, with the `softmax` mixer mounted.

The installed package has no tests. In the repository they are, for models, `ModelTesterMixin`, `TrainingTesterMixin`
and `AttentionTesterMixin` in `tests/models/transformers/test_models_pixart_transformer2d.py`,
`test_models_transformer_sd3.py`, `test_models_transformer_flux.py` and `test_models_transformer_hunyuan_dit.py`; for
pipelines, `PipelineTesterMixin` in `tests/pipelines/pixart_sigma`, `stable_diffusion_3`, `flux` and `hunyuandit`. The
assertions below are ours, after theirs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HunyuanDiTPipeline, PixArtSigmaPipeline
from torch import Tensor

from tests.unet_adapters.comparisons import close
from tests.unet_adapters.host_models import checkpoint_blocks, make_inputs, make_model
from tests.unet_adapters.transformer_pipelines import PIPELINES
from unet_adapters import MixerAdapter

MODELS = ["PixArt", "SD3", "SD3.5 medium", "Flux", "Flux guidance", "HunyuanDiT"]


@pytest.fixture(params=MODELS)
def model(request) -> Any:
    model = make_model(request.param)
    MixerAdapter.build(model, "softmax").mount()
    return model


@torch.no_grad()
def test_outputs_are_deterministic_and_the_same_as_tuple_and_dataclass(model) -> None:
    inputs = make_inputs(model)
    first = model(**inputs).sample
    assert torch.equal(model(**inputs).sample, first)
    assert torch.equal(model(**inputs, return_dict=False)[0], first)
    assert first.isfinite().all()


def test_gradients_are_the_same_under_gradient_checkpointing(model) -> None:
    model.requires_grad_(True).train()
    inputs = make_inputs(model)
    parameters = list(model.parameters())
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            checkpoint_blocks(model)
        loss = model(**inputs).sample.square().mean()
        gradients.append(torch.autograd.grad(loss, parameters, allow_unused=True))
    for plain, again in zip(*gradients, strict=True):
        assert (plain is None) == (again is None)
        assert plain is None or torch.allclose(plain, again, atol=1e-6)


@torch.no_grad()
def test_half_precision_runs(model) -> None:
    inputs = make_inputs(model.to(torch.bfloat16))
    output = model(**inputs).sample
    assert output.dtype == torch.bfloat16 and output.isfinite().all()


@torch.no_grad()
def test_ids_with_a_batch_axis_still_work() -> None:
    model = make_model("Flux")
    MixerAdapter.build(model, "softmax").mount()
    inputs = make_inputs(model)
    expected = model(**inputs).sample
    inputs |= {name: inputs[name][None] for name in ("img_ids", "txt_ids")}
    assert close(model(**inputs).sample, expected, 1e-5)


def call(pipe: Any, prompt: Any = "a b c", **extra: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    side = 8 * pipe.vae_scale_factor
    settings: dict[str, Any] = {"height": side, "width": side, "num_inference_steps": 2, "output_type": "np"}
    if isinstance(pipe, PixArtSigmaPipeline | HunyuanDiTPipeline):
        settings["use_resolution_binning"] = False
    return pipe(prompt, generator=torch.Generator().manual_seed(0), **(settings | extra))


@pytest.fixture(params=list(PIPELINES))
def pipe(request) -> Any:
    return PIPELINES[request.param]()


def images(result: Any) -> Tensor:
    return torch.from_numpy(result.images if hasattr(result, "images") else result[0])


def test_a_mounted_pipeline_makes_the_stock_images(pipe, tmp_path: Path) -> None:
    stock = images(call(pipe))
    with MixerAdapter.build(pipe, "softmax").mounted():
        assert close(images(call(pipe)), stock, 1e-4)
        assert torch.equal(images(call(pipe, return_dict=False)), images(call(pipe)))
    assert torch.equal(images(call(pipe)), stock)
    pipe.save_pretrained(tmp_path)
    restored = type(pipe).from_pretrained(tmp_path)
    stock = images(call(restored))
    with MixerAdapter.build(restored, "softmax").mounted():
        assert close(images(call(restored)), stock, 1e-4)


def test_images_of_a_batch_are_those_of_single_calls(pipe) -> None:
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    if "Flux" in type(pipe).__name__:
        latents = pipe._pack_latents(latents, 2, 4, 8, 8)
    with MixerAdapter.build(pipe, "softmax").mounted():
        together = images(call(pipe, ["a", "b c"], latents=latents))
        for index, prompt in enumerate(("a", "b c")):
            single = images(call(pipe, prompt, latents=latents[index : index + 1]))
            assert close(single, together[index : index + 1], 1e-4)
        assert images(call(pipe, "a", num_images_per_prompt=2)).shape[0] == 2
