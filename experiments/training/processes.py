"""The processes that train together: the set-up of one of them by accelerate, and its part of each batch."""

from __future__ import annotations

import logging
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, gather_object
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from experiments.config import FitConfig

_log = logging.getLogger(__name__)
PATIENCE = timedelta(days=1)
"""How long processes wait for one that works alone: the main one encodes data and draws samples for hours."""


def this_process() -> PartialState:
    """Return this process among those that were launched together by accelerate, torchrun or a cluster.

    On a machine without an accelerator, accelerate by itself does not connect the processes, so that each would train
    alone. By default NCCL ends every process that waits for another for more than ten minutes.
    """
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)


def open_accelerator(config: FitConfig, model: nn.Module, directory: Path) -> Accelerator:
    """Set accelerate up for a model that stays on its device.

    Args:
        config: its precision and trackers.
        model: checked against the device of this process.
        directory: of the training, for the trackers; created.

    Raises:
        ValueError: a tracker is not installed, or the model cannot be trained in this precision, on this device, or
            with the strategy that `accelerate launch` was configured for.
    """
    for name in config.trackers:
        if find_spec(name) is None:
            raise ValueError(
                f"The tracker {name!r} is not installed: pip install {name}, or leave it out of `trackers`."
            )
    this_process()
    AcceleratorState._reset_state()  # it would keep the precision of the first training in this process
    accelerator = Accelerator(
        device_placement=False,
        mixed_precision=config.mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # `fit` accumulates itself
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],  # a stage may use some
        log_with=list(config.trackers) or None,
        project_dir=str(directory),
    )
    _check(accelerator, config, model)
    directory.mkdir(parents=True, exist_ok=True)
    if config.trackers:
        settings = {name: value for name, value in config.model_dump().items() if name != "trackers"}
        accelerator.init_trackers("mixlab", settings, {"wandb": {"dir": str(directory), "name": directory.name}})
    return accelerator


def agree_on_start(start: int) -> int:
    """Return the step that every process starts from.

    Raises:
        ValueError: they do not start from the same one.
    """
    starts = gather_object([start])
    if len(set(starts)) > 1:
        raise ValueError(
            f"Cannot resume: the processes have checkpoints of different steps: {', '.join(map(str, starts))}. All of "
            "them must see the same folder."
        )
    return start


def split_batch(batch: Any, process: int, processes: int, accumulation: int) -> list[Any]:
    """Return the micro-batches of one process: its part of every tensor, cut along the first axis.

    Args:
        batch: of all processes: tensors, or tuples, lists or dictionaries of them.
        process: the number of this one, from 0.
        processes: how many there are.
        accumulation: micro-batches per process.

    Raises:
        ValueError: the batch cannot be divided evenly.
    """
    parts = processes * accumulation
    if parts == 1:
        return [batch]
    sizes = {len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)}
    if len(sizes) != 1 or next(iter(sizes)) % parts:
        raise ValueError(
            f"A batch of {sorted(sizes)} items cannot be divided evenly among {processes} processes × "
            f"{accumulation} micro-batches: choose a batch_size that is a multiple of {parts}."
        )
    size = next(iter(sizes)) // parts

    def cut(number: int) -> Any:
        start = (process * accumulation + number) * size
        return tree_map(lambda leaf: leaf[start : start + size] if isinstance(leaf, Tensor) else leaf, batch)

    return [cut(number) for number in range(accumulation)]


def _check(accelerator: Accelerator, config: FitConfig, model: nn.Module) -> None:
    kind = accelerator.distributed_type.value
    if kind != "NO" and not kind.startswith("MULTI_"):
        raise ValueError(
            f"Cannot train with {kind}: every process holds the whole student here, which is small. Launch with plain "
            "data parallelism (accelerate launch --multi_gpu)."
        )
    if config.mixed_precision == "no" and accelerator.num_processes == 1:
        return
    device = next(model.parameters()).device
    if device.type != accelerator.device.type:
        raise ValueError(
            f"Cannot train in {config.mixed_precision!r} with {accelerator.num_processes} process(es): the model is on "
            f"{device}, this process trains on {accelerator.device}. Move the model there first."
        )
    if config.mixed_precision == "bf16" and device.type == "cpu" and _emulates_bfloat16():
        _log.warning("This CPU emulates bfloat16, which is many times slower than float32: train with precision 'no'.")
    if config.mixed_precision == "fp16" and accelerator.scaler is None:
        raise ValueError(f"Cannot train in fp16 on {device.type}: choose mixed_precision 'bf16' or 'no'.")


def _emulates_bfloat16() -> bool:
    """Whether this CPU has no instructions for bfloat16."""
    return not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
