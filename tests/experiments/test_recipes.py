"""Recipes: those that ship, mistakes in one sentence, and a run from teacher to card, killed and started again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from experiments.cli import app
from experiments.cli.distill import describe_losses
from experiments.distill.recipe import DistillationRecipe, list_recipes, load_recipe
from experiments.distill.run import run_recipe
from experiments.distill.student import build_student
from experiments.teacher.load import open_teacher
from unet_adapters import PROFILES, MixerAdapter, find_host
from unet_adapters.hosts.transformers.profiles import TRANSFORMER_PROFILES, TransformerProfile
from unet_adapters.hosts.unet_profiles import UNetProfile
from unet_adapters.site_mixer import SiteMixer, check_layer_options

TINY = """
name: tiny
about: Two stages of two steps.
teacher: {teacher}
mixer: {{name: linfusion, options: {{mid_dim: 4}}}}
distillation:
  before:
    - name: local
      objectives: {{local: 1, matrix: {{weight: 0.5, options: {{max_tokens: 256}}}}}}
      fit: {{steps: 4, batch_size: 2, learning_rate: 1e-3, checkpoint_every: 1, log_every: 1}}
  fit: {{steps: 4, batch_size: 2, learning_rate: 1e-3, checkpoint_every: 1, log_every: 1}}
  images: 4
  caption_dropout: 0.5
