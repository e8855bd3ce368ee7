"""THE flow of one cell: config -> adapter -> distill -> evaluate -> record."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from time import perf_counter
from typing import Any

from experiments.config import CellConfig, Grid
from experiments.core.files import read_json, write_json
from experiments.distill import DistillationContext, build_student, open_context, run_stages
from experiments.distill.student import seed_stages, stage_folders
from experiments.evaluate.measure import Report, measure
from experiments.training import delete_checkpoints, training_seconds
from unet_adapters import MixerAdapter

METRICS, TRAINED = "metrics.jsonl", "trained.json"


def setting_of(config: CellConfig | Grid) -> DistillationContext:
    """The teacher and the pictures of a cell, or of a grid, whose cells share them."""
    plan = config.distillation
    return open_context(config.teacher, config.data, plan.image_size, plan.images, plan.all_sizes[1:])


def run_cell(config: CellConfig, setting: DistillationContext, directory: Path, report: Report) -> dict[str, Any]:
    """Distill and measure one variant; the record is also written to `directory/result.json`, last.

    Args:
        config: the cell; its JSON is written first.
        setting: the teacher and its data, as `setting_of` gives them.
        directory: of this cell; an unfinished training there is taken up where it stopped.
        report: called as (phase, done, total).
    """
    write_json(directory / "config.json", config.model_dump(mode="json"))
    began, variant, plan = perf_counter(), config.variant, config.distillation
    adapter, seconds = student(config, setting, directory, report)
    try:
        record = measure(setting, adapter, config.evaluation, config.data, plan.image_size, directory, report)
    finally:
        adapter.unmount()
    trained = sum(p.numel() for p in adapter.student.parameters()) if variant.trained else 0
    steps = sum(stage.fit.steps for stage in plan.stages) if variant.trained else 0
    result = {
        "cell": config.id,
        "variant": variant.name,
        "seed": config.seed,
        "status": "done",
        "error": None,
        "trained_parameters": trained,
        "train_seconds": seconds,
        "seconds": perf_counter() - began,
        "steps": steps,
        **record,
    }
    write_json(directory / "result.json", result)
    for folder in stage_folders(config.distillation, directory):
        delete_checkpoints(folder)
    return result


def student(
    config: CellConfig, setting: DistillationContext, directory: Path, report: Report
) -> tuple[MixerAdapter, float]:
    """The trained adapter, not mounted, and the seconds of its training.

    Where this cell or one beside it, which differs in nothing but the evaluation, is trained, that is read back.
    """
    beside = directory.parent.glob(f"*/{TRAINED}")
    known = next((path for path in beside if read_json(path).get("training") == config.training), None)
    if known is not None:
        adapter = MixerAdapter.from_pretrained(known.with_name("adapter"), setting.pipe)
        if known.parent != directory:
            shutil.copy(known.with_name(METRICS), directory / METRICS)
        return adapter, float(read_json(known)["seconds"])
    adapter = build_student(setting.teacher, config.variant.mixer, config.variant, config.distillation, config.seed)
    seconds = distill(config, setting, adapter, directory, report)
    adapter.save_pretrained(directory / "adapter")
    if config.variant.trained:
        write_json(directory / TRAINED, {"training": config.training, "seconds": seconds})
    return adapter, seconds


def distill(
    config: CellConfig, setting: DistillationContext, adapter: MixerAdapter, directory: Path, report: Report
) -> float:
    """Train the adapter in place; returns the seconds spent, those before a stop included."""
    if not config.variant.trained:
        return 0.0
    plan = seed_stages(config.distillation, config.seed)
    records = run_stages(
        setting.teacher,
        adapter,
        plan,
        setting.batch,
        directory,
        lambda _, done, steps, __: report("distill", done, steps),
    )
    if len(records) > 1:
        _join_logs([(record["log"], record["steps"]) for record in records], directory / METRICS)
    return sum(training_seconds(folder) for folder in stage_folders(plan, directory))


def _join_logs(stages: list[tuple[list[dict[str, float]], int]], path: Path) -> None:
    """One log of all stages, with the steps counted through."""
    lines, before = [], 0
    for log, steps in stages:
        lines += [json.dumps({**row, "step": row["step"] + before}) + "\n" for row in log]
        before += steps
    path.write_text("".join(lines), encoding="utf-8")
