"""The embedded teacher: plain diffusers files, small, and with a card; and the recipe that makes one."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from transformers import CLIPModel

from experiments.data import SceneSet, batch
from experiments.data.emoji import BACKGROUNDS
from experiments.teacher import gates, networks, train
from experiments.teacher.card import write_card
from experiments.teacher.gates import name_candidates, render_all
from experiments.teacher.inspect_images import background_accuracy, count_objects, find_backgrounds, label_components
from experiments.teacher.judge import attention_mask, top1_accuracy
from experiments.teacher.load import EMBEDDED, load_teacher
from experiments.teacher.mixing import CONTROLS, fixed_mixing
from experiments.teacher.need import encode_scenes, train_from_scratch, velocity_errors
from experiments.teacher.noise_schedules import create_noise_schedule
from experiments.teacher.objectives import draw_timesteps, roughness
from experiments.teacher.recipe import TeacherRecipe
from experiments.teacher.samples import unpicked_scenes
from experiments.teacher.shards import LatentShards, encode_captions, make_batches
from experiments.teacher.train import train_teacher
from tests.experiments.conftest import TINY
from unet_adapters.highres.schedule import oracle_error


def test_the_weights_are_small_and_need_no_code_of_ours() -> None:
    size = sum(f.stat().st_size for f in EMBEDDED.rglob("*.safetensors"))
    assert 1e6 < size <= 16e6
    assert not [f for f in EMBEDDED.rglob("*") if f.suffix in {".bin", ".pt", ".pkl", ".ckpt"}]
    pipe = StableDiffusionPipeline.from_pretrained(EMBEDDED, safety_checker=None)
    assert pipe.vae_scale_factor == 4
    card = (EMBEDDED / "README.md").read_text()
    assert "CC-BY 4.0" in card and "dB" in card
    assert (EMBEDDED / "sheet.png").is_file()


def test_the_embedded_teacher_draws_the_backgrounds_of_captions() -> None:
    """On four captions: far above chance, which is one in twelve."""
    pipe = load_teacher()
    captions = [
        "a red apple, teal background",
        "two doughnuts, blue background",
        "a sunflower, purple background",
        "three strawberries, black background",
    ]
    seeds = [torch.Generator().manual_seed(k) for k in range(4)]
    images = pipe(
        captions, height=64, width=64, num_inference_steps=12, guidance_scale=2.0, generator=seeds, output_type="pt"
    ).images
    assert images.shape == (4, 3, 64, 64)
    assert images.isfinite().all()
    assert background_accuracy(images * 2 - 1, captions) >= 0.5


@pytest.mark.parametrize("steps", [2, 20, 50])
@pytest.mark.parametrize("strength", [1.0, 0.5, 0.3])
def test_the_sampler_ends_at_the_image_of_a_perfect_model(steps: int, strength: float) -> None:
    assert oracle_error(networks.sampler(), steps, strength) < 1e-3


def test_the_sampler_has_the_noise_levels_of_training(tiny_teacher: Path) -> None:
    trained = networks.noise_schedule()
    shipped = create_noise_schedule(load_teacher(str(tiny_teacher)).scheduler)
    latents = torch.randn(3, 8, 4, 4)
    noise = torch.randn(3, 8, 4, 4)
    timesteps = torch.tensor([0, 500, 999])
    assert torch.equal(trained.add_noise(latents, noise, timesteps), shipped.add_noise(latents, noise, timesteps))
    assert torch.equal(trained.target(latents, noise, timesteps), shipped.target(latents, noise, timesteps))


def test_a_card_is_written_for_any_pipeline(tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.teacher.card.SHEET", 2)
    pipe = load_teacher(str(tiny_teacher))
    judge = CLIPModel.from_pretrained(tiny_teacher / "evaluator", dtype=torch.float32).eval()
    monkeypatch.setattr("experiments.teacher.need.TIMESTEPS", (999, 500))
    measured = {
        "psnr": gates.measure_autoencoder(pipe, 2),
        "need": gates.measure_need(pipe, 2),
        "drawing": {str(s): gates.measure_drawing(pipe, judge, size=s, named=2, counted=2) for s in (64, 128)},
    }
    card = write_card(tiny_teacher, TINY, json.loads(json.dumps(measured))).read_text()
    assert "**not met**" in card and "CC-BY 4.0" in card and "identity" in card
    assert (tiny_teacher / "sheet.png").is_file() and (tiny_teacher / "gates.json").is_file()


def test_roughness_tells_noise_from_slow_variation() -> None:
    noise = torch.randn(4, 2, 32, 32, generator=torch.Generator().manual_seed(0))
    ramp = torch.linspace(-1, 1, 32).expand(4, 2, 32, 32)
    assert roughness(noise) > 0.8
    assert roughness(ramp) < 0.01
    torch.testing.assert_close(roughness(7 * noise), roughness(noise))
    assert roughness(torch.ones(1, 1, 4, 4)) == 0


def test_recipes_scale_and_refuse_unknown_keys() -> None:
    assert TeacherRecipe().scaled(0.5).vae.steps == TeacherRecipe().vae.steps // 2
    assert TeacherRecipe().with_batch_size(256).unet.batch_size == 256
    with pytest.raises(ValueError):
        TeacherRecipe.model_validate({"unet_chanels": [8, 16]})


def test_a_teacher_that_is_not_there_is_one_clear_sentence() -> None:
    with pytest.raises(ValueError, match="Cannot load the teacher"):
        load_teacher("no/such-model-here")


def test_training_resumes_where_it_stopped(tmp_path: Path) -> None:
    """Four steps in two calls give the same UNet as four in one, bit for bit."""
    short, longer = (
        TINY.model_copy(update={"unet": TINY.unet.model_copy(update={"steps": steps, "schedule": "constant"})})
        for steps in (2, 4)
    )
    for name, recipes in (("once", [longer]), ("twice", [short, longer])):
        for recipe in recipes:
            train_teacher(tmp_path / name, recipe)
    files = [tmp_path / name / "unet" / "checkpoints" / "step-00000004.safetensors" for name in ("once", "twice")]
    once, twice = (safetensors.torch.load_file(file) for file in files)
    assert once.keys() == twice.keys()
    assert all(torch.equal(once[key], twice[key]) for key in once)


def test_shards_are_pure_functions_and_large_ones_have_fewer_scenes(tiny_teacher: Path, tmp_path: Path) -> None:
    pipe = load_teacher(str(tiny_teacher))
    first, second = (LatentShards(tmp_path / name, pipe.vae, pipe.tokenizer, 8) for name in ("a", "b"))
    a = first.load(1)
    b = second.load(1)
    large = first.load(1, 128)
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert a["latents"].shape == (8, 8, 16, 16) and large["latents"].shape == (2, 8, 32, 32)
    assert not torch.equal(a["latents"], first.load(0)["latents"])


def test_controls_replace_every_self_attention_and_are_taken_back(tiny_teacher: Path) -> None:
    pipe = load_teacher(str(tiny_teacher))
    latents, tokens = encode_scenes(pipe, "train", 2)
    before = velocity_errors(pipe, latents, tokens, (500,))
    results = {}
    for name in CONTROLS:
        with fixed_mixing(pipe.unet, name):
            results[name] = velocity_errors(pipe, latents, tokens, (500,))[500]
    assert len({before[500], *results.values()}) == 4
    assert velocity_errors(pipe, latents, tokens, (500,)) == before


def test_a_pair_from_scratch_differs_in_its_mixing_alone(tiny_teacher: Path, tmp_path: Path) -> None:
    pipe = load_teacher(str(tiny_teacher))
    losses = {
        control: train_from_scratch(tmp_path, pipe.vae, pipe.tokenizer, TINY, control=control, steps=2)
        for control in (None, "identity")
    }
    assert losses[None][0] == pytest.approx(losses["identity"][0], rel=0.2)
    assert losses[None] != losses["identity"]


def test_objects_are_counted_and_backgrounds_found_on_true_renders() -> None:
    for size in (64, 128):
        data = SceneSet(kinds=gates.COUNTED_KINDS)
        indices = torch.randperm(len(data), generator=torch.Generator().manual_seed(3))[:60].tolist()
        images, captions = batch(data, indices, size, [5] * len(indices))
        assert background_accuracy(images, captions) == 1
        assert background_accuracy(images, captions[1:] + captions[:1]) < 0.5
        backgrounds = find_backgrounds(images)
        counts = [count_objects(image, name) for image, name in zip(images, backgrounds, strict=True)]
        expected = [len(data.scene(index, 5).placements) for index in indices]
        assert sum(a == b for a, b in zip(counts, expected, strict=True)) >= 0.93 * len(indices)
    assert set(backgrounds) <= set(BACKGROUNDS)


def test_components_touch_at_corners_too() -> None:
    mask = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 0, 1]], dtype=torch.bool)
    labels = label_components(mask)
    assert len(labels[mask].unique()) == 4
    assert labels[0, 0] == labels[1, 1] and not labels[~mask].any()


@pytest.mark.parametrize("focus", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("count", [1, 3, 48])
def test_timesteps_have_their_distribution_at_any_batch_size(count: int, focus: float) -> None:
    """Of many batches: the share of each tenth is that of the mixture, and within a batch uniform ones are spread."""
    torch.manual_seed(0)
    steps = torch.cat([draw_timesteps(count, 1000, focus, torch.device("cpu")) for _ in range(48_000 // count)])
    assert steps.min() >= 0 and steps.max() <= 999
    edges = torch.linspace(0, 1, 11).double()
    logits = (torch.logit(edges) - 0.6) / 0.8
    expected = (1 - focus) / 10 + focus * torch.special.ndtr(logits).diff()
    shares = torch.histc(steps.float(), 10, 0, 1000) / len(steps)
    torch.testing.assert_close(shares.double(), expected, atol=0.01, rtol=0)
    if not focus:
        tenths = draw_timesteps(40, 1000, focus, torch.device("cpu")) // 100
        assert tenths.bincount().tolist() == [4] * 10


def test_the_judge_scores_by_the_caption(tiny_teacher: Path) -> None:
    """The masks end after the first end-of-text token, and the share is one of the number of images."""
    pipe = load_teacher(str(tiny_teacher))
    judge = CLIPModel.from_pretrained(tiny_teacher / "evaluator", dtype=torch.float32).eval()
    tokens = encode_captions(pipe.tokenizer, ["a key, teal background", ""])
    assert attention_mask(tokens, pipe.tokenizer).sum(dim=1).tolist() == [7, 2]
    scenes = unpicked_scenes(4, kinds=("single",))
    candidates = [name_candidates(scene, 5) for scene in scenes]
    assert top1_accuracy(judge, pipe.tokenizer, render_all(scenes, 64), candidates) in (0, 0.25, 0.5, 0.75, 1)


def test_names_to_choose_among_differ_in_the_drawing_only() -> None:
    scene = unpicked_scenes(1, kinds=("single",))[0]
    candidates = name_candidates(scene)
    assert candidates[0] == scene.caption and len(set(candidates)) == 100
    assert len({caption.rsplit(", ", 1)[1] for caption in candidates}) == 1


def test_the_decoder_is_trained_while_latents_stay(tiny_teacher: Path) -> None:
    """The exported autoencoder has the encoder of the first stage, which the cached latents are of."""
    coder = AutoencoderKL.from_pretrained(tiny_teacher, subfolder="vae")
    assert coder.config.latent_channels == 8
    assert coder.config.scaling_factor != 1


def test_a_training_keeps_one_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cached tokens and trained embeddings rely on it; a newly trained one differs between processes."""
    trained = train.open_tokenizer(tmp_path, TeacherRecipe())
    monkeypatch.setattr(train.networks, "tokenizer", lambda *_: pytest.fail("trained again"))
    reopened = train.open_tokenizer(tmp_path, TeacherRecipe())
    assert reopened.get_vocab() == trained.get_vocab() and any("rainbow" in word for word in reopened.get_vocab())
    assert reopened("a box, two cats").input_ids == trained("a box, two cats").input_ids
    assert reopened.model_max_length == trained.model_max_length == TeacherRecipe().max_tokens


@pytest.mark.parametrize("size", [64, 96, 128])
@pytest.mark.parametrize(("batch_size", "processes"), [(48, 2), (48, 4), (16, 4), (6, 2), (3, 1)])
def test_batches_of_every_size_can_be_divided_among_processes(size: int, batch_size: int, processes: int) -> None:
    shard = {"latents": torch.zeros(8, 1, 2, 2), "tokens": torch.zeros(8, 3, dtype=torch.int32)}
    shards = SimpleNamespace(scenes=8, load=lambda number, size: shard)
    batch = make_batches(shards, torch.zeros(3), batch_size=batch_size, count=1, dropout=0.0, large=lambda step: size)
    assert len(batch(0)[0]) % processes == 0
    assert size > 64 or len(batch(0)[0]) == batch_size
