"""fit: the only training loop.

    batch(step)  ->  this process's part, in micro-batches  ->  model(part) -> {"loss": …, terms…}  ->  backward
    ->  clip  ->  AdamW  ->  EMA  ->  checkpoint, log, report

Everything random in a step is a function of (seed, step), so a run that is killed and started again gives the same
weights, to the last bit on one CPU, as one that was not; and so do two processes, up to rounding.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from experiments.training.checkpoints import Trainee, resume, save, trainable
from experiments.training.guard import check_gradients, check_losses
from experiments.training.plan import FitConfig, learning_rate_factor

Report = Callable[[int, dict[str, float]], None]


class Interrupted(KeyboardInterrupt):
    """The process was asked to stop (SIGTERM); the step it was in is done and saved."""


def fit(
    model: nn.Module,
    batch: Callable[[int], Any],
    config: FitConfig,
    directory: Path,
    report: Report | None = None,
    *,
    watched: nn.Module | None = None,
) -> list[dict[str, float]]:
    """Train the parameters of `model` that require gradients; the trained values are left in `model`.

    Args:
        model: `model(batch) -> {"loss": scalar, …}`; the other entries are logged beside the loss.
        batch: step number -> the batch of that update, for all processes together: tensors, or tuples, lists or
            dictionaries of them, with the batch first. It must depend on nothing but the number and torch's seeded RNG.
        config: steps, rates and so on.
        directory: receives `checkpoints/` (resumed from where there are some) and `metrics.jsonl`.
        report: called after each step with its number and losses, for a progress display.
        watched: the network in whose layers a number that is not finite is looked for.

    Returns:
        The logged metrics, one record per `log_every` steps.

    Raises:
        FloatingPointError: the loss or a gradient is not finite; the checkpoints on disk are from before.
        Interrupted: the process got a SIGTERM; the last step is saved.
        ValueError: checkpoints of another model, a batch that cannot be shared out, or a tracker that is missing.
    """
    accelerator = _accelerator(config, directory)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=config.learning_rate, weight_decay=config.weight_decay)
    ema = {n: p.detach().clone() for n, p in trainable(model).items()} if config.ema else {}
    trainee = Trainee(model, optimizer, ema, accelerator.scaler)
    start, log = resume(directory, trainee), _Log(directory, accelerator)
    history = log.until(start)
    stepper, prepared = accelerator.prepare(model, optimizer)
    clock, spent = time.perf_counter(), trainee.seconds
    with _stoppable() as stopped:
        for step in range(start, config.steps):
            torch.manual_seed(config.seed * 1_000_003 + step)
            losses = _update(accelerator, stepper, prepared, batch(step), config, step, watched)
            _average(ema, model, config.ema, step)
            done = step + 1
            if done % config.log_every == 0 or done == config.steps:
                history.append(log.write(done, losses))
            stop = stopped.is_set()
            if accelerator.is_main_process and (done % config.checkpoint_every == 0 or done == config.steps or stop):
                trainee.seconds = spent + time.perf_counter() - clock
                save(directory, done, trainee, config.keep)
            if report:
                report(done, losses)
            if stop and done < config.steps:
                raise Interrupted(f"Stopped after step {done} of {config.steps}; start the same command to go on.")
    with torch.no_grad():
        for name, value in ema.items():
            trainable(model)[name].copy_(value)
    log.close()
    return history


def shares(batch: Any, process: int, processes: int, accumulation: int) -> list[Any]:
    """The micro-batches of one process: its part of every tensor, cut along the first axis.

    Raises:
        ValueError: the batch does not divide.
    """
    parts = processes * accumulation
    if parts == 1:
        return [batch]
    sizes = {len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)}
    if len(sizes) != 1 or next(iter(sizes)) % parts:
        raise ValueError(
            f"A batch of {sorted(sizes)} items cannot be shared out evenly among {processes} processes × "
            f"{accumulation} micro-batches: choose a batch_size that is a multiple of {parts}."
        )
    each = next(iter(sizes)) // parts
    first = process * accumulation

    def cut(number: int) -> Any:
        start = (first + number) * each
        return tree_map(lambda leaf: leaf[start : start + each] if isinstance(leaf, Tensor) else leaf, batch)

    return [cut(number) for number in range(accumulation)]


def _accelerator(config: FitConfig, directory: Path) -> Accelerator:
    for name in config.trackers:
        if find_spec(name) is None:
            raise ValueError(
                f"The tracker {name!r} is not installed: pip install {name}, or leave it out of `trackers`."
            )
    directory.mkdir(parents=True, exist_ok=True)
    AcceleratorState._reset_state()  # the precision is of this training, not of the first in the process
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision, log_with=list(config.trackers) or None, project_dir=str(directory)
    )
    if config.trackers:
        accelerator.init_trackers("mixlab", {k: v for k, v in config.model_dump().items() if k != "trackers"})
    return accelerator


def _update(
    accelerator: Accelerator,
    model: Any,
    optimizer: Any,
    batch: Any,
    config: FitConfig,
    step: int,
    watched: nn.Module | None,
) -> dict[str, float]:
    parts = shares(batch, accelerator.process_index, accelerator.num_processes, config.accumulation)
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate * learning_rate_factor(step, config)
    optimizer.zero_grad()
    sums: dict[str, float] = {}
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        with nullcontext() if last else accelerator.no_sync(model):
            losses: dict[str, Tensor] = model(part)
            values = {name: float(value.detach()) for name, value in losses.items()}
            check_losses(values, step, partial(model, part), watched)
            accelerator.backward(losses["loss"].float() / len(parts))
        sums = {name: sums.get(name, 0.0) + value / len(parts) for name, value in values.items()}
    norm = accelerator.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], config.clip)
    if accelerator.scaler is None and isinstance(norm, Tensor):  # float16's scaler skips such steps by itself
        check_gradients(model, norm, step)
    optimizer.step()
    if accelerator.num_processes == 1:
        return sums
    mean = accelerator.reduce(torch.tensor(list(sums.values()), device=accelerator.device), "mean")
    return dict(zip(sums, mean.tolist(), strict=True))


@torch.no_grad()
def _average(ema: dict[str, Tensor], model: nn.Module, decay: float, step: int) -> None:
    weight = 1 - min(decay, (1 + step) / (10 + step))  # a young average must not remember the start
    for name, value in ema.items():
        value.lerp_(trainable(model)[name], weight)


@contextmanager
def _stoppable() -> Iterator[threading.Event]:
    """An event that a SIGTERM sets, so that the present step can be finished; in the main thread only."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number: int, frame: FrameType | None) -> None:
        asked.set()

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)


