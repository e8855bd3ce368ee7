"""The embedded teacher: plain diffusers files, small, and with a card; and the recipe that makes one."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from experiments.teacher.card import backgrounds_obeyed, retrieval, write_card
from experiments.teacher.load import EMBEDDED, load_teacher
from experiments.teacher.recipe import TeacherRecipe
from tests.experiments.conftest import TINY


def test_the_weights_are_small_and_need_no_code_of_ours() -> None:
    size = sum(f.stat().st_size for f in EMBEDDED.rglob("*.safetensors"))
    assert 1e6 < size <= 16e6
    assert not [f for f in EMBEDDED.rglob("*") if f.suffix in {".bin", ".pt", ".pkl", ".ckpt"}]
    pipe = StableDiffusionPipeline.from_pretrained(EMBEDDED, safety_checker=None)
    assert pipe.vae_scale_factor == 4
    assert pipe.vae.config.latent_channels == 4
    card = (EMBEDDED / "README.md").read_text()
    assert "CC-BY 4.0" in card and "dB" in card
    assert (EMBEDDED / "sheet.png").is_file()


def test_the_embedded_teacher_obeys_backgrounds() -> None:
    """What it was trained for, on four captions: far above chance, which is one in twelve."""
    pipe = load_teacher()
    captions = [
        "red apple, teal background",
        "pizza, blue background",
        "sunflower, purple background",
        "fire, black background",
    ]
    seeds = [torch.Generator().manual_seed(k) for k in range(4)]
    images = pipe(
        captions, height=64, width=64, num_inference_steps=12, guidance_scale=3.0, generator=seeds, output_type="pt"
    ).images
    assert images.shape == (4, 3, 64, 64)
    assert images.isfinite().all()
    assert backgrounds_obeyed(images * 2 - 1, captions) >= 0.5


def test_a_card_is_written_for_any_pipeline(tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.teacher.card.CANDIDATES", 4)
    monkeypatch.setattr("experiments.teacher.card.STEPS", 1)
    card = write_card(tiny_teacher, TINY).read_text()
    assert "Short of the mark" in card
    assert (tiny_teacher / "sheet.png").is_file()


def test_recipes_scale_and_refuse_unknown_keys() -> None:
    assert TeacherRecipe().scaled(0.5).unet.steps == TeacherRecipe().unet.steps // 2
    with pytest.raises(ValueError):
        TeacherRecipe.model_validate({"unet_chanels": [8, 16]})


def test_a_teacher_that_is_not_there_is_one_clear_sentence() -> None:
    with pytest.raises(ValueError, match="Cannot load the teacher"):
        load_teacher("no/such-model-here")


def test_measures_can_tell_right_from_wrong() -> None:
    """Real pictures with their own captions score near one; with each other's, near chance."""
    from transformers import CLIPModel

    from experiments.data import EmojiSet, batch

    pipe, judge = load_teacher(), CLIPModel.from_pretrained(EMBEDDED / "evaluator", dtype=torch.float32).eval()
    images, captions = batch(EmojiSet(), range(0, 1600, 80), 64, [7] * 20)
    with torch.no_grad():
        assert retrieval(pipe, judge, images, captions) >= 0.8
        assert retrieval(pipe, judge, images, captions[1:] + captions[:1]) <= 0.2
    assert backgrounds_obeyed(images, captions) >= 0.95
    assert backgrounds_obeyed(images, captions[1:] + captions[:1]) <= 0.5
