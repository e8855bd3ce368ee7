"""Memory savings: they leave the prediction and the model unchanged, and are for inference only."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel
from torch import Tensor

from tests.unet_adapters import comparisons, pipelines
from unet_adapters import MixerAdapter
from unet_adapters.highres import SAVINGS, ControlNetCondition, save_memory
from unet_adapters.highres.denoising import ClassifierFreeGuidance
from unet_adapters.highres.pipeline import encode_prompts
from unet_adapters.hosts import find_host

COMBINATIONS = [names for count in (1, 2, 4) for names in combinations(SAVINGS, count)]


def predict(pipe: Any, savings: tuple[str, ...], control: ControlNetCondition | None = None) -> Tensor:
    """Return one guided prediction in float64 with these savings."""
    conditions = []
    for encoded in encode_prompts(pipe, "abc", "de", 3.0):
        condition = {name: tensor.double() for name, tensor in encoded.items()}
        if "pooled" in condition:
            condition["time_ids"] = torch.tensor([[32.0, 48, 0, 0, 32, 48]]).double()
        conditions.append(condition)
    guidance = ClassifierFreeGuidance(conditions[0], conditions[1], 3.0, "guidance" in savings, control)
    with torch.no_grad(), save_memory(pipe.unet, savings, chunk_tokens=37):
        return guidance.predict(
            find_host(pipe.unet.double()), pipelines.noise(1, 4, 16, 24).double(), torch.tensor(500)
        )


@pytest.mark.parametrize("family", ["text-to-image", "SDXL"])
@pytest.mark.parametrize("savings", COMBINATIONS, ids="+".join)
def test_savings_do_not_change_the_prediction(family: str, savings: tuple[str, ...]) -> None:
    pipe = pipelines.make(family)
    before = comparisons.fingerprint(pipe.unet.double())
    plain = predict(pipe, ())
    torch.testing.assert_close(predict(pipe, savings), plain, rtol=1e-9, atol=1e-9)
    comparisons.assert_same_model(comparisons.fingerprint(pipe.unet), before)
    assert torch.equal(predict(pipe, ()), plain)
    with MixerAdapter.build(pipe, "linfusion").mounted():
        torch.testing.assert_close(predict(pipe, savings), predict(pipe, ()), rtol=1e-9, atol=1e-9)


def test_savings_work_with_a_controlnet() -> None:
    pipe = pipelines.make()
    network = pipelines.seeded(lambda: ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(4, 8)))
    for block in network.controlnet_down_blocks:
        block.weight.data.normal_(std=0.1)
    control = ControlNetCondition(network.double(), pipelines.noise(1, 3, 32, 48).sigmoid())
    plain = predict(pipe, (), control)
    assert not torch.allclose(plain, predict(pipe, ()))
    torch.testing.assert_close(predict(pipe, SAVINGS, control), plain, rtol=1e-9, atol=1e-9)


def test_savings_are_for_inference_only() -> None:
    pipe = pipelines.make()
    x = pipelines.noise(1, 4, 8, 8).requires_grad_()
    text = torch.zeros(1, 3, pipe.unet.config.cross_attention_dim)
    for saving in ("activations", "feed_forward"):
        with save_memory(pipe.unet, [saving]), pytest.raises(RuntimeError, match="inference only"):
            pipe.unet(x, 5, text)
    with pytest.raises(ValueError, match="Unknown saving 'magic'"), save_memory(pipe.unet, ["magic"]):
        pass
