"""Training state on disk: one safetensors file a checkpoint, checked, the last few kept, never pickled.

    checkpoints/step-00000120.safetensors        parameters, optimizer moments, EMA, gradient scale
    checkpoints/step-00000120.safetensors.sha256

A file is written aside, brought to the disk and moved into place, after its checksum: a reader sees whole checkpoints.
Everything random in a step is drawn from (seed, step), so the number of steps done is the sampler's and the generators'
state.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

FOLDER, SUFFIX, CHECKSUM, ASIDE = "checkpoints", ".safetensors", ".sha256", ".partial"
_log = logging.getLogger(__name__)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def forget(directory: Path) -> None:
    """Remove the checkpoints of a finished training."""
    shutil.rmtree(directory / FOLDER, ignore_errors=True)


def elapsed(directory: Path) -> float:
    """Seconds of training behind the latest checkpoint, those of earlier runs included; 0 without one."""
    found = _steps(directory / FOLDER)
    return float(_metadata(found[-1])["seconds"]) if found else 0.0


@dataclass
class Trainee:
    """What a checkpoint holds: all that training changes, restored in place.

    Attributes:
        model: its parameters that require gradients.
        optimizer: AdamW, not wrapped.
        ema: name -> averaged parameter; empty without one.
        scaler: of float16 gradients, or None.
        writes: whether this process writes the checkpoints.
        began: when the clock stood at 0; earlier where a training was taken up.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: dict[str, Tensor] = field(default_factory=dict)
    scaler: Any = None
    writes: bool = True
    began: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Of training so far, in all runs."""
        return time.perf_counter() - self.began

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
            ValueError: the checkpoint is of another model, or only one of the two has a weight average.
        """
        parameters = trainable(self.model)
        places: dict[str, Tensor] = {f"model/{name}": p for name, p in parameters.items()}
        places |= {f"ema/{name}": value for name, value in self.ema.items()}
        found = {key for key in tensors if key.startswith(("model/", "ema/"))}
        if set(places) != found or any(tensors[key].shape != place.shape for key, place in places.items()):
            raise ValueError(
                f"Cannot resume from {path}: it holds another model, or `ema` was switched ({len(found - set(places))} "
                f"unknown and {len(set(places) - found)} missing tensors, or other shapes). Delete {path.parent} to "
                "start again."
            )
        with torch.no_grad():
            for key, place in places.items():
                place.copy_(tensors[key])
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


def save(directory: Path, step: int, trainee: Trainee, keep: int) -> None:
    """Write the checkpoint after `step` steps and drop those before the last `keep`.

    A disk that is full or fails leaves the older ones as they were; that is logged, and training can go on.

    Costs memory for a second copy of what is written, on the CPU.
    """
    folder = directory / FOLDER
    path = folder / f"step-{step:08d}{SUFFIX}"
    if not trainee.writes or path.exists():  # it exists where a training is taken up and broken off in the same step
        return
    metadata = {"step": str(step), "seconds": repr(trainee.seconds)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        payload = safetensors.torch.save(trainee.tensors(), metadata=metadata)
        write_file(_checksum(path), hashlib.sha256(payload).hexdigest().encode())
        write_file(path, payload)
    except OSError as error:
        _drop(path)
        _log.warning("The checkpoint of step %d is not written: %s. Those before it are kept.", step, error)
        return
    for old in _steps(folder)[:-keep]:
        _drop(old)
    for partial in folder.glob(f"*{ASIDE}"):  # of processes that were killed while they wrote
        partial.unlink(missing_ok=True)


def resume(directory: Path, trainee: Trainee) -> int:
    """Restore the latest checkpoint that is whole; returns the number of steps done, 0 where there is none.

    A damaged one is named in the log and set aside as `….damaged`, and the one before is taken.

    Raises:
        ValueError: the latest whole one is of another model; or there are some and none is whole.
    """
    found, damaged = _steps(directory / FOLDER), []
    for path in reversed(found):
        tensors = _read(path)
        if tensors is None:
            _log.warning("%s is damaged or incomplete; going back to the checkpoint before it.", path)
            damaged.append(path)
            continue
        trainee.restore(tensors, path)
        metadata = _metadata(path)
        trainee.began = time.perf_counter() - float(metadata["seconds"])
        for other in damaged:  # so that it is not counted among those that are kept
            with suppress(FileNotFoundError):  # another process was faster
                other.rename(other.with_name(f"{other.name}.damaged"))
        return int(metadata["step"])
    if found:
        raise ValueError(
            f"Cannot resume from {directory / FOLDER}: all {len(found)} checkpoints there are damaged. Delete the "
            "folder to start again."
        )
    return 0


def write_file(path: Path, content: bytes) -> None:
    """Write a file as a whole: whatever happens, it is there with all its content, or as it was before.

    Raises:
        OSError: the disk is full, or fails.
    """
    aside = path.with_name(path.name + ASIDE)
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    if hasattr(os, "O_DIRECTORY"):  # the name, too, is to outlive a power cut
        folder = os.open(path.parent, os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


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


def _steps(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"step-*{SUFFIX}"))


def _checksum(path: Path) -> Path:
    return path.with_name(path.name + CHECKSUM)


def _drop(path: Path) -> None:
    _checksum(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, str, Tensor]]:
    for name, parameter in trainable(model).items():
        for slot, value in optimizer.state.get(parameter, {}).items():
            yield name, slot, value
