"""THE flow of an evaluation: a student -> metrics, mixing matrices, samples -> one typed record."""

from __future__ import annotations

from pathlib import Path

from experiments.config import EvaluationConfig
from experiments.core.environment import describe_environment
from experiments.core.files import require_same_inputs, write_json
from experiments.core.locks import lock_folder
from experiments.core.progress import ProgressCallback
from experiments.core.registries import METRICS
from experiments.distill.context import open_context
from experiments.evaluate.measurements import Measurements
from experiments.evaluate.mixing_arrays import mixing_arrays
from experiments.evaluate.protocol import freeze_protocol, protocol_of
from experiments.evaluate.samples import save_samples
from experiments.metrics.base import Metric
from experiments.metrics.inputs.student import EvaluatedStudent
from unet_adapters import MixerAdapter, load_adapter
from unet_adapters.files import save_tensors
from unet_adapters.highres.fingerprint import fingerprint

RESULT = "evaluation.json"
IDENTITY = "evaluated_adapter.json"


def measure_student(
    student: EvaluatedStudent,
    training_size: int,
    directory: Path,
    progress: ProgressCallback,
    *,
    draws_samples: bool = True,
) -> Measurements:
    """Measure a student and write its arrays and samples to `directory`.

    Args:
        student: not mounted, and not mounted afterwards.
        training_size: side in pixels of the image whose mixing matrix is recorded.
        directory: receives arrays.safetensors and samples/.
        progress: called as (phase, done, total).
        draws_samples: whether the student draws the samples of the evaluation's prompts.
    """
    metrics: list[Metric] = [METRICS.get(name)(options) for name, options in student.plan.metric_options()]
    total = len(metrics) + 2
    directory.mkdir(parents=True, exist_ok=True)
    protocol = protocol_of(student.context, student.plan, student.data).hash
    progress("mixing matrices", 0, total)
    save_tensors(directory / "arrays.safetensors", mixing_arrays(student, training_size))
    if draws_samples:
        progress("sample", 1, total)
        with student.adapter.mounted():
            save_samples(student.context.pipe, student.plan, directory / "samples")
    rows = {}
    for done, metric in enumerate(metrics, 2):
        progress(f"measure {metric.name}", done, total)
        rows[metric.name] = tuple(metric.measure(student))
    progress("measured", total, total)
    return Measurements(protocol=protocol, commit=describe_environment()["commit"], metrics=rows)


def evaluate_adapter(
    source: str,
    teacher: str,
    data: str,
    plan: EvaluationConfig,
    directory: Path,
    progress: ProgressCallback,
    variant: str | None = None,
) -> Path:
    """Measure a saved adapter and its teacher.

    Args:
        source: a folder or Hub id of an adapter, in this project's format or in LinFusion's.
        teacher: "embedded", a folder in diffusers format, or a Hub id.
        data: as in a grid; its held-out images are compared.
        plan: what is measured.
        directory: receives evaluation.json, protocol.json, samples/, teacher/samples/ and arrays.safetensors; of one
            adapter.
        progress: called as (phase, done, total).
        variant: the teacher's weight files to read, as `open_teacher` takes it.

    Returns:
        The path of `evaluation.json`.

    Raises:
        ValueError: the adapter does not fit the teacher, something is not available, or `directory` holds results of
            another protocol or adapter, or is in use.
        OSError: the disk is full.
    """
    progress("load", 0, 1)
    size = min(min(extent) for extent in plan.extents)
    context = open_context(teacher, data, size, images=max(1, plan.held_in_images), variant=variant)
    protocol = protocol_of(context, plan, data)
    adapter = load_adapter(source, context.pipe)
    path = directory / RESULT
    identity = {"adapter": _adapter_digest(adapter)}
    with lock_folder(directory, "evaluation"):  # an adapter that cannot be opened leaves the folder as it was
        require_same_inputs(directory / IDENTITY, identity, [path])
        freeze_protocol(protocol, directory)
        write_json(directory / IDENTITY, identity)
        save_samples(context.pipe, plan, directory / "teacher" / "samples")
        student = EvaluatedStudent(context, adapter, plan, data)
        measurements = measure_student(student, size, directory, progress)
        record = {"adapter": source, "environment": describe_environment(), **measurements.model_dump(mode="python")}
        write_json(path, record)
    return path


def _adapter_digest(adapter: MixerAdapter) -> str:
    """A hash of the weights of an adapter, and of its mixers and their settings."""
    mixers = {name: (mixer.mixer, mixer.config) for name, mixer in adapter.site_mixers.items()}
    return fingerprint(adapter.student, mixers, adapter.min_tokens)
