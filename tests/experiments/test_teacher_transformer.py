"""The second embedded teacher: a tiny PixArt that imitates the UNet, in stock diffusers classes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import PixArtSigmaPipeline
from PIL import Image

from experiments.teacher import networks
from experiments.teacher.judge import attention_mask
from experiments.teacher.load import load_teacher, open_teacher
from experiments.teacher.samples import write_sheet
from experiments.teacher.shards import encode_captions
from experiments.teacher.train import train_teacher
from experiments.teacher.transformer import Imitation, load_trained_transformer, train_transformer, with_positions
from tests.experiments.conftest import TINY
from unet_adapters.hosts import find_host

CAPTIONS = ["a red apple, teal background", "three of the same, yellow background"]


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training state with a UNet and a transformer."""
    directory = tmp_path_factory.mktemp("state")
    train_teacher(directory, TINY)
    (directory / "unet").rename(directory / "decay")
    train_transformer(directory, TINY)
    return directory


@pytest.fixture(scope="module")
def folder(state: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of its pipeline."""
    pipe, _ = load_trained_transformer(state, TINY)
    target = tmp_path_factory.mktemp("transformer")
    pipe.save_pretrained(target)
    return target


@torch.no_grad()
def test_longer_text_encoders_give_the_same_states(tiny_teacher: Path) -> None:
    """Of the tokens of the caption; what follows is padding."""
    pipe = load_teacher(str(tiny_teacher))
    tokens = encode_captions(pipe.tokenizer, CAPTIONS)
    mask = attention_mask(tokens, pipe.tokenizer).bool()
    longer = with_positions(pipe.text_encoder, 40)
    padded = torch.cat([tokens, torch.full((2, 20), pipe.tokenizer.pad_token_id)], dim=1)
    expected = pipe.text_encoder(tokens).last_hidden_state
    got = longer(padded, attention_mask=torch.cat([mask, torch.zeros(2, 20)], dim=1).long()).last_hidden_state
    torch.testing.assert_close(got[:, :20][mask], expected[mask])


def test_its_pipeline_is_stock_and_an_ordinary_teacher(folder: Path) -> None:
    stock = PixArtSigmaPipeline.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 2, "use_resolution_binning": False}
    images = [
        stock(CAPTIONS[0], generator=torch.Generator().manual_seed(0), output_type="pt", **call, **options).images
        for options in ({}, {"max_sequence_length": 20})
    ]
    torch.testing.assert_close(*images, rtol=1e-3, atol=1e-4)  # padding has no influence
    teacher = open_teacher(str(folder))
    assert len(find_host(teacher.pipe).sites()) == TINY.dit_layers
    batch = teacher.encode(torch.zeros(2, 3, 64, 64), CAPTIONS)
    assert batch["text"].shape == (2, TINY.max_tokens, TINY.text_width)
    steps = torch.tensor([999, 500])
    assert teacher.predict(batch["latents"], steps, batch).shape == batch["latents"].shape


def test_its_samples_are_drawn_like_the_unets(folder: Path, tmp_path: Path) -> None:
    captions = write_sheet(load_teacher(str(folder)), tmp_path / "sheet.png", count=2)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert len(captions) == 2 and sheet.height == 2 * (64 + 4) and sheet.width > 2 * 64


def test_its_training_resumes(state: Path, tmp_path: Path) -> None:
    for name in ("encoder", "tokenizer", "decoder", "decay", "latents"):
        (tmp_path / name).symlink_to(state / name)
    short = TINY.model_copy(update={"dit": TINY.dit.model_copy(update={"steps": 1})})
    for recipe in (short, TINY):
        train_transformer(tmp_path, recipe)
    once, twice = (
        safetensors.torch.load_file(f / "transformer" / "checkpoints" / "step-00000002.safetensors")
        for f in (state, tmp_path)
    )
    assert once.keys() == twice.keys() and all(torch.equal(once[key], twice[key]) for key in once)


def test_it_learns_the_unets_prediction_not_the_noise(state: Path) -> None:
    """The loss is the difference to the UNet, and the UNet stays as it is."""
    model = train_transformer(state, TINY)
    assert isinstance(model, Imitation)
    before = copy.deepcopy(model.teacher.state_dict())
    latents = torch.randn(2, TINY.latent_channels, 16, 16)
    losses = model((latents, encode_captions(model.words, CAPTIONS)))
    losses["loss"].backward()
    assert all(p.grad is None for p in model.teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.teacher.state_dict().items())
    assert losses["loss"] != losses["to_truth"] and losses["teacher_to_truth"] > 0
    trained = [p for p in model.transformer.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == sum(p.numel() for p in networks.transformer(TINY).parameters())
