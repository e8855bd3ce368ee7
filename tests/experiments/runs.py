"""Runs that never ran, for tests of reports."""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from experiments.ablation.description import RunDescription, VariantDescription
from experiments.ablation.result import CellResult
from experiments.evaluate.measurements import Measurements
from experiments.grids.shared import PAPER_CLAIMS
from experiments.metrics.fidelity import FidelityRow
from experiments.report.effects import Effect, compute_effects
from experiments.report.run_files import CellRecord, RunRecord

RowKey = tuple[str, str, bool]
IMAGES = 4
SEEDS = range(3)


def fidelity_row(size: int, error: float, by_image: tuple[float, ...] = ()) -> FidelityRow:
    """Errors of a square held-out size."""
    return FidelityRow(
        size=size,
        height=size,
        width=size,
        split="held_out",
        images=len(by_image) or 1,
        error_to_teacher=error,
        relative_error_to_teacher=error,
        error_to_truth=1 + error,
        teacher_error_to_truth=1.0,
        error_ratio=1 + error,
        error_by_image=by_image,
    )


def cell_record(variant: str, seed: int, errors: Mapping[int, float]) -> CellRecord:
    """A finished cell with these errors by size."""
    rows = tuple(fidelity_row(size, error) for size, error in errors.items())
    measurements = Measurements(protocol="p", metrics={"fidelity": rows})
    result = CellResult(cell=f"{variant}-s{seed}", variant=variant, seed=seed, status="done", measurements=measurements)
    return CellRecord(result.cell, Path("nowhere"), variant, seed, "done", result=result)


def run_of(errors: Mapping[RowKey, Mapping[int, Mapping[int, float]]], **description: Any) -> RunRecord:
    """A run in memory: (mixer, causality, normalize) -> seed -> size -> relative error to the teacher."""
    variants = []
    cells = []
    for (mixer, causality, normalize), seeds in errors.items():
        name = f"{mixer}_{causality}_{'normalized' if normalize else 'unnormalized'}"
        variants.append(
            VariantDescription(name=name, label=name, mixer=mixer, causality=causality, normalize=normalize)
        )
        cells += [cell_record(name, seed, sizes) for seed, sizes in seeds.items()]
    record = RunDescription(name="made up", question="?", train_size=64, variants=tuple(variants), **description)
    return RunRecord(Path("nowhere"), record, cells)


def made_up(noise: float = 0.0, mixers: tuple[str, ...] = ("linear_attention", "mamba2")) -> RunRecord:
    """Errors 2^(not normalized) · 3^(causal) · 5^(mamba2), with each seed's own factor, and noise if requested."""
    random = np.random.default_rng(0)
    rows: dict[RowKey, dict[int, dict[int, float]]] = {}
    for mixer in mixers:
        for causality in ("noncausal", "causal"):
            for normalize in (True, False):
                error = 0.01 * 2 ** (not normalize) * 3 ** (causality == "causal") * 5 ** (mixer == "mamba2")
                errors = {s: {64: error * (1 + s) * math.exp(noise * random.normal())} for s in SEEDS}
                rows[mixer, causality, normalize] = errors
    return run_of(rows)


def add_row(run: RunRecord, variant: VariantDescription, error: float) -> None:
    run.description = run.description.model_copy(update={"variants": (*run.variants, variant)})
    run.cells += [cell_record(variant.name, seed, {64: error * (1 + seed)}) for seed in SEEDS]


def by_name(run: RunRecord) -> dict[str, Effect]:
    return {effect.name: effect for effect in compute_effects(run)}


