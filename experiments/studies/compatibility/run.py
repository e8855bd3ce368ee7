"""`mixlab compatibility`: parts trained on softmax attention (ControlNet, IP-Adapter) under a student that saw neither.

teacher -> student, ControlNet, IP-Adapter (each alone) -> samples of every pairing -> numbers -> one page
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPModel

from experiments.ablation import load_grid
from experiments.ablation.cell import distill_cell
from experiments.config import FitConfig, FrozenModel, Grid
from experiments.core.environment import describe_environment
from experiments.core.files import write_json
from experiments.data import open_dataset
from experiments.distill import DistillationContext, build_student, open_context
from experiments.studies.compatibility import controlnet as control
from experiments.studies.compatibility import ip_adapter as ip
from experiments.studies.compatibility.measure import (
    Sampling,
    Scene,
    agreement,
    controlled,
    difference,
    draw,
    edge_extras,
    encoded_and_decoded,
    interval,
    leaves_no_trace,
    likeness,
    picture_extras,
    scene,
)
from experiments.teacher.load import EMBEDDED
from experiments.training import fit
from unet_adapters import MixerAdapter

Report = Callable[[str, int, int], None]
ARMS = ("teacher+", "student+", "teacher", "student")  # +: with the ControlNet or the IP-Adapter


class Plan(FrozenModel):
    """Everything the numbers depend on."""

    grid: Grid = Field(description="its first cell is the student")
    controlnet: FitConfig = FitConfig(
        steps=700, batch_size=16, learning_rate=1e-3, warmup=50, ema=0.99, checkpoint_every=50
    )
    ip_adapter: FitConfig = FitConfig(
        steps=400, batch_size=16, learning_rate=1e-3, warmup=50, ema=0.99, checkpoint_every=50
    )
    control_caption_dropout: float = 0.5  # as ControlNet's authors (2302.05543 §3.4): the edges must carry weight
    ip_caption_dropout: float = 0.8
    ip_image_dropout: float = 0.1
    sampling: Sampling = Sampling()
    seed: int = 0

    def scaled(self, share: float) -> Plan:
        """The same with every training's steps times `share` (at least one step), for trials and tests."""
        shorter = {n: _shorter(getattr(self, n), share) for n in ("controlnet", "ip_adapter")}
        fitted = self.grid.distillation.model_copy(update={"fit": _shorter(self.grid.distillation.fit, share)})
        return self.model_copy(update={**shorter, "grid": self.grid.model_copy(update={"distillation": fitted})})


def default_plan(share: float = 1.0) -> Plan:
    """The embedded experiment, with `share` of its training steps."""
    return Plan(grid=load_grid("compatibility")).scaled(share)


def open_plan(plan: Plan) -> tuple[DistillationContext, CLIPModel]:
    """The teacher with its training pictures, and the CLIP that judges."""
    grid, fitted = plan.grid, plan.grid.distillation
    setting = open_context(grid.teacher, grid.data, fitted.image_size, fitted.images, fitted.all_sizes[1:])
    folder = (EMBEDDED if grid.teacher == "embedded" else Path(grid.teacher)) / "evaluator"
    if not folder.is_dir():
        raise ValueError(
            f"Cannot judge pictures: {folder} is not there. Expected the CLIP that `mixlab teacher` wrote."
        )
    judge = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    return setting, judge.to(setting.pipe.device)


def train_student(plan: Plan, setting: DistillationContext, directory: Path, report: Report) -> MixerAdapter:
    """The student, by the plain text-conditional objective of the ablations; read back where it is finished."""
    folder = directory / "student"
    if not folder.is_dir():
        cell, variant = plan.grid.cells()[0], plan.grid.variants[0]
        adapter = build_student(setting.teacher, variant.mixer, variant, cell.distillation, cell.seed)
        folder_of_training = directory / "training" / "student"
        distill_cell(cell, setting, adapter, folder_of_training, lambda _, n, of: report("student", n, of))
        _finish(folder, adapter.save_pretrained)
    return MixerAdapter.from_pretrained(folder, setting.pipe)


