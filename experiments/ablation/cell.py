"""THE flow of one cell: config -> adapter -> distil -> evaluate -> record."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from experiments.ablation import store
from experiments.config import CellConfig
from experiments.distil import Distil, Setting
from experiments.evaluate.fidelity import fidelity
from experiments.evaluate.pictures import mixing_matrix, save_samples
from experiments.evaluate.speed import speed
from experiments.training import fit
from unet_adapters import MixerAdapter

Report = Callable[[str, int, int], None]


def run_cell(config: CellConfig, setting: Setting, directory: Path, report: Report) -> dict[str, Any]:
    """Distil and measure one variant; the record is also written to `directory/result.json`, last.

    Args:
        config: the cell; its JSON is written first.
        setting: the teacher and its data, as `open_setting` gives them.
        directory: of this cell; an unfinished training there is taken up where it stopped.
        report: called as (phase, done, total).
    """
    store.write_json(directory / "config.json", config.model_dump(mode="json"))
    torch.manual_seed(config.seed)
    variant = config.variant
    adapter = MixerAdapter.build(
        setting.pipe.unet,
        variant.mixer,
        select=variant.select,
        causality=variant.causality,
        normalize=variant.normalize,
        **variant.options,
    )
    try:
        seconds = distil(config, setting, adapter, directory, report)
        record = measure(config, setting, adapter, directory, report)
    finally:
        adapter.unmount()
    adapter.save_pretrained(directory / "adapter")
    trained = sum(p.numel() for p in adapter.student.parameters()) if variant.trained else 0
    steps = config.distillation.fit.steps if variant.trained else 0
    result = {
        "cell": config.id,
        "variant": variant.name,
        "seed": config.seed,
        "status": "done",
        "error": None,
        "trained_parameters": trained,
        "train_seconds": seconds,
        "steps": steps,
        **record,
    }
    store.write_json(directory / "result.json", result)
    (directory / "state.safetensors").unlink(missing_ok=True)
    return result


def distil(config: CellConfig, setting: Setting, adapter: MixerAdapter, directory: Path, report: Report) -> float:
    """Train the adapter in place; returns the seconds spent (of this run, if it was taken up)."""
    if not config.variant.trained:
        return 0.0
    start = time.perf_counter()
    plan = config.distillation.fit.model_copy(update={"seed": config.seed})
    objective = Distil(setting.pipe.unet, adapter, setting.pipe.scheduler, config.distillation)
    fit(
        objective,
        lambda step: setting.batch(step, plan),
        plan,
        directory,
        lambda done, _: report("distil", done, plan.steps),
    )
    return time.perf_counter() - start


def measure(
    config: CellConfig, setting: Setting, adapter: MixerAdapter, directory: Path, report: Report
) -> dict[str, Any]:
    """Fidelity, mixing matrix, samples, time and memory of the trained student."""
    plan = config.evaluation
    report("compare", 0, 4)
    record: dict[str, Any] = {"fidelity": fidelity(setting, adapter, plan)}
    report("look inside", 1, 4)
    matrix = mixing_matrix(setting, adapter, config.distillation.image_size)
    save_file({"mixing_matrix": matrix.contiguous()}, directory / "arrays.safetensors")
    report("sample", 2, 4)
    with adapter.mounted():
        save_samples(setting.pipe, plan, directory / "samples")
    report("time", 3, 4)
    record["speed"] = speed(setting, adapter, plan)
    return record
