"""Transformers as teachers: encoded, noised and predicted with as their own pipelines do, and distilled one step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from experiments.config import EvaluationConfig, FitConfig, LossTerm
from experiments.distill.batches import draw_batch
from experiments.distill.context import EncodedImages
from experiments.distill.loss import DistillationLoss
from experiments.distill.output_gains import fit_output_gains
from experiments.metrics.inputs.generated_images import generate_images
from experiments.teacher.load import load_teacher, open_teacher
from experiments.teacher.teacher import Teacher
from tests.unet_adapters import pipelines
from tests.unet_adapters.transformer_pipelines import PIPELINES, PROMPT_TOKENS
from unet_adapters import MixerAdapter

CAPTIONS = ["a b c", ""]
LATENTS = (8, 12)
FIT = FitConfig(steps=1, batch_size=2, learning_rate=1e-3)


@pytest.fixture(params=list(PIPELINES))
def kind(request) -> str:
    return request.param


@pytest.fixture
def teacher(kind) -> Teacher:
    return Teacher(PIPELINES[kind]())


def make_images(teacher: Teacher) -> torch.Tensor:
    height, width = (side * teacher.pipe.vae_scale_factor for side in LATENTS)
    return pipelines.noise(2, 3, height, width).tanh()


def encode(teacher: Teacher) -> dict[str, torch.Tensor]:
    return teacher.encode(make_images(teacher), CAPTIONS)


@torch.no_grad()
def test_a_batch_has_what_the_transformer_takes(teacher, kind) -> None:
    batch = encode(teacher)
    expected = {
        "PixArt": {"text", "text_mask"},
        "SD3.5 medium": {"text", "pooled"},
        "Flux": {"text", "pooled"},
        "HunyuanDiT": {"text", "text_mask", "text_t5", "text_t5_mask"},
    }
    sizes = {"time_ids"} if kind == "HunyuanDiT" else set()
    assert set(batch) == {"latents", *expected[kind], *sizes}
    assert batch["latents"].shape == (2, 4, *LATENTS)
    vae = teacher.pipe.vae
    decoded = vae.decode(batch["latents"] / vae.config.scaling_factor + (vae.config.shift_factor or 0)).sample
    means = vae.encode(make_images(teacher)).latent_dist.mean
    torch.testing.assert_close(decoded, vae.decode(means).sample)
    blank = teacher.unconditional
    assert {name: value.shape for name, value in blank.items()} == {n: batch[n].shape[1:] for n in expected[kind]}


@torch.no_grad()
def test_noise_and_target_are_those_of_the_pipelines_scheduler(teacher, kind) -> None:
    batch = encode(teacher)
    noise = pipelines.noise(*batch["latents"].shape, seed=5)
    timesteps = torch.tensor([2, 990])
    noisy = teacher.scheduler.add_noise(batch["latents"], noise, timesteps)
    target = teacher.target(batch["latents"], noise, timesteps)
    called_at = teacher.scheduler.model_timesteps(timesteps)
    scheduler = teacher.pipe.scheduler
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        torch.testing.assert_close(scheduler.scale_noise(batch["latents"], called_at, noise), noisy)
        torch.testing.assert_close(target, noise - batch["latents"])
        sigmas = (called_at / 1000)[:, None, None, None]
        torch.testing.assert_close(noisy - sigmas * target, batch["latents"])  # one exact step ends at the image
    else:
        torch.testing.assert_close(scheduler.add_noise(batch["latents"], noise, timesteps), noisy)
        velocity = scheduler.config.prediction_type == "v_prediction"
        expected = scheduler.get_velocity(batch["latents"], noise, timesteps) if velocity else noise
        torch.testing.assert_close(target, expected)
        assert torch.equal(called_at, timesteps)


@torch.no_grad()
def test_predict_is_the_transformers_own_call_in_the_pipeline(teacher, kind) -> None:
    received: list[Any] = []
    hook = teacher.denoiser.register_forward_hook(
        lambda module, args, kwargs, output: received.append((args, kwargs, output[0])), with_kwargs=True
    )
    guidance = 3.5 if kind == "Flux" else 1.0
    height, width = (side * teacher.pipe.vae_scale_factor for side in LATENTS)
    call = {"height": height, "width": width, "num_inference_steps": 2, "guidance_scale": guidance}
    call |= teacher.host.sampling_options(teacher.pipe)
    latents = pipelines.noise(1, 4, *LATENTS)
    initial = teacher.host._noise_arguments(latents, torch.ones(1))["hidden_states"] if kind == "Flux" else latents
    teacher.pipe("a b c", output_type="latent", latents=initial, **call)
    hook.remove()
    args, kwargs, output = received[0]
    timestep = (args[1] if len(args) > 1 else kwargs["timestep"]) * (1000 if kind == "Flux" else 1)
    batch = teacher.conditions(["a b c"])
    assert torch.equal(batch["text"], kwargs["encoder_hidden_states"])
    sizes = teacher.host.size_conditions((height, width))
    conditions = batch | sizes | teacher.host.guidance_conditions(teacher.pipe, guidance)
    predicted = teacher.host.predict(latents, timestep, conditions)
    stock = teacher.host._read_output(output, latents)
    torch.testing.assert_close(predicted, stock)
    assert ("guidance" in conditions) == (kind == "Flux")


@torch.no_grad()
def test_samples_have_the_size_that_is_asked_for(teacher, kind) -> None:
    """The network sees no other number of tokens, as it would where a pipeline picks the nearest size in a table."""
    plan = EvaluationConfig(sample_steps=1, prompts=("a b",))
    shapes: list[Any] = []
    hook = teacher.denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append((*args, kwargs.get("hidden_states"))[0].shape), with_kwargs=True
    )
    height, width = (side * teacher.pipe.vae_scale_factor for side in LATENTS)
    (image,) = generate_images(teacher.pipe, ["a b"], (height, width), plan, 1.0, seed=0)
    hook.remove()
    assert image.size == (width, height)
    expected = teacher.host._noise_arguments(pipelines.noise(1, 4, *LATENTS), torch.ones(1))
    assert shapes and all(shape[1:] == expected["hidden_states"].shape[1:] for shape in shapes)


@pytest.mark.parametrize("objective", ["noise", "output", "features", "local"])
def test_one_step_of_every_objective(teacher, kind, objective) -> None:
    adapter = MixerAdapter.build(teacher.pipe, "linear_attention")
    encoded = EncodedImages({16: encode(teacher)}, teacher.unconditional, source_digest="")
    batch = draw_batch(encoded, 0, FIT, teacher.train_timesteps, (16,), 0.5)
    loss = DistillationLoss(teacher, adapter, {objective: LossTerm()})
    before = loss(batch)["loss"]
    before.backward()
    with torch.no_grad():
        for parameter in adapter.student.parameters():
            if parameter.grad is not None:
                parameter -= 1e-3 * parameter.grad / parameter.grad.norm().clamp_min(1e-12)
    assert loss(batch)["loss"] < before


@torch.no_grad()
def test_output_gains_of_softmax_are_one(teacher) -> None:
    adapter = MixerAdapter.build(teacher.pipe, "softmax", output_gain=True)
    encoded = EncodedImages({16: encode(teacher)}, teacher.unconditional, source_digest="")
    batch = draw_batch(encoded, 0, FIT, teacher.train_timesteps, (16,))
    for gains in fit_output_gains(teacher, adapter, [batch]).values():
        torch.testing.assert_close(gains, torch.ones_like(gains), rtol=1e-4, atol=1e-4)


MATRIX_REFUSED = {
    "SD3.5 medium": "attends to text too",
    "Flux": "attends to text too",
    "HunyuanDiT": "rotates queries and keys",
}


def test_matrix_is_refused_where_attention_is_not_plain(teacher, kind) -> None:
    adapter = MixerAdapter.build(teacher.pipe, "linear_attention")
    encoded = EncodedImages({16: encode(teacher)}, teacher.unconditional, source_digest="")
    batch = draw_batch(encoded, 0, FIT, teacher.train_timesteps, (16,))
    loss = DistillationLoss(teacher, adapter, {"matrix": LossTerm()})
    if kind not in MATRIX_REFUSED:
        assert loss(batch)["loss"].isfinite()
        return
    with pytest.raises(ValueError, match=MATRIX_REFUSED[kind]):
        loss(batch)


def test_pipelines_are_opened_from_disk(kind, tmp_path: Path) -> None:
    original = PIPELINES[kind]()
    original.save_pretrained(tmp_path)
    assert type(load_teacher(str(tmp_path))) is type(original)
    opened = open_teacher(str(tmp_path))
    batch = opened.conditions(["a b c"])
    assert torch.equal(batch["text"], Teacher(original).conditions(["a b c"])["text"])
    assert opened.encoder_fingerprint == Teacher(original).encoder_fingerprint
    assert batch["text"].shape[1] == PROMPT_TOKENS[kind]