def train_controlnet(plan: Plan, setting: DistillationContext, directory: Path, report: Report) -> ControlNetModel:
    """The ControlNet, against the softmax UNet; read back where it is finished."""
    folder, pipe = directory / "controlnet", setting.pipe
    if not folder.is_dir():
        torch.manual_seed(plan.seed)
        model = control.from_teacher(pipe.unet, pipe.vae_scale_factor)
        maps = torch.cat([control.edges(part).bool() for part in _pictures(plan)])
        batch = control.batches(setting, maps, _blank(setting), plan.controlnet, plan.control_caption_dropout)
        objective = control.objective(pipe.unet, model, pipe.scheduler)
        steps = plan.controlnet.steps
        fit(
            objective,
            batch,
            plan.controlnet,
            directory / "training" / "controlnet",
            lambda n, _: report("ControlNet", n, steps),
        )
        _finish(folder, model.save_pretrained)
    model = ControlNetModel.from_pretrained(folder).eval().requires_grad_(False)
    return model.to(pipe.device)


def train_ip_adapter(
    plan: Plan, setting: DistillationContext, judge: CLIPModel, directory: Path, report: Report
) -> dict[str, dict[str, Tensor]]:
    """The IP-Adapter's weights, trained against the softmax UNet; read back where they are finished."""
    file, pipe = directory / "ip_adapter.safetensors", setting.pipe
    if not file.is_file():
        embeddings = torch.cat([ip.embed(judge, part) for part in _pictures(plan)])
        with ip.loaded(pipe, ip.fresh(pipe, embeddings, setting.text_states)):
            dropouts = (plan.ip_caption_dropout, plan.ip_image_dropout)
            batch = ip.batches(setting, embeddings, _blank(setting), plan.ip_adapter, *dropouts)
            objective = ip.objective(pipe.unet, pipe.scheduler)
            steps = plan.ip_adapter.steps
            fit(
                objective,
                batch,
                plan.ip_adapter,
                directory / "training" / "ip_adapter",
                lambda n, _: report("IP-Adapter", n, steps),
            )
            weights = ip.flat(ip.loaded_weights(pipe.unet))
        _finish(file, partial(save_file, weights))
    return ip.nested(load_file(file))


def run_compatibility(directory: Path, plan: Plan, report: Report) -> dict[str, Any]:
    """Train what is not trained yet, draw what is not drawn, measure; returns the record, kept in `result.json`.

    Args:
        directory: receives plan.json, student/, controlnet/, ip_adapter.safetensors (the published format),
            samples/ and result.json. A run that was killed goes on where it stopped.
        plan: with other settings, another directory is needed.
        report: called as (what, done, total).

    Raises:
        ValueError: the directory holds a run with other settings.

    Costs about 25 minutes on two CPU cores with the default plan.
    """
    _check_plan(directory / "plan.json", plan)
    report("teacher and pictures", 0, 1)
    setting, judge = open_plan(plan)
    adapter = train_student(plan, setting, directory, report)
    model = train_controlnet(plan, setting, directory, report)
    weights = train_ip_adapter(plan, setting, judge, directory, report)
    sizes, data, count = plan.sampling.sizes, plan.grid.data, plan.sampling.pictures
    scenes = [scene(data, split, size, count) for size in sizes for split in ("train", "held_out")]
    report("bitwise checks", 0, 1)
    trace = leaves_no_trace(setting.pipe, adapter, model, weights, judge, scenes[0])
    record = {
        "plan": plan.model_dump(mode="json"),
        "environment": describe_environment(),
        "trace": trace,
        "controlnet": [control_row(plan, setting, adapter, model, s, directory, report) for s in scenes],
        "ip_adapter": [picture_row(plan, setting, judge, adapter, weights, s, directory, report) for s in scenes[:2]],
        "parameters": {
            "student": sum(p.numel() for p in adapter.student.parameters()),
            "ControlNet": sum(p.numel() for p in model.parameters()),
            "IP-Adapter": sum(p.numel() for p in ip.flat(weights).values()),
        },
    }
    write_json(directory / "result.json", record)
    return record


def control_row(
    plan: Plan,
    setting: DistillationContext,
    adapter: MixerAdapter,
    model: ControlNetModel,
    real: Scene,
    directory: Path,
    report: Report,
) -> dict[str, Any]:
    """Edge agreement of one scene's pictures, drawn with and without the ControlNet by teacher and student."""
    pipe, wanted = setting.pipe, control.edges(real.images)
    guided = controlled(pipe, model)

    def paint(extra: bool) -> Tensor:
        extras = edge_extras(wanted) if extra else None
        return draw(guided if extra else pipe, real.captions, real.size, plan.sampling, extras)

    values = {
        arm: agreement(pictures, wanted)
        for arm, pictures in _arms("controlnet", adapter, real, paint, directory, report).items()
    }
    values["ceiling"] = agreement(encoded_and_decoded(pipe, real.images), wanted)
    return _row(real, values)


