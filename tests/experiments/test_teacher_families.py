"""Teachers of every family: opened from disk, encoded, predicted with, and distinguished by their fingerprints."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionXLPipeline

from experiments.teacher.load import load_teacher, open_teacher
from experiments.teacher.teacher import Teacher
from tests.unet_adapters import pipelines

CAPTIONS = ["a", "b c d e f g h i j k l m n o p q r s t", ""]  # one token, more than fit, none
SIZES = [(16, 16), (16, 24), (32, 16)]


def _sd15() -> Any:
    return pipelines.make()


def _sd21() -> Any:
    pipe = pipelines.make()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    return pipe


def _sdxl() -> Any:
    pipe = pipelines.make("SDXL")
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)  # as the published one
    pipe.register_to_config(force_zeros_for_empty_prompt=True)
    return pipe


FAMILIES: dict[str, Callable[[], Any]] = {"SD-1.5": _sd15, "SD-2.1": _sd21, "SDXL": _sdxl}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A pipeline of each family in diffusers format."""
    root = tmp_path_factory.mktemp("families")
    for name, make in FAMILIES.items():
        make().save_pretrained(root / name)
    return {name: root / name for name in FAMILIES}


def _images(size: tuple[int, int], count: int = len(CAPTIONS)) -> torch.Tensor:
    return pipelines.noise(count, 3, *size).tanh()


# --- opening --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_opened_frozen_in_eval_and_with_the_same_weights(name: str, folders: dict[str, Path]) -> None:
    pipe = load_teacher(str(folders[name]))
    original = FAMILIES[name]()
    assert type(pipe) is type(original)
    networks = {n: m for n, m in pipe.components.items() if isinstance(m, torch.nn.Module)}
    assert len(networks) == (4 if name == "SDXL" else 3)
    for part, network in networks.items():
        assert not network.training and not any(p.requires_grad for p in network.parameters()), part
        theirs = getattr(original, part).state_dict()
        assert all(torch.equal(value, theirs[key]) for key, value in network.state_dict().items()), part


@pytest.mark.parametrize("name", FAMILIES)
def test_opening_says_nothing(name: str, folders: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    load_teacher(str(folders[name]))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_the_autoencoder_stays_float32(dtype: torch.dtype, folders: dict[str, Path]) -> None:
    teacher = open_teacher(str(folders["SDXL"]), dtype)
    assert teacher.pipe.vae.dtype == torch.float32
    assert teacher.denoiser.dtype == teacher.pipe.text_encoder.dtype == teacher.pipe.text_encoder_2.dtype == dtype
    batch = teacher.encode(_images((16, 16)), CAPTIONS)
    assert batch["latents"].dtype == torch.float32 and batch["text"].dtype == dtype
    predicted = teacher.predict(batch["latents"], torch.tensor([1, 500, 999]), batch)
    assert predicted.dtype == dtype and predicted.isfinite().all()


def _without(path: str) -> Callable[[Path], None]:
    return lambda folder: shutil.rmtree(folder / path) if (folder / path).is_dir() else (folder / path).unlink()


def _cut(folder: Path) -> None:
    file = next((folder / "unet").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:1000])


def _other_family(folder: Path) -> None:
    text = (folder / "model_index.json").read_text()
    (folder / "model_index.json").write_text(text.replace('"unet"', '"transformer"'))


@pytest.mark.parametrize(
    "damage",
    [
        _without("model_index.json"),
        _without("vae"),
        _without("unet/config.json"),
        _cut,
        _other_family,
        lambda folder: (folder / "model_index.json").write_text("{"),
        lambda folder: (folder / "tokenizer" / "tokenizer.json").write_text("{"),
    ],
    ids=["no index", "no vae", "no config", "cut weights", "no UNet", "bad index", "bad tokenizer"],
)
def test_a_damaged_teacher_is_one_clear_sentence(
    damage: Callable[[Path], None], folders: dict[str, Path], tmp_path: Path
) -> None:
    copy = shutil.copytree(folders["SD-1.5"], tmp_path / "copy")
    damage(copy)
    with pytest.raises(
        ValueError, match=r"^Cannot load the teacher '.*copy': .+ Expected 'embedded', a folder"
    ) as error:
        load_teacher(str(copy))
    assert "\n" not in str(error.value)