class _Log:
    """metrics.jsonl, and the trackers; written by the main process."""

    def __init__(self, directory: Path, accelerator: Accelerator) -> None:
        self.file, self.accelerator = directory / "metrics.jsonl", accelerator

    def until(self, step: int) -> list[dict[str, float]]:
        """The records up to a step; later ones, of a run that was killed, are dropped."""
        lines: Sequence[str] = self.file.read_text().splitlines() if self.file.exists() else ()
        kept = [record for record in map(_record, lines) if record is not None and record["step"] <= step]
        if self.accelerator.is_main_process:
            self.file.write_text("".join(json.dumps(record) + "\n" for record in kept))
        return kept

    def write(self, step: int, losses: dict[str, float]) -> dict[str, float]:
        """Add a record."""
        record = {"step": step, **losses}
        if self.accelerator.is_main_process:
            with self.file.open("a") as file:
                file.write(json.dumps(record) + "\n")
        if self.accelerator.trackers:
            self.accelerator.log(losses, step=step)
        return record

    def close(self) -> None:
        """Finish the trackers."""
        if self.accelerator.trackers:
            self.accelerator.end_training()


def _record(line: str) -> dict[str, float] | None:
    try:
        record: dict[str, float] = json.loads(line)
    except ValueError:  # the last line of a run that was killed
        return None
    return record
