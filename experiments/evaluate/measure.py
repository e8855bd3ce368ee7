"""All measurements of one student, in order: what a cell of an ablation and `mixlab evaluate` record."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from experiments.config import EvaluationConfig
from experiments.core.environment import describe_environment
from experiments.core.files import write_json
from experiments.distill.context import DistillationContext, open_context
from experiments.evaluate.fidelity import agreement
from experiments.evaluate.inside import look_inside
from experiments.evaluate.metrics import image_metrics
from experiments.evaluate.pictures import save_samples
from experiments.evaluate.protocol import freeze, protocol_of
from experiments.evaluate.speed import speed
from unet_adapters import MixerAdapter

Report = Callable[[str, int, int], None]


def measure(
    setting: DistillationContext,
    adapter: MixerAdapter,
    plan: EvaluationConfig,
    data: str,
    size: int,
    directory: Path,
    report: Report,
) -> dict[str, Any]:
    """The record of a student that is not mounted; its arrays and samples are written to `directory`.

    Args:
        setting: the teacher, and the pictures that predictions are compared on.
        plan: what is measured.
        data: where true pictures are from, if the plan names no others.
        size: in pixels, at which a mixer is looked into.
        report: called as (phase, done, total).

    Returns:
        protocol (its hash), fidelity, timesteps, sites, images, speed: rows as their functions give them.
    """
    report("compare", 0, 5)
    record: dict[str, Any] = {"protocol": protocol_of(setting, plan, data).hash}
    record |= agreement(setting, adapter, plan)
    report("look inside", 1, 5)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(look_inside(setting, adapter, size), directory / "arrays.safetensors")
    report("sample", 2, 5)
    with adapter.mounted():
        save_samples(setting.pipe, plan, directory / "samples")
    report("judge", 3, 5)
    record["images"] = image_metrics(setting, adapter, plan, data)
    report("time", 4, 5)
    record["speed"] = speed(setting, adapter, plan)
    return record


def evaluate(source: Path, teacher: str, data: str, plan: EvaluationConfig, directory: Path, report: Report) -> Path:
    """Measure a saved adapter and its teacher; returns the path of `evaluation.json`, beside the protocol and samples.

    Args:
        source: the adapter's folder.
        teacher: "embedded", a folder in diffusers format, or a Hub id.
        data: as in a grid; held-out pictures are compared.
        report: called as (phase, done, total).

    Raises:
        ValueError: the adapter does not fit the teacher, something is not at hand, or `directory` holds results of
            another protocol.
    """

    report("load", 0, 5)
    size = min(min(extent) for extent in plan.extents)
    setting = open_context(teacher, data, size, images=1)
    protocol = protocol_of(setting, plan, data)
    adapter = MixerAdapter.from_pretrained(source, setting.pipe).unmount()
    freeze(protocol, directory)  # not before: what cannot be opened leaves the folder as it was
    save_samples(setting.pipe, plan, directory / "teacher" / "samples")
    record = measure(setting, adapter, plan, data, size, directory, report)
    path = directory / "evaluation.json"
    write_json(path, {"adapter": str(source), "environment": describe_environment(), **record})
    return path