SIZES = (64, 128, 256)
PROMPTS = ["red apple, teal background", "blue heart, yellow background", "full moon, black background", "cat face"]
VARIANTS = [  # name, label, mixer, causality, normalize, growth of the error per doubling
    ("softmax", "softmax, untouched", "softmax", "noncausal", True, 0.0),
    ("identity", "identity: no mixing", "identity", "noncausal", True, 3.0),
    ("linfusion", "LinFusion", "linfusion", "noncausal", True, 1.1),
    ("linear", "linear attention", "linear_attention", "noncausal", True, 1.2),
    ("linear_raw", "linear attention, not normalized", "linear_attention", "noncausal", False, 4.0),
    ("linfusion_raw", "LinFusion, not normalized", "linfusion", "noncausal", False, 5.0),
    ("linear_causal", "linear attention, causal", "linear_attention", "causal", True, 1.4),
    ("linear_causal_raw", "linear attention, causal, not normalized", "linear_attention", "causal", False, 6.0),
    ("mamba2", "Mamba-2, bidirectional", "mamba2", "bidirectional", False, 2.0),
]
FAILED = "mamba2-s1-x"
UNFINISHED = "linear_causal_raw-s1-x"


def error(growth: float, size: int, seed: int) -> float:
    """The made-up relative error to the teacher."""
    return growth and 0.02 * (1 + 0.1 * seed) * growth ** math.log2(size / 64)


