"""Training state on disk: one safetensors file a checkpoint, checked, the last few kept, never pickled.

    checkpoints/step-00000120.safetensors        parameters, optimiser moments, EMA, gradient scale
    checkpoints/step-00000120.safetensors.sha256

A file is written aside, brought to the disk and moved into place, its checksum last: a reader sees whole checkpoints.
Everything random in a step is drawn from (seed, step), so the number of steps done is the sampler's and the generators'
state.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

FOLDER, SUFFIX, CHECKSUM = "checkpoints", ".safetensors", ".sha256"
_log = logging.getLogger(__name__)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def forget(directory: Path) -> None:
    """Remove the checkpoints of a finished training."""
    shutil.rmtree(directory / FOLDER, ignore_errors=True)


@dataclass
class Trainee:
    """What a checkpoint holds: all that training changes, restored in place.

    Attributes:
        model: its parameters that require gradients.
        optimizer: AdamW, not wrapped.
        ema: name -> averaged parameter; empty without one.
        scaler: of float16 gradients, or None.
        seconds: spent so far, of all runs.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: dict[str, Tensor] = field(default_factory=dict)
    scaler: Any = None
    seconds: float = 0.0

    def tensors(self) -> dict[str, Tensor]:
        """Everything by name, on the CPU."""
        found: dict[str, Tensor] = {f"model/{name}": p.detach() for name, p in trainable(self.model).items()}
        found |= {f"ema/{name}": value for name, value in self.ema.items()}
        for name, slot, value in _moments(self.model, self.optimizer):
            found[f"optimizer/{slot}/{name}"] = value
        if self.scaler is not None:
            state = self.scaler.state_dict()
            found |= {f"scaler/{key}": torch.tensor(float(value)) for key, value in state.items()}
        return {key: value.contiguous().cpu() for key, value in found.items()}

    def restore(self, tensors: Mapping[str, Tensor], path: Path) -> None:
        """Put everything back.

        Raises:
            ValueError: the checkpoint is of another model.
        """
        parameters = trainable(self.model)
        expected, found = set(parameters), {k.removeprefix("model/") for k in tensors if k.startswith("model/")}
        if expected != found or any(tensors[f"model/{n}"].shape != p.shape for n, p in parameters.items()):
            raise ValueError(
                f"Cannot resume from {path}: it holds another model ({len(found - expected)} unknown and "
                f"{len(expected - found)} missing parameters, or other shapes). Delete {path.parent} to start again."
            )
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[f"model/{name}"])
                if name in self.ema:
                    self.ema[name].copy_(tensors[f"ema/{name}"])
        scale = {}
        for key, value in tensors.items():
            kind, _, rest = key.partition("/")
            if kind == "optimizer":
                slot, _, name = rest.partition("/")
                parameter = parameters[name]
                self.optimizer.state[parameter][slot] = value if slot == "step" else value.to(parameter.device)
            elif kind == "scaler":
                scale[rest] = float(value)
        if scale and self.scaler is not None:
            integers = {"growth_interval", "_growth_tracker"}
            self.scaler.load_state_dict({k: int(v) if k in integers else v for k, v in scale.items()})


def save(directory: Path, step: int, trainee: Trainee, keep: int) -> bool:
    """Write the checkpoint after `step` steps and drop those before the last `keep`.

    Returns:
        Whether it was written. A disk that is full or fails leaves the older ones as they were; that is logged.
    """
    folder = directory / FOLDER
    path = folder / f"step-{step:08d}{SUFFIX}"
    metadata = {"step": str(step), "seconds": repr(trainee.seconds)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        payload = safetensors.torch.save(trainee.tensors(), metadata=metadata)
        _write(path, payload)
        _write(path.with_name(path.name + CHECKSUM), hashlib.sha256(payload).hexdigest().encode())
    except OSError as error:
        _log.warning("Checkpoint of step %d not written (%s); training goes on, the one before is kept.", step, error)
        return False
    for old in _steps(folder)[:-keep]:
        old.with_name(old.name + CHECKSUM).unlink(missing_ok=True)
        old.unlink(missing_ok=True)
    return True


def resume(directory: Path, trainee: Trainee) -> int:
    """Restore the latest checkpoint that is whole; returns the number of steps done, 0 where there is none.

    A damaged one is named in the log, and the one before is taken.

    Raises:
        ValueError: the latest whole one is of another model; or there are some and none is whole.
    """
    found = _steps(directory / FOLDER)
    for path in reversed(found):
        tensors = _read(path)
        if tensors is None:
            _log.warning("%s is damaged or incomplete; going back to the checkpoint before it.", path)
            continue
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        trainee.restore(tensors, path)
        trainee.seconds = float(metadata["seconds"])
        return int(metadata["step"])
    if found:
        raise ValueError(
            f"Cannot resume from {directory / FOLDER}: all {len(found)} checkpoints there are damaged. Delete the "
            "folder to start again."
        )
    return 0


def _read(path: Path) -> dict[str, Tensor] | None:
    checksum = path.with_name(path.name + CHECKSUM)
    try:
        payload = path.read_bytes()
        if hashlib.sha256(payload).hexdigest() != checksum.read_text(encoding="utf-8"):
            return None
        return safetensors.torch.load(payload)
    except (OSError, SafetensorError, UnicodeDecodeError):
        return None


def _steps(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"step-*{SUFFIX}"))


def _write(path: Path, content: bytes) -> None:
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, str, Tensor]]:
    for name, parameter in trainable(model).items():
        for slot, value in optimizer.state.get(parameter, {}).items():
            yield name, slot, value