# --- encoding and predicting ----------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_has_what_the_unet_takes(name: str, size: tuple[int, int], folders: dict[str, Path]) -> None:
    teacher = open_teacher(str(folders[name]))
    images = _images(size)
    timesteps = torch.tensor([0, 400, 999])
    batch = teacher.encode(images, CAPTIONS)
    again = teacher.encode(images, CAPTIONS)
    assert set(batch) == ({"latents", "text", "pooled", "time_ids"} if name == "SDXL" else {"latents", "text"})
    assert all(torch.equal(value, again[key]) for key, value in batch.items())
    assert batch["latents"].shape == (3, 4, size[0] // 2, size[1] // 2)
    assert len({tuple(text.flatten().tolist()) for text in batch["text"]}) == 3, (
        "different captions have different states"
    )

    noise = pipelines.noise(*batch["latents"].shape, seed=5)
    noisy = teacher.scheduler.add_noise(batch["latents"], noise, timesteps)
    predicted = teacher.predict(noisy, timesteps, batch)
    target = teacher.target(batch["latents"], noise, timesteps)
    assert predicted.shape == target.shape == batch["latents"].shape
    alphas = FAMILIES[name]().scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    velocity = alphas.sqrt() * noise - (1 - alphas).sqrt() * batch["latents"]
    torch.testing.assert_close(target, velocity if name == "SD-2.1" else noise)


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_predict_is_the_unet_s_own_call_in_the_pipeline(name: str, folders: dict[str, Path]) -> None:
    """A real call of the pipeline, without guidance: its UNet's arguments and output, once, are ours."""
    teacher = open_teacher(str(folders[name]))
    received: list[Any] = []
    hook = teacher.denoiser.register_forward_hook(
        lambda module, args, kwargs, output: received.append((args, kwargs, output[0])), with_kwargs=True
    )
    teacher.pipe("a b", height=16, width=24, num_inference_steps=1, guidance_scale=1.0, output_type="latent")
    hook.remove()
    (noisy, timestep), calls, output = received[0]
    batch = teacher.encode(_images((16, 24), 1), ["a b"])
    assert torch.equal(batch["text"], calls["encoder_hidden_states"])
    added = calls.get("added_cond_kwargs") or {}
    if name == "SDXL":
        assert torch.equal(batch["pooled"], added["text_embeds"])
        assert batch["time_ids"].tolist() == added["time_ids"].tolist() == [[16, 24, 0, 0, 16, 24]]
    torch.testing.assert_close(teacher.predict(noisy, timestep.reshape(1), batch), output)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_unconditional_is_what_the_pipeline_guides_with(name: str, folders: dict[str, Path]) -> None:
    teacher = open_teacher(str(folders[name]))
    blank = teacher.unconditional
    caption = teacher.conditions(["a"])
    assert {key: value.shape for key, value in blank.items()} == {k: v.shape[1:] for k, v in caption.items()}
    empty = teacher.conditions([""])
    if name == "SDXL":  # the published XL is trained, and guided, with zeros; not with an encoded empty caption
        assert not any(value.any() for value in blank.values()) and empty["text"].any()
    else:
        assert torch.equal(blank["text"], empty["text"][0])


def test_time_ids_stay_exact_in_half_precision(folders: dict[str, Path]) -> None:
    """1,032 is not a number in bfloat16."""
    teacher = open_teacher(str(folders["SDXL"]), torch.bfloat16)
    assert teacher.host.size_conditions((1032, 2050))["time_ids"].tolist() == [[1032, 2050, 0, 0, 1032, 2050]]


# --- fingerprints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_a_copy_has_the_same_fingerprint(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    first = open_teacher(str(folders[name]))
    second = open_teacher(str(shutil.copytree(folders[name], tmp_path / "elsewhere")))
    first.encode(_images((16, 16)), CAPTIONS)  # using it changes nothing
    assert first.encoder_fingerprint == second.encoder_fingerprint == Teacher(FAMILIES[name]()).encoder_fingerprint


def _weight(part: str) -> Callable[[Any], None]:
    def change(pipe: Any) -> None:
        largest = max(getattr(pipe, part).parameters(), key=lambda p: p.numel())
        largest.data.flatten()[-1] += 1e-3

    return change


def _tokenizer(pipe: Any) -> None:
    vocabulary = pipe.tokenizer.get_vocab()
    vocabulary["a</w>"], vocabulary["b</w>"] = vocabulary["b</w>"], vocabulary["a</w>"]
    pipe.tokenizer = type(pipe.tokenizer)(vocab=vocabulary, merges=[], model_max_length=16)


CHANGES: dict[str, Callable[[Any], None]] = {
    "one weight of the autoencoder": _weight("vae"),
    "one weight of a text encoder": _weight("text_encoder"),
    "one weight of the second text encoder": _weight("text_encoder_2"),
    "the scaling factor": lambda pipe: pipe.vae.register_to_config(scaling_factor=0.13025),
    "the tokenizer": _tokenizer,
    "the tokenizer's length": lambda pipe: setattr(pipe.tokenizer_2, "model_max_length", 8),
    "the padding": lambda pipe: setattr(pipe.tokenizer, "pad_token", "a"),
    "the precision": lambda pipe: pipe.text_encoder.to(torch.bfloat16),
    "the empty caption": lambda pipe: pipe.register_to_config(force_zeros_for_empty_prompt=False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_the_encoding_changes_the_fingerprint(change: str) -> None:
    pipe = _sdxl()
    CHANGES[change](pipe)
    assert Teacher(pipe).encoder_fingerprint != Teacher(_sdxl()).encoder_fingerprint


def test_the_unet_and_the_noise_are_not_in_the_fingerprint() -> None:
    pipe = _sdxl()
    _weight("unet")(pipe)
    pipe.scheduler = DDIMScheduler()
    assert isinstance(pipe, StableDiffusionXLPipeline)
    assert Teacher(pipe).encoder_fingerprint == Teacher(_sdxl()).encoder_fingerprint
