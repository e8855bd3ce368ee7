"""Draws that depend on seed and step alone, and stages that can be stopped anywhere; on tiny pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from experiments.config import DistillationConfig, FitConfig, LossTerm, MixerSpec, TrainingStage
from experiments.distill import build_student, run_stages
from experiments.distill.batches import draw_batch
from experiments.distill.student import randomize_projections, seed_stages
from experiments.teacher.teacher import Batch, Teacher
from tests.experiments.students import FIT, encoded, open_teacher
from unet_adapters import MixerAdapter
from unet_adapters.attention import MixerAttention


@pytest.fixture
def teacher() -> Teacher:
    return open_teacher()


def test_stages_are_checked() -> None:
    with pytest.raises(ValueError, match="Did you mean 'features'"):
        TrainingStage(name="a", objectives={"feature": 1}, fit=FIT)
    with pytest.raises(ValueError, match="step 0"):
        TrainingStage(name="a", objectives={"noise": {"start": 5}}, fit=FIT)
    with pytest.raises(ValueError, match="trains no projections"):
        DistillationConfig(fit=FIT, train="new", start="random")
    with pytest.raises(ValueError, match="different names"):
        DistillationConfig(fit=FIT, before=(TrainingStage(name="distill", objectives={"local": 1}, fit=FIT),))
    short = TrainingStage(name="a", objectives={"noise": 0.5, "output": {"weight": 2, "ramp": 3}}, fit=FIT)
    assert short.objectives == {"noise": LossTerm(weight=0.5), "output": LossTerm(weight=2, ramp=3)}


def test_draws_are_a_function_of_seed_and_step(teacher: Teacher) -> None:
    latents = encoded(teacher, (16, 24))

    def at(step: int, seed: int = 0, dropout: float = 0.0) -> Batch:
        fit = FIT.model_copy(update={"seed": seed})
        return draw_batch(latents, step, fit, teacher.train_timesteps, (16, 24), dropout)

    first = at(3)
    torch.manual_seed(7)
    assert all(torch.equal(value, at(3)[name]) for name, value in first.items())
    for other in (at(5), at(3, seed=1)):
        assert not torch.equal(first["noise"], other["noise"]) and not torch.equal(first["rows"], other["rows"])
    assert [at(step)["latents"].shape[-2:] for step in range(3)] == [(8, 12), (12, 16), (8, 12)]
    assert all(len(value) == FIT.batch_size for value in first.values())
    assert first["noise"].shape == first["latents"].shape and first["step"].tolist() == [3, 3]
    dropped = at(3, dropout=1.0)
    assert torch.equal(dropped["text"], latents.unconditional["text"].expand_as(first["text"]))
    assert torch.equal(dropped["noise"], first["noise"]), "dropout must not change the other draws"


def test_dropped_captions_of_sdxl_keep_their_sizes() -> None:
    latents = encoded(open_teacher("SDXL"))
    dropped = draw_batch(latents, 0, FIT, 1000, (16,), 1.0)
    assert torch.equal(dropped["pooled"], latents.unconditional["pooled"].expand_as(dropped["pooled"]))
    assert torch.equal(dropped["time_ids"], latents.sizes[16]["time_ids"][:2])


def plan(**changes: Any) -> DistillationConfig:
    before = (
        TrainingStage(name="matrix", objectives={"matrix": 1}, fit=FIT),
        TrainingStage(name="local", objectives={"local": 1}, fit=FIT, sizes=(24, 16)),
    )
    settings: dict[str, Any] = {"fit": FIT, "before": before, "image_size": 16, "images": 4} | changes
    return DistillationConfig(**settings)


def distill(
    teacher: Teacher, plan: DistillationConfig, directory: Path, stop: tuple[str, int] | None = None
) -> MixerAdapter:
    latents = encoded(teacher, plan.all_sizes)

    def after_step(stage: str, done: int, _of: int, _losses: dict[str, float]) -> None:
        if (stage, done) == stop:
            raise KeyboardInterrupt

    def make_batch(step: int, fit: FitConfig, sizes: tuple[int, ...], dropout: float) -> Batch:
        return draw_batch(latents, step, fit, teacher.train_timesteps, sizes, dropout)

    adapter = build_student(teacher, "linfusion", MixerSpec(), plan, 0)
    records = run_stages(teacher, adapter, plan, make_batch, directory, after_step)
    assert [r["stage"] for r in records] == [s.name for s in plan.stages]
    return adapter


@pytest.mark.parametrize("stop", [("matrix", 3), ("local", 1), ("distill", 3)])
def test_stages_killed_anywhere_end_bit_identical(stop: tuple[str, int], tmp_path: Path) -> None:
    teacher = open_teacher(dtype=torch.float32)
    whole = distill(teacher, plan(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        distill(teacher, plan(), tmp_path / "killed", stop)
    assert not whole.is_mounted
    again = distill(teacher, plan(), tmp_path / "killed")
    assert sorted(p.name for p in (tmp_path / "whole").iterdir()) == [
        "stage-1-matrix",
        "stage-2-local",
        "stage-3-distill",
    ]
    for name, value in whole.student.state_dict().items():
        assert torch.equal(again.student.state_dict()[name], value), name


def test_one_stage_trains_in_the_folder_itself(tmp_path: Path) -> None:
    distill(open_teacher(dtype=torch.float32), plan(before=()), tmp_path)
    assert (tmp_path / "metrics.jsonl").is_file() and not list(tmp_path.glob("stage-*"))


def test_stages_draw_apart() -> None:
    seeds = [stage.fit.seed for stage in seed_stages(plan(), 7).stages]
    assert seeds[-1] == 7 and len(set(seeds)) == 3


def test_host_start_is_the_teachers_and_random_start_is_not(teacher: Teacher) -> None:
    host = build_student(teacher, "linfusion", MixerSpec(), plan(), 0)
    original = {n: v.clone() for n, v in teacher.denoiser.state_dict().items()}
    names = [n for n in host.parameters_by_name() if ".mixer." not in n]
    assert len(names) == len(host.sites) * (len(MixerAttention.projection_names) + 1)  # to_out has a bias
    assert all(torch.equal(host.parameters_by_name()[n], original[n]) for n in names)
    mixers = {n: v.clone() for n, v in host.parameters_by_name().items() if ".mixer." in n}
    randomize_projections(host, 0)
    first = {n: host.parameters_by_name()[n].clone() for n in names}
    assert not any(torch.equal(first[n], original[n]) for n in names)
    assert all(torch.equal(host.parameters_by_name()[n], v) for n, v in mixers.items())
    assert all(
        v.abs().max() <= next(s.dim for s in host.sites if n.startswith(s.name)) ** -0.5 for n, v in first.items()
    )
    randomize_projections(host, 0)
    assert all(torch.equal(host.parameters_by_name()[n], first[n]) for n in names)
    assert all(torch.equal(teacher.denoiser.state_dict()[n], v) for n, v in original.items())


def test_training_what_is_new_alone(tmp_path: Path) -> None:
    teacher = open_teacher(dtype=torch.float32)
    adapter = distill(teacher, plan(before=(), train="new"), tmp_path)
    assert all(".mixer." in n for n in adapter.parameters_by_name())
    bare = build_student(teacher, "linear_attention", MixerSpec(), plan(train="new"), 0)
    with pytest.raises(ValueError, match="nothing to train"):
        run_stages(teacher, bare, plan(train="new"), lambda *_: {}, tmp_path / "bare", lambda *_: None)


def test_a_bfloat16_teacher_trains_a_float32_student_and_is_itself_again(tmp_path: Path) -> None:
    teacher = open_teacher(dtype=torch.bfloat16)
    before = {n: v.clone() for n, v in teacher.denoiser.state_dict().items()}
    adapter = distill(teacher, plan(gradient_checkpointing=True), tmp_path)
    path = max((tmp_path / "stage-3-distill" / "checkpoints").glob("*.safetensors"))
    state = load_file(path)
    assert {v.dtype for n, v in state.items() if n.startswith("model/")} == {torch.float32}
    assert {p.dtype for p in adapter.student.parameters()} == {torch.bfloat16}
    assert not teacher.denoiser.is_gradient_checkpointing
    after = teacher.denoiser.state_dict()
    assert all(after[n].dtype == v.dtype and torch.equal(after[n], v) for n, v in before.items())
