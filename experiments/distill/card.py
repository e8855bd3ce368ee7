"""The card of a finished distillation: card.json, card.md, loss curves and samples, from the files of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml  # type: ignore[import-untyped]
from diffusers.utils import make_image_grid
from jinja2 import Template
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

from experiments.core.environment import describe_environment
from experiments.core.figures import GRAY, PALETTE, RC
from experiments.core.files import write_json, write_text
from experiments.data import credit
from experiments.distill.loss import autocast
from experiments.distill.recipe import DistillationRecipe, SampleConfig
from experiments.teacher.teacher import Teacher
from unet_adapters import MixerAdapter

_TEMPLATE = Path(__file__).parent / "card.md.j2"


def write_card(
    recipe: DistillationRecipe, teacher: Teacher, adapter: MixerAdapter, stages: list[dict[str, Any]], directory: Path
) -> Path:
    """Write the card of a trained, unmounted student with its samples and loss curves; returns the card's path.

    Args:
        recipe: of the distillation.
        teacher: of the student.
        adapter: the student.
        stages: what `run_stages` returned, with the seconds of all calls.
        directory: receives the card.
    """
    if recipe.samples.prompts:
        images = sample_images(teacher, recipe.samples, recipe.distillation.image_size)
        columns = len(images)
        with adapter.mounted():
            images += sample_images(teacher, recipe.samples, recipe.distillation.image_size)
        make_image_grid(images, rows=2, cols=columns).save(directory / "samples.png")
    plot_losses(stages, directory / "curves.png")
    parameters = {
        "trained": sum(p.numel() for p in adapter.student.parameters()),
        "new": sum(p.numel() for mixer in adapter.mixers.values() for p in mixer.parameters()),
        "frozen": sum(p.numel() for p in teacher.denoiser.parameters()),
    }
    record = {
        "recipe": recipe.model_dump(mode="json"),
        "environment": describe_environment(),
        "sites": len(adapter.sites),
        "parameters": parameters,
        "stages": [{**stage, "log": stage["log"][-1:]} for stage in stages],
    }
    write_json(directory / "card.json", record)
    changes = recipe.model_dump(mode="json", exclude_defaults=True)
    text = Template(_TEMPLATE.read_text(encoding="utf-8"), trim_blocks=True).render(
        recipe=recipe,
        environment=record["environment"],
        sites=record["sites"],
        parameters=parameters,
        stages=_table_rows(recipe, stages),
        note=credit(recipe.data),
        yaml=yaml.safe_dump(changes, sort_keys=False, allow_unicode=True, width=110).strip(),
    )
    card = directory / "card.md"
    write_text(card, text + "\n")
    return card


def sample_images(teacher: Teacher, config: SampleConfig, size: int) -> list[Image.Image]:
    """Sample one image per prompt from the UNet as it is mounted now; prompt k always starts from the same noise k."""
    images = []
    for number, prompt in enumerate(config.prompts):
        with autocast(teacher):
            images += teacher.pipe(
                prompt,
                generator=torch.Generator().manual_seed(config.seed + number),
                height=size,
                width=size,
                num_inference_steps=config.steps,
                guidance_scale=config.guidance,
                **teacher.host.sampling_options(teacher.pipe),
            ).images
    return images


def save_image_row(images: list[Image.Image], path: Path) -> None:
    """Save images side by side."""
    path.parent.mkdir(parents=True, exist_ok=True)
    make_image_grid(images, rows=1, cols=len(images)).save(path)


def plot_losses(stages: list[dict[str, Any]], path: Path) -> None:
    """Plot the smoothed losses of all stages against the steps, which are counted from the first stage on."""
    with rc_context(RC):
        figure = Figure(figsize=(7.5, 4), layout="constrained")
        axes = figure.subplots()
        before = 0
        colors: dict[str, str] = {}
        for stage in stages:
            for name in [key for key in (stage["log"] or [{}])[-1] if key != "step"]:
                rows = [(row["step"] + before, row[name]) for row in stage["log"] if row.get(name, 0) > 0]
                label = None if name in colors else name
                color = colors.setdefault(name, PALETTE[len(colors) % len(PALETTE)])
                if rows:
                    steps, values = zip(*rows, strict=True)
                    axes.plot(steps, _smooth(values), label=label, color=color)
            before += stage["steps"]
            axes.axvline(before, color=GRAY, linewidth=0.6)
            axes.text(before, 1.0, f"{stage['stage']} ", transform=axes.get_xaxis_transform(), ha="right", va="bottom")
        axes.set(yscale="log", xlabel="step", ylabel="loss (smoothed)")
        axes.legend()
        figure.savefig(path, dpi=110)


def _smooth(values: tuple[float, ...], window: int = 7) -> np.ndarray:
    """A running geometric mean, over fewer values at both ends."""
    logs = np.log(values)
    half = window // 2
    return np.exp([logs[max(0, i - half) : i + half + 1].mean() for i in range(len(logs))])


def _table_rows(recipe: DistillationRecipe, stages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    config = recipe.distillation
    return [
        {
            "name": stage.name,
            "objectives": ", ".join(f"{term.weight:g} {name}" for name, term in stage.objectives.items()),
            "sizes": ", ".join(str(size) for size in config.sizes_of(stage)),
            "steps": f"{record['steps']:,}",
            "batch_size": stage.fit.batch_size,
            "learning_rate": f"{stage.fit.learning_rate:g}",
            "time": f"{record['seconds'] / 60:.1f} min",
            "last": ", ".join(f"{n} {v:.3g}" for n, v in (record["log"] or [{}])[-1].items() if n != "step"),
        }
        for stage, record in zip(config.stages, stages, strict=True)
    ]
