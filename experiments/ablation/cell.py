"""THE flow of one cell: config -> student -> distillation -> evaluation -> result."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from time import perf_counter

from experiments.ablation.result import CellResult, write_result
from experiments.config import CellConfig, Grid
from experiments.core.files import read_json, write_json, write_text
from experiments.core.progress import ProgressCallback
from experiments.distill import DistillationContext, build_student, open_context, run_stages
from experiments.distill.student import OUTPUT_GAINS, seed_stages, stage_folders, training_sources
from experiments.evaluate.measure import measure_student
from experiments.metrics.inputs.student import EvaluatedStudent
from experiments.training import delete_checkpoints, training_seconds
from mixers.files import atomic_path
from unet_adapters import MixerAdapter

LOG = "metrics.jsonl"
TRAINED = "trained.json"
STARTED = "training.json"


def open_cell_context(config: CellConfig | Grid) -> DistillationContext:
    """Open the teacher and the images of a cell, or of a grid, whose cells share them."""
    plan = config.distillation
    return open_context(
        config.teacher, config.data, plan.image_size, plan.images, plan.all_sizes[1:], config.teacher_variant
    )


def training_key(config: CellConfig, context: DistillationContext) -> str:
    """Return the SHA-256 of everything that a cell's weights depend on.

    That is its configuration, the teacher with its settings and noise schedule, the training images and captions, and
    the source of a mixer and of objectives that are not the library's own. It is the same on every machine, so a run
    can be continued on another one.
    """
    sources = training_sources(config.variant.mixer, config.distillation)
    parts = [config.training, context.teacher.fingerprint, context.encoded.source_digest, sources]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def run_cell(
    config: CellConfig, context: DistillationContext, directory: Path, progress: ProgressCallback
) -> CellResult:
    """Distill and measure one variant; its record is also written to `directory/result.json`, last.

    Args:
        config: the cell; its JSON is written first.
        context: the teacher and its data, from `open_cell_context`.
        directory: of this cell; an interrupted training there is resumed.
        progress: called as (phase, done, total).
    """
    write_json(directory / "config.json", config.model_dump(mode="json"))
    start = perf_counter()
    variant = config.variant
    plan = config.distillation
    key = training_key(config, context)
    adapter, seconds = train_student(config, context, key, directory, progress)
    try:
        student = EvaluatedStudent(context, adapter, config.evaluation, config.data, config.seed)
        measurements = measure_student(
            student, plan.image_size, directory, progress, draws_samples=config.draws_samples
        )
    finally:
        adapter.unmount()
    result = CellResult(
        cell=config.id,
        variant=variant.name,
        seed=config.seed,
        status="done",
        trained_parameters=sum(p.numel() for p in adapter.student.parameters()) if variant.trained else 0,
        train_seconds=seconds,
        seconds=perf_counter() - start,
        steps=sum(stage.fit.steps for stage in plan.stages) if variant.trained else 0,
        training_key=key,
        measurements=measurements,
    )
    write_result(directory, result)
    for folder in stage_folders(plan, directory):
        delete_checkpoints(folder)
    return result


def train_student(
    config: CellConfig, context: DistillationContext, key: str, directory: Path, progress: ProgressCallback
) -> tuple[MixerAdapter, float]:
    """Return the trained adapter, not mounted, and the seconds of its training.

    A student with the same key, of this cell or of one that differs only in its evaluation, is loaded instead of
    trained; another cell's files are copied. An interrupted training with another key is discarded.
    """
    if read_json(directory / TRAINED).get("training") != key:
        trained = next((p for p in directory.parent.glob(f"*/{TRAINED}") if read_json(p).get("training") == key), None)
        if trained is not None:
            _copy_training(trained.parent, directory, config)
    record = read_json(directory / TRAINED)
    if record.get("training") == key:
        return MixerAdapter.from_pretrained(directory / "adapter", context.pipe), float(record["seconds"])
    if read_json(directory / STARTED).get("training") != key:
        _discard_training(config, directory)
        write_json(directory / STARTED, {"training": key})
    adapter = build_student(context.teacher, config.variant.mixer, config.variant, config.distillation, config.seed)
    seconds = distill_cell(config, context, adapter, directory, progress)
    adapter.save_pretrained(directory / "adapter")
    if config.variant.trained:
        write_json(directory / TRAINED, {"training": key, "seconds": seconds})
    return adapter, seconds


def distill_cell(
    config: CellConfig,
    context: DistillationContext,
    adapter: MixerAdapter,
    directory: Path,
    progress: ProgressCallback,
) -> float:
    """Train the adapter in place and return the seconds spent, those before an interruption included."""
    if not config.variant.trained:
        return 0.0
    plan = seed_stages(config.distillation, config.seed)
    records = run_stages(
        context.teacher,
        adapter,
        plan,
        context.batch,
        directory,
        lambda _, done, steps, __: progress("distill", done, steps),
    )
    if len(records) > 1:
        _join_logs([(record["log"], record["steps"]) for record in records], directory / LOG)
    return sum(training_seconds(folder) for folder in stage_folders(plan, directory))


def _copy_training(source: Path, directory: Path, config: CellConfig) -> None:
    """Copy the student and the log of another cell's folder; the mark that they are complete comes last."""
    _discard_training(config, directory)
    shutil.rmtree(directory / "adapter", ignore_errors=True)
    with atomic_path(directory / "adapter") as partial:
        shutil.copytree(source / "adapter", partial)
    shutil.copy(source / LOG, directory / LOG)
    write_json(directory / TRAINED, read_json(source / TRAINED))


def _discard_training(config: CellConfig, directory: Path) -> None:
    """Delete checkpoints, logs, output gains and the mark of trained weights that belong to another key."""
    for folder in stage_folders(config.distillation, directory):
        delete_checkpoints(folder)
        (folder / LOG).unlink(missing_ok=True)
    for name in (LOG, TRAINED, OUTPUT_GAINS):
        (directory / name).unlink(missing_ok=True)


def _join_logs(stages: list[tuple[list[dict[str, float]], int]], path: Path) -> None:
    """Write one log of all stages, whose steps are counted from the first stage on."""
    lines = []
    offset = 0
    for log, steps in stages:
        lines += [json.dumps({**row, "step": row["step"] + offset}) + "\n" for row in log]
        offset += steps
    write_text(path, "".join(lines))