samples: {{prompts: ["a red apple, teal background", "full moon, red background"], every: 2, steps: 1, guidance: 3}}
"""
PUBLISHED = ["embedded_published", "sd15", "sd21", "sdxl"]


@pytest.fixture
def recipe(tiny_teacher: Path, tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY.format(teacher=tiny_teacher))
    return file


def quiet(*_: object) -> None:
    """No progress display."""


def find_teacher_profile(recipe_name: str) -> UNetProfile | TransformerProfile:
    """The architecture of the teacher that a ready-made recipe is for."""
    teachers = {"embedded": "embedded", "sd15": "SD-1.5", "sd21": "SD-2.1", "sdxl": "SDXL base"}
    teachers |= {"pixart_sigma": "PixArt-Sigma", "sd35_medium": "SD3.5-medium", "flux": "Flux"}
    teachers["embedded_published"] = "embedded"
    return next(profile for profile in (*PROFILES, *TRANSFORMER_PROFILES) if profile.name == teachers[recipe_name])


@pytest.mark.parametrize("name", list_recipes())
def test_ready_made_recipes_load_and_fit_their_teachers(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name and recipe.distillation.fit.steps > 0
    profile = find_teacher_profile(name)
    host = find_host(profile.unet("meta") if isinstance(profile, UNetProfile) else profile.model("meta"))
    mixer = recipe.mixer
    sites = {replace(site, name="", group=""): site for site in host.select_sites(mixer.select)}
    check_layer_options(list(sites), mixer.options)
    options = {"causality": mixer.causality, "normalize": mixer.normalize, **mixer.options}
    for site in sites:
        with torch.device("meta"):
            created = SiteMixer(mixer.name, options).create(site)
        assert sum(parameter.numel() for parameter in created.parameters()) > 0
    assert all(size % (8 * host.latent_multiple) == 0 for size in recipe.distillation.all_sizes)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_recipe_is_the_published_one(name: str) -> None:
    plan = load_recipe(name).distillation
    assert {n: t.weight for n, t in plan.objectives.items()} == {"noise": 1, "output": 0.5, "features": 0.5}
    assert (plan.start, plan.train, plan.before) == ("random", "new+projections", ())
    assert (plan.fit.learning_rate, plan.fit.weight_decay, plan.fit.batch_size) == (1e-4, 0, 96)


def test_settings_reach_into_stages(recipe: Path) -> None:
    plan = load_recipe(str(recipe), ["distillation.before.0.fit.steps=9", "mixer.options.mid_dim=2", "seed=3"])
    assert plan.distillation.before[0].fit.steps == 9 and plan.mixer.options == {"mid_dim": 2} and plan.seed == 3
    one = load_recipe(str(recipe), ["distillation.before=[]", 'distillation.objectives={"local": 1}'])
    assert [stage.name for stage in one.distillation.stages] == ["distill"]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("mixer:", "mixr:", "Did you mean 'mixer'"),
        ("checkpoint_every: 1, log", "checkpoints_every: 1, log", "Did you mean 'checkpoint_every'"),
        ("max_tokens: 256", "max_token: 256", "Did you mean 'max_tokens'"),
        ("{local: 1,", "{locale: 1,", "Did you mean 'local'"),
        ("name: linfusion", "name: linfusio", "Did you mean 'linfusion'"),
        ("images: 4", "images: many", "distillation.images"),
        ("about: Two stages of two steps.", "", "about: Field required"),
        ("name: tiny", "name: [tiny", "Cannot read the recipe"),
        ("caption_dropout: 0.5", "caption_dropout: 1.5", "distillation.caption_dropout"),
    ],
)
def test_mistakes_are_one_sentence(recipe: Path, before: str, after: str, message: str) -> None:
    assert before in recipe.read_text()
    recipe.write_text(recipe.read_text().replace(before, after, 1))
    outcome = CliRunner().invoke(app, ["distill", str(recipe), "--out", str(recipe.parent / "run")])
    assert outcome.exit_code == 2 and message in outcome.output and "Traceback" not in outcome.output
    assert len(outcome.output.strip().splitlines()) == 1
    assert not (recipe.parent / "run").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("mixer.options.mid_dim=four", "Expected mid_dim to be a whole number or none, got 'four'"),
        ('mixer.options={"gate": "no"}', "Expected gate to be true or false, got 'no'"),
    ],
)
def test_options_of_another_type_are_one_sentence(recipe: Path, setting: str, message: str) -> None:
    run = recipe.parent / "run"
    outcome = CliRunner().invoke(app, ["distill", str(recipe), "--out", str(run), "--set", setting])
    assert outcome.exit_code == 2 and message in outcome.stderr and "Traceback" not in outcome.output
    assert len(outcome.stderr.strip().splitlines()) == 1 and not (run / "run.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["embeded"], "Did you mean 'embedded'"),
        (["no/such.yaml"], "Unknown recipe"),
        (["embedded", "--set", "distillation.fit.step=3"], "Did you mean 'steps'"),
        (["embedded", "--set", "distillation.before.1.fit.steps=3"], "distillation.before has 0"),
        (["embedded", "--set", "teacher=no/model"], "Cannot load the teacher"),
    ],
)
def test_bad_arguments_are_one_sentence(arguments: list[str], message: str, tmp_path: Path) -> None:
    outcome = CliRunner().invoke(app, ["distill", *arguments, "--out", str(tmp_path)])
    assert outcome.exit_code == 2 and message in outcome.output and "Traceback" not in outcome.output


def test_the_progress_tells_terms_and_speed_where_there_is_room() -> None:
    losses = {"loss": 0.31249, "noise": 0.1, "output": 0.25}
    assert (
        describe_losses("distill", losses, 31.25, 200) == "distill: loss 0.312 (noise 0.1, output 0.25) · 31.2 images/s"
    )
    assert describe_losses("distill", losses, 31.25, 80) == "distill: loss 0.312 · 31.2 images/s"
    assert describe_losses("local", {"loss": 0.5, "local": 0.5}, None, 200) == "local: loss 0.5"


def test_a_first_mistake_leaves_the_folder_free(recipe: Path, tmp_path: Path) -> None:
    config = load_recipe(str(recipe), ["samples.prompts=[]"])
    with pytest.raises(ValueError, match="nowhere"):
        run_recipe(config.model_copy(update={"data": str(tmp_path / "nowhere")}), tmp_path / "run", quiet)
    assert run_recipe(config, tmp_path / "run", quiet).is_file()


def test_from_teacher_to_card(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = CliRunner().invoke(app, ["distill", str(recipe), "--out", str(out)])
    assert done.exit_code == 0, done.output
    card = json.loads((out / "card.json").read_text())
    assert [stage["stage"] for stage in card["stages"]] == ["local", "distill"]
    assert all(stage["seconds"] > 0 and stage["log"][-1]["step"] == 4 for stage in card["stages"])
    assert card["environment"]["torch"] == torch.__version__
    assert DistillationRecipe.model_validate(card["recipe"]) == load_recipe(str(recipe))
    text = (out / "card.md").read_text()
    assert "| local | 1 local, 0.5 matrix |" in text and "CC-BY 4.0" in text
    yaml_text = text.partition("```yaml\n")[2].partition("```")[0]
    assert DistillationRecipe.model_validate(yaml.safe_load(yaml_text)) == load_recipe(str(recipe)), (
        "the card's recipe is the run's"
    )
    assert Image.open(out / "samples.png").size == (128, 128)
    assert Image.open(out / "curves.png").size[0] > 100
    sample_names = {path.name for path in (out / "samples").iterdir()}
    assert sample_names == {"local-2.png", "local-4.png", "distill-2.png", "distill-4.png"}
    assert (out / "stage-1-local" / "metrics.jsonl").is_file() and (out / "stage-2-distill" / "metrics.jsonl").is_file()


def test_a_killed_run_goes_on_to_the_same_adapter(recipe: Path, tmp_path: Path) -> None:
    plan = load_recipe(str(recipe), ["samples.prompts=[]"])
    run_recipe(plan, tmp_path / "whole", quiet)

    def kill(stage: str, done: int, _of: int, _losses: dict[str, float]) -> None:
        if (stage, done) == ("distill", 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_recipe(plan, tmp_path / "killed", kill)
    assert not (tmp_path / "killed" / "card.md").exists()
    steps: list[tuple[str, int]] = []
    run_recipe(plan, tmp_path / "killed", lambda stage, done, *_: steps.append((stage, done)))
    assert {stage for stage, _ in steps} == {"distill"}, "the finished stage is not run again"
    whole, again = (load_file(tmp_path / run / "adapter" / "adapter.safetensors") for run in ("whole", "killed"))
    assert whole.keys() == again.keys() and all(whole[name].equal(again[name]) for name in whole)
    with pytest.raises(ValueError, match="another recipe"):
        run_recipe(plan.model_copy(update={"seed": 1}), tmp_path / "killed", quiet)


def test_the_adapter_is_the_trained_one(recipe: Path, tmp_path: Path) -> None:
    plan = load_recipe(str(recipe), ["samples.prompts=[]", "dtype=bfloat16", "distillation.before=[]"])
    run_recipe(plan, tmp_path / "run", quiet)
    teacher = open_teacher(plan.teacher, torch.bfloat16)
    adapter = build_student(teacher, plan.mixer.name, plan.mixer, plan.distillation, plan.seed)
    fresh = {name: p.detach().clone() for name, p in adapter.parameters_by_name().items()}
    again = build_student(teacher, plan.mixer.name, plan.mixer, plan.distillation, plan.seed).parameters_by_name()
    assert all(torch.equal(p, again[name]) for name, p in fresh.items()), "untrained, they are alike"
    trained = MixerAdapter.from_pretrained(tmp_path / "run" / "adapter", teacher.pipe).parameters_by_name()
    assert trained.keys() == fresh.keys()
    assert sum(not torch.equal(p, fresh[name]) for name, p in trained.items()) > len(fresh) / 2


def test_a_cache_on_disk_is_the_same_training_data_every_time(recipe: Path, tmp_path: Path) -> None:
    settings = [f"cache={tmp_path / 'cache'}", "distillation.before=[]", "samples.prompts=[]"]
    config = load_recipe(str(recipe), settings)
    weights = []
    for name in ("first", "second"):
        run_recipe(config, tmp_path / name, quiet)
        weights.append(load_file(tmp_path / name / "adapter" / "adapter.safetensors"))
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())
    assert (tmp_path / "cache" / "index.json").is_file()