def write_image(path: Path, size: int, k: int, noise: float) -> None:
    """A disc on a plain background, the noisier the worse the mixer."""
    y, x = np.mgrid[:size, :size] / size - 0.5
    colors = np.array([[200, 60, 60], [60, 90, 200], [230, 210, 90], [240, 160, 60]])
    image = np.where((x**2 + y**2 < 0.12)[..., None], colors[k % 4], 255 - colors[k % 4] // 2).astype(float)
    image += np.random.default_rng(k).normal(0, 255 * noise, image.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(path)


def matrix(causality: str, normalize: bool, softmax: bool) -> np.ndarray:
    """Weights that decrease with distance on an 8 × 8 grid."""
    y, x = np.divmod(np.arange(64), 8)
    apart = (y[:, None] - y) ** 2 + (x[:, None] - x) ** 2
    weights = np.exp(-apart / (4 if softmax else 16)) + np.random.default_rng(0).random((64, 64)) * 0.1
    weights = np.tril(weights) if causality == "causal" else weights
    return (weights / weights.sum(1, keepdims=True) if normalize else weights).astype(np.float32)


def write_cell(run: Path, place: int, seed: int) -> None:
    """One cell's folder, as the grid runner leaves it."""
    name, _, mixer, causality, normalize, growth = VARIANTS[place]
    cell = f"{name}-s{seed}-x"
    folder = run / "cells" / cell
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(
        json.dumps({"variant": {"name": name, "mixer": mixer}, "seed": seed, "lr": 1e-3})
    )
    steps = range(0 if growth else 100, 40 if cell == UNFINISHED else 100)
    lines = [
        {"step": s, "loss": (0.1 + 0.02 * place) + math.exp(-s / 20), "noise": 0.1, "output": 0.1, "features": 0.1}
        for s in steps
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    if cell == UNFINISHED:
        return
    result: dict[str, Any] = {"cell": cell, "variant": name, "seed": seed}
    if cell == FAILED:
        result |= {"status": "failed", "error": "FloatingPointError: the loss is not finite <at step 12>"}
        (folder / "result.json").write_text(json.dumps(result))
        return
    metrics = metric_rows(growth, seed)
    for size in SIZES:
        value = error(growth, size, seed)
        for k in range(len(PROMPTS)):
            write_image(folder / "samples" / str(size) / f"{k}.png", size, k, min(0.5, value))
    for size in (*SIZES, 512):
        tokens = (size // 8) ** 2
        seconds = 0.004 + 1e-6 * tokens * (1 + place / 4) + (0 if growth else 2e-8 * tokens**2)
        peak = int(1e6 + 4e3 * tokens * (1 + place / 4) + (0 if growth else 4 * tokens**2))
        cost = {"size": size, "tokens": tokens, "seconds": seconds, "spread": 0.0001, "peak_bytes": peak}
        metrics.setdefault("cost", []).append(cost | {"flops": 10**7 * tokens, "state_size": 1000 * (1 + place)})
    result |= {"status": "done", "trained_parameters": 1000 * place, "train_seconds": 12.5 + place, "steps": 100}
    result |= {"seconds": 20.0, "measurements": {"protocol": "p", "metrics": metrics}}
    mixing = matrix(causality, normalize, not growth)
    field = mixing.reshape(8, 8, 8, 8).mean((0, 1))
    save_file({"mixing_matrix": mixing, "receptive_field": field}, folder / "arrays.safetensors")
    (folder / "result.json").write_text(json.dumps(result))


SITES = [f"{way}.attentions.0.transformer_blocks.0.attn1" for way in ("down_blocks.0", "mid_block", "up_blocks.1")]


def metric_rows(growth: float, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Rows of every metric but cost; images differ by factors that are the same for all variants."""
    place = {"height": 64, "width": 64}
    value = error(growth, 64, seed)
    factors = [1 + 0.1 * (k - 1.5) for k in range(IMAGES)]
    fidelity = []
    for split in ("held_out", "held_in"):
        for size in SIZES:
            relative = error(growth, size, seed) * (1 if split == "held_out" else 0.5)
            row = fidelity_row(size, relative, tuple(0.9 * relative * factor for factor in factors))
            changes = {"split": split, "error_to_teacher": relative * 0.9, "error_ratio": 1 + relative * 10}
            fidelity.append(row.model_copy(update=changes).model_dump())
    wide = fidelity_row(128, 77.0).model_copy(update={"height": 64})
    fidelity.append(wide.model_dump())
    images = place | {"guidance": 3.0, "features": "embedded CLIP", "images": 500}
    distance = images | {"student": 20 + value, "teacher": 20.0, "student_to_teacher": 1.0, "floor": 3.0}
    score = images | {"student": 80 - value, "low": 79.0, "high": 81.0, "teacher": 82.0, "true": 90.0}
    return {
        "fidelity": fidelity,
        "sites": [{"site": s, **place, "relative_error": value * (k + 1)} for k, s in enumerate(SITES)],
        "timesteps": [
            {**place, "timestep": t, "error_to_teacher": value, "relative_error_to_teacher": value * t / 500}
            for t in (100, 500, 900)
        ],
        "frechet_distance": [distance],
        "text_image_score": [score],
    }


@cache
def drawn_run() -> TemporaryDirectory[str]:
    """The folder that `make_run` copies: drawing hundreds of images takes a second."""
    folder = TemporaryDirectory()
    write_run(Path(folder.name))
    return folder


def make_run(run: Path) -> Path:
    """Nine variants × two seeds; one cell failed, one unfinished."""
    shutil.copytree(drawn_run().name, run, dirs_exist_ok=True)
    return run


def write_run(run: Path) -> None:
    """Write all files of the run."""
    names = ("name", "label", "mixer", "causality", "normalize")
    grid = {
        "name": "demo",
        "question": "Which features of a linear mixer matter for images?",
        "teacher": "embedded",
        "data": "emoji",
        "train_size": 64,
        "sizes": SIZES,
        "sample_sizes": SIZES,
        "seeds": [0, 1],
        "prompts": PROMPTS,
        "reference": "linear",
        "claims": [claim.model_dump(mode="json") for claim in PAPER_CLAIMS],
        "variants": [
            dict(zip(names, v, strict=False))
            | {"trained": v[-1] > 0, "control": "no mixing" if v[0] == "identity" else None}
            for v in VARIANTS
        ],
        "notes": ["A made-up run."],
        "protocol": {"distillation": {"steps": 100}, "evaluation": {"images": IMAGES}},
        "environment": {"torch": "2", "device": "CPU", "commit": "abc1234"},
    }
    run.mkdir(parents=True, exist_ok=True)
    (run / "grid.json").write_text(json.dumps(grid))
    for place in range(len(VARIANTS)):
        for seed in (0, 1):
            write_cell(run, place, seed)
    for size in SIZES:
        for k in range(len(PROMPTS)):
            write_image(run / "teacher" / "samples" / str(size) / f"{k}.png", size, k, 0)


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file in place."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
