"""The teacher's model card: its gates, measured, and what a reader needs to trust or distrust it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from jinja2 import Template
from transformers import CLIPModel

from experiments.data import SceneSet
from experiments.data.emoji import LICENSE
from experiments.data.scenes.catalogue import drawings_of_split
from experiments.teacher import gates
from experiments.teacher.load import load_teacher
from experiments.teacher.recipe import TeacherRecipe
from experiments.teacher.samples import GUIDANCE, STEPS, write_sheet

SHEET = 40
_TEMPLATE = Path(__file__).parent / "card.md.j2"


def write_card(folder: Path, recipe: TeacherRecipe, measured: dict[str, Any] | None = None) -> Path:
    """Measure the pipeline in `folder`; write `README.md`, `gates.json`, `sheet.png` and `sheet-128.png` into it.

    Args:
        folder: a pipeline with its judge in `evaluator/`.
        recipe: what trained it.
        measured: the result of `gates.measure_gates`; None measures, which takes about ten minutes on one core.

    Returns:
        The card's path.
    """
    pipe = load_teacher(str(folder))
    judge = CLIPModel.from_pretrained(folder / "evaluator", dtype=torch.float32).eval()
    measured = measured or gates.measure_gates(pipe, judge)
    (folder / "gates.json").write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
    write_sheet(pipe, folder / "sheet.png", SHEET)
    write_sheet(pipe, folder / "sheet-128.png", SHEET // 2, 128)
    parts = {"UNet": pipe.unet, "autoencoder": pipe.vae, "text encoder": pipe.text_encoder, "judge": judge}
    history = folder / "training.json"
    notes = folder / "notes.md"
    text = Template(_TEMPLATE.read_text(encoding="utf-8")).render(
        measured=measured,
        need={split: gates.format_need(errors) for split, errors in measured["need"].items()},
        gates=gates,
        recipe=recipe,
        history=json.loads(history.read_text(encoding="utf-8")) if history.exists() else None,
        notes=notes.read_text(encoding="utf-8").strip() if notes.exists() else "",
        millions={name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in parts.items()},
        megabytes=sum(file.stat().st_size for file in folder.rglob("*.safetensors")) / 1e6,
        drawings={split: len(drawings_of_split(split)) for split in ("train", "held_out")},
        hidden=_hidden_share(),
        license=LICENSE,
        sheet=SHEET,
        guidance=GUIDANCE,
        steps=STEPS,
    )
    card = folder / "README.md"
    card.write_text(text + "\n", encoding="utf-8")
    return card


def _hidden_share() -> float:
    data = SceneSet("train")
    kinds = [data.kind(index) for index in range(len(data))]
    return sum(kind.hidden for kind in kinds) / len(kinds)
