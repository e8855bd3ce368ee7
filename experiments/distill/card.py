"""The card of a finished distillation: card.json, card.md, curves and samples, from what the run left."""

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

from experiments.ablation import store
from experiments.data.emoji import LICENSE
from experiments.distill.objective import autocast
from experiments.distill.recipe import Recipe, Samples
from experiments.report import style
from experiments.teacher.teacher import Teacher
from unet_adapters import MixerAdapter

_TEMPLATE = Path(__file__).parent / "card.md.j2"


def write_card(
    recipe: Recipe, teacher: Teacher, adapter: MixerAdapter, stages: list[dict[str, Any]], directory: Path
) -> Path:
    """Draw the samples and curves of a trained, unmounted student, and write the card beside them; returns its path.

    Args:
        stages: what `run_stages` returned, with the seconds of all calls.
    """
    if recipe.samples.prompts:
        taught = draw_samples(teacher, recipe.samples, recipe.distillation.image_size)
        with adapter.mounted():
            learned = draw_samples(teacher, recipe.samples, recipe.distillation.image_size)
        make_image_grid(taught + learned, rows=2, cols=len(taught)).save(directory / "samples.png")
    draw_curves(stages, directory / "curves.png")
    new = sum(mixer.numel() for module in adapter.mixers.values() for mixer in module.parameters())
    parameters = {
        "trained": sum(p.numel() for p in adapter.student.parameters()),
        "new": new,
        "frozen": sum(p.numel() for p in teacher.unet.parameters()),
    }
    record = {
        "recipe": recipe.model_dump(mode="json"),
        "environment": store.environment(),
        "sites": len(adapter.sites),
        "parameters": parameters,
        "stages": [{**stage, "log": stage["log"][-1:]} for stage in stages],
    }
    store.write_json(directory / "card.json", record)
    text = Template(_TEMPLATE.read_text(encoding="utf-8"), trim_blocks=True).render(
        **{**record, "recipe": recipe, "stages": _rows(recipe, stages)},
        note=LICENSE if recipe.data == "emoji" else "",
        yaml=yaml.safe_dump(
            recipe.model_dump(mode="json", exclude_defaults=True), sort_keys=False, allow_unicode=True, width=110
        ).strip(),
    )
    card = directory / "card.md"
    card.write_text(text + "\n", encoding="utf-8")
    return card


def draw_samples(teacher: Teacher, plan: Samples, size: int) -> list[Image.Image]:
    """One picture a prompt by the UNet as it is mounted now; noise k for prompt k, one prompt a call."""
    pictures = []
    for number, prompt in enumerate(plan.prompts):
        noise = torch.Generator().manual_seed(plan.seed + number)
        options = {"height": size, "width": size, "num_inference_steps": plan.steps, "guidance_scale": plan.guidance}
        with autocast(teacher):
            pictures += teacher.pipe(prompt, generator=noise, **options).images
    return pictures


def save_row(pictures: list[Image.Image], path: Path) -> None:
    """Save pictures side by side."""
    path.parent.mkdir(parents=True, exist_ok=True)
    make_image_grid(pictures, rows=1, cols=len(pictures)).save(path)


def draw_curves(stages: list[dict[str, Any]], path: Path) -> None:
    """The smoothed losses of all stages against the steps, counted through."""
    with rc_context(style.RC):
        figure = Figure(figsize=(7.5, 4), layout="constrained")
        axes, before = figure.subplots(), 0
        colors: dict[str, str] = {}
        for stage in stages:
            for name in [key for key in (stage["log"] or [{}])[-1] if key != "step"]:
                rows = [(row["step"] + before, row[name]) for row in stage["log"] if row.get(name, 0) > 0]
                label = None if name in colors else name
                color = colors.setdefault(name, style.PALETTE[len(colors) % len(style.PALETTE)])
                if rows:
                    steps, values = zip(*rows, strict=True)
                    axes.plot(steps, _smooth(values), label=label, color=color)
            before += stage["steps"]
            axes.axvline(before, color=style.GRAY, linewidth=0.6)
            axes.text(before, 1.0, f"{stage['stage']} ", transform=axes.get_xaxis_transform(), ha="right", va="bottom")
        axes.set(yscale="log", xlabel="step", ylabel="loss (smoothed)")
        axes.legend()
        figure.savefig(path, dpi=110)


def _smooth(values: tuple[float, ...], window: int = 7) -> np.ndarray:
    """A running geometric mean, over fewer values at both ends."""
    logs = np.log(values)
    half = window // 2
    return np.exp([logs[max(0, i - half) : i + half + 1].mean() for i in range(len(logs))])


def _rows(recipe: Recipe, stages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    plan = recipe.distillation
    return [
        {
            "name": stage.name,
            "objectives": ", ".join(f"{term.weight:g} {name}" for name, term in stage.objectives.items()),
            "sizes": ", ".join(str(size) for size in plan.sizes_of(stage)),
            "steps": f"{done['steps']:,}",
            "batch_size": stage.fit.batch_size,
            "learning_rate": f"{stage.fit.learning_rate:g}",
            "time": f"{done['seconds'] / 60:.1f} min",
            "last": ", ".join(f"{n} {v:.3g}" for n, v in (done["log"] or [{}])[-1].items() if n != "step"),
        }
        for stage, done in zip(plan.stages, stages, strict=True)
    ]
