"""Training state on disk: one safetensors file a checkpoint, verified, the last few kept, never pickled.

    checkpoints/step-00000120.safetensors        parameters, optimizer moments, EMA, gradient scale
    checkpoints/step-00000120.safetensors.sha256

A checkpoint is written to a temporary file and moved into place after its checksum, so readers see complete ones only.
Everything random in a step is drawn from (seed, step), so the number of completed steps is the whole state of samplers
and random generators.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from experiments.config import FitConfig
from experiments.core.files import write_bytes
from experiments.training.optimizers import create_optimizer
from experiments.training.state import TrainingState, trainable_parameters
from mixers.files import PARTIAL

FOLDER = "checkpoints"
SUFFIX = ".safetensors"
CHECKSUM = ".sha256"
_log = logging.getLogger(__name__)


def initial_state(model: nn.Module, config: FitConfig, scaler: Any = None, *, writes: bool = True) -> TrainingState:
    """Return the state before the first step: an optimizer without moments, and averages that equal the parameters."""
    parameters = trainable_parameters(model)
    ema = {name: p.detach().clone() for name, p in parameters.items()} if config.ema else {}
    return TrainingState(model, create_optimizer(model, config), ema, scaler, writes=writes)


def delete_checkpoints(directory: Path) -> None:
    """Delete the checkpoints of a finished training."""
    shutil.rmtree(directory / FOLDER, ignore_errors=True)


def training_seconds(directory: Path) -> float:
    """Return the seconds of training up to the latest checkpoint, earlier runs included; 0 if there is none."""
    paths = _checkpoint_paths(directory / FOLDER)
    return float(_metadata(paths[-1])["seconds"]) if paths else 0.0


def save(directory: Path, step: int, state: TrainingState, keep: int) -> bool:
    """Write the checkpoint after `step` steps and delete those before the last `keep`.

    If the disk is full or fails, that is logged, the older checkpoints stay, and training can continue. Costs memory
    for a second copy of what is written, on the CPU.

    Returns:
        Whether a checkpoint of this step is on the disk, as far as this process writes any.
    """
    folder = directory / FOLDER
    path = folder / f"step-{step:08d}{SUFFIX}"
    if not state.writes or path.exists():  # it exists if a training is resumed and interrupted in the same step
        return True
    metadata = {"step": str(step), "seconds": repr(state.seconds)}
    try:
        payload = safetensors.torch.save(state.tensors(), metadata=metadata)
        write_bytes(_checksum(path), hashlib.sha256(payload).hexdigest().encode())
        write_bytes(path, payload)
    except OSError as error:
        _delete(path)
        _log.warning("Cannot write the checkpoint of step %d: %s. The checkpoints before it are kept.", step, error)
        return False
    for old in _checkpoint_paths(folder)[:-keep]:
        _delete(old)
    for partial in folder.glob(f"*{PARTIAL}"):  # of processes that were killed while they wrote
        partial.unlink(missing_ok=True)
    return True


def save_weights(directory: Path, model: nn.Module, config: FitConfig, step: int, seconds: float = 0.0) -> None:
    """Write a checkpoint of a model as it is, as if `step` steps had been trained; `fit` resumes from it.

    Args:
        directory: of the training.
        model: its parameters that require gradients.
        config: of the training; at its last step, `fit` finds it completed.
        step: completed steps.
        seconds: of training so far.

    Raises:
        OSError: the checkpoint cannot be written.
    """
    state = initial_state(model, config)
    state.start_time -= seconds
    if not save(directory, step, state, config.keep):
        raise OSError(f"Cannot write a checkpoint in {directory / FOLDER}.")


def resume(directory: Path, state: TrainingState) -> int:
    """Restore the latest complete checkpoint; returns the number of completed steps, 0 if there is no checkpoint.

    A damaged one is named in the log and renamed to `….damaged`, and the one before it is used.

    Raises:
        ValueError: the latest complete one is of another model; or there are some and none is complete.
    """
    paths = _checkpoint_paths(directory / FOLDER)
    damaged = []
    for path in reversed(paths):
        tensors = _read(path)
        if tensors is None:
            _log.warning("%s is damaged or incomplete; going back to the checkpoint before it.", path)
            damaged.append(path)
            continue
        state.restore(tensors, path)
        metadata = _metadata(path)
        state.start_time = time.perf_counter() - float(metadata["seconds"])
        for other in damaged:  # renamed, so that it does not count among the checkpoints to keep
            with suppress(FileNotFoundError):  # another process was faster
                other.rename(other.with_name(f"{other.name}.damaged"))
        return int(metadata["step"])
    if paths:
        raise ValueError(
            f"Cannot resume from {directory / FOLDER}: all {len(paths)} checkpoints there are damaged. Delete the "
            "folder to start from the beginning."
        )
    return 0


def _read(path: Path) -> dict[str, Tensor] | None:
    try:
        payload = path.read_bytes()
        if hashlib.sha256(payload).hexdigest() != _checksum(path).read_text(encoding="utf-8"):
            return None
        return safetensors.torch.load(payload)
    except (OSError, SafetensorError, UnicodeDecodeError):
        return None


def _metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        metadata: dict[str, str] = file.metadata()
    return metadata


def _checkpoint_paths(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"step-*{SUFFIX}"))


def _checksum(path: Path) -> Path:
    return path.with_name(path.name + CHECKSUM)


def _delete(path: Path) -> None:
    _checksum(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)