def picture_row(
    plan: Plan,
    setting: DistillationContext,
    judge: CLIPModel,
    adapter: MixerAdapter,
    weights: ip.StateDict,
    real: Scene,
    directory: Path,
    report: Report,
) -> dict[str, Any]:
    """Likeness to one scene's pictures, drawn from the empty caption with and without the IP-Adapter."""
    pipe, silent = setting.pipe, [""] * len(real.captions)
    embeddings = ip.embed(judge, real.images)

    def paint(extra: bool) -> Tensor:
        if not extra:
            return draw(pipe, silent, real.size, plan.sampling)
        with ip.loaded(pipe, weights):
            return draw(pipe, silent, real.size, plan.sampling, picture_extras(embeddings), chunk=1)

    arms = _arms("ip_adapter", adapter, real, paint, directory, report)
    arms["caption"] = load_pictures(directory, "controlnet", real, "teacher")
    arms["ceiling"] = encoded_and_decoded(pipe, real.images)
    return _row(real, {arm: likeness(judge, pictures, real.images) for arm, pictures in arms.items()})


def load_pictures(directory: Path, part: str, real: Scene, arm: str) -> Tensor:
    """Pictures (n, 3, s, s) in [-1, 1] that a run drew.

    Args:
        part: "controlnet" or "ip_adapter".
        arm: "teacher" or "student", with "+" where the part was at work.
    """
    return load_file(_samples(directory, part, real, arm))["pictures"].float() / 127.5 - 1


def _arms(
    part: str,
    adapter: MixerAdapter,
    real: Scene,
    paint: Callable[[bool], Tensor],
    directory: Path,
    report: Report,
) -> dict[str, Tensor]:
    for number, arm in enumerate(ARMS):
        file = _samples(directory, part, real, arm)
        report(f"{part}, {real.split}, {real.size} px", number, len(ARMS))
        if not file.is_file():
            with adapter.mounted() if arm.startswith("student") else adapter.unmounted():
                pixels = ((paint(arm.endswith("+")) + 1) * 127.5).round().to(torch.uint8)
            file.parent.mkdir(parents=True, exist_ok=True)
            _finish(file, partial(save_file, {"pictures": pixels}))
    return {arm: load_pictures(directory, part, real, arm) for arm in ARMS}


def _samples(directory: Path, part: str, real: Scene, arm: str) -> Path:
    name = arm.replace("+", "_with")
    return directory / "samples" / f"{part}-{real.split}-{real.size}-{name}.safetensors"


def _row(real: Scene, values: dict[str, list[float]]) -> dict[str, Any]:
    """Means with intervals, and the paired differences that the question is about."""
    effect = {arm: difference(values[f"{arm}+"], values[arm]) for arm in ("teacher", "student")}
    return {
        "split": real.split,
        "size": real.size,
        "arms": {arm: {**interval(found), "values": found} for arm, found in values.items()},
        "effect": effect,
        "student_minus_teacher": difference(values["student+"], values["teacher+"]),
        "effect_kept": effect["student"]["mean"] / effect["teacher"]["mean"] if effect["teacher"]["mean"] else None,
    }


def _check_plan(file: Path, plan: Plan) -> None:
    asked = plan.model_dump(mode="json")
    if not file.is_file():
        write_json(file, asked)
    elif json.loads(file.read_text(encoding="utf-8")) != asked:
        raise ValueError(f"{file.parent} holds a run with other settings ({file.name} says which): give another --out.")


def _pictures(plan: Plan) -> list[Tensor]:
    data = open_dataset(plan.grid.data, split="train")
    return control.pictures_of(data, plan.grid.distillation.image_size, plan.grid.distillation.images)


def _blank(setting: DistillationContext) -> Tensor:
    """The empty caption's states (t, d)."""
    with torch.no_grad():
        states, _ = setting.pipe.encode_prompt([""], setting.pipe.device, 1, do_classifier_free_guidance=False)
    return states[0]


def _finish(path: Path, save: Callable[[Path], Any]) -> None:
    """Let `save` write a file or fill a folder that is there whole or not at all."""
    unfinished = path.with_name(path.name + ".partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    save(unfinished)
    os.replace(unfinished, path)


def _shorter(config: FitConfig, share: float) -> FitConfig:
    return config.model_copy(update={"steps": max(1, round(config.steps * share))})
