"""fit: the only training loop.

    batch(step)  ->  this process's part, in micro-batches  ->  model(part) -> {"loss": …, terms…}  ->  backward
    ->  guard  ->  clip  ->  AdamW  ->  EMA  ->  log, checkpoint, report

Everything random in a step is a function of (seed, step), so a run that is killed and started again gives the same
weights, to the last bit on one CPU, as one that was not; and so do two processes, up to rounding.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from experiments.training.checkpoints import Trainee, resume, save, trainable
from experiments.training.guard import check_gradients, check_losses
from experiments.training.log import Log
from experiments.training.plan import FitConfig, learning_rate_factor
from experiments.training.processes import agreed, open_accelerator, shares

Report = Callable[[int, dict[str, float]], None]


class Interrupted(KeyboardInterrupt):
    """The process was asked to stop (SIGTERM); the step it was in is done."""


def fit(
    model: nn.Module,
    batch: Callable[[int], Any],
    config: FitConfig,
    directory: Path,
    report: Report | None = None,
    *,
    watched: nn.Module | None = None,
) -> list[dict[str, float]]:
    """Train the parameters of `model` that require gradients, where they are; the trained values are left in `model`.

    Args:
        model: `model(batch) -> {"loss": scalar, …}`; the other entries are logged beside the loss.
        batch: step number -> the batch of that update, for all processes together: tensors, or tuples, lists or
            dictionaries of them, with the batch first. It must depend on nothing but the number and torch's seeded RNG.
        config: steps, rates and so on.
        directory: receives `checkpoints/` (resumed from where there are some) and `metrics.jsonl`.
        report: called after each step with its number and losses, for progress, pictures and the like.
        watched: the network in whose layers a number that is not finite is looked for; `model` where there is none.

    Returns:
        The logged metrics, one record per `log_every` steps.

    Raises:
        FloatingPointError: the loss or a gradient is not finite; the state from before that step is saved.
        Interrupted: a process got a SIGTERM; the state after the last step is saved.
        ValueError: checkpoints of another model, a batch that cannot be shared out, or what `open_accelerator` refuses.
    """
    accelerator = open_accelerator(config, model, directory)
    trainee = _trainee(model, config, accelerator)
    start, log = agreed(resume(directory, trainee)), Log(directory, accelerator)
    history = log.until(start)
    # In a shell, as accelerate changes the `forward` of what it is given.
    stepper, optimizer = accelerator.prepare(nn.Sequential(model), trainee.optimizer)
    with closing(log), _stoppable(accelerator) as stopped:
        for step in range(start, config.steps):
            torch.manual_seed(config.seed * 1_000_003 + step)
            try:
                losses = _update(accelerator, stepper, optimizer, batch(step), config, step, watched or model)
            except FloatingPointError:
                save(directory, step, trainee, config.keep)
                raise
            _average(trainee.ema, model, config.ema, step)
            done, stop = step + 1, stopped()
            if done % config.log_every == 0 or done == config.steps:
                history.append(log.write(done, losses, optimizer.param_groups[0]["lr"], config.batch_size))
            if done % config.checkpoint_every == 0 or done == config.steps or stop:
                save(directory, done, trainee, config.keep)
            if report:
                report(done, losses)
            if stop:
                raise Interrupted(f"Stopped after step {done} of {config.steps}; start the same command to go on.")
    with torch.no_grad():
        for name, value in trainee.ema.items():
            trainable(model)[name].copy_(value)
    return history


def _trainee(model: nn.Module, config: FitConfig, accelerator: Accelerator) -> Trainee:
    parameters = trainable(model)
    on_cpu = all(p.device.type == "cpu" for p in parameters.values())
    optimizer = torch.optim.AdamW(
        parameters.values(),
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        fused=on_cpu or None,  # On CPUs the default is one operation after another for every parameter.
    )
    ema = {name: p.detach().clone() for name, p in parameters.items()} if config.ema else {}
    return Trainee(model, optimizer, ema, accelerator.scaler, writes=accelerator.is_main_process)


def _update(
    accelerator: Accelerator,
    stepper: Any,
    optimizer: Any,
    batch: Any,
    config: FitConfig,
    step: int,
    watched: nn.Module,
) -> dict[str, float]:
    """One step; returns the losses, averaged over micro-batches and processes."""
    parts = shares(batch, accelerator.process_index, accelerator.num_processes, config.accumulation)
    shell, scaler = accelerator.unwrap_model(stepper), accelerator.scaler
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate * learning_rate_factor(step, config)
    optimizer.zero_grad()
    sums: dict[str, Tensor] = {}
    for number, part in enumerate(parts, 1):
        with nullcontext() if number == len(parts) else accelerator.no_sync(stepper):
            losses: dict[str, Tensor] = stepper(part)
            accelerator.backward(losses["loss"].float() / len(parts))
        sums = {name: sums.get(name, 0.0) + loss.detach().float() / len(parts) for name, loss in losses.items()}
    means = accelerator.reduce(torch.stack(list(sums.values())), "mean")  # a share that broke breaks the mean
    values: dict[str, float] = dict(zip(sums, means.tolist(), strict=True))
    check_losses(values, step, lambda: [shell(part) for part in parts], watched)
    norm = accelerator.clip_grad_norm_([p for p in stepper.parameters() if p.requires_grad], config.clip)
    if scaler is None or scaler.get_scale() < 1:  # above, float16's scaler skips such steps and halves its scale
        check_gradients(shell[0], norm, step)
    optimizer.step()
    return values


@torch.no_grad()
def _average(ema: dict[str, Tensor], model: nn.Module, decay: float, step: int) -> None:
    weight = 1 - min(decay, (1 + step) / (10 + step))  # a young average must not remember the start
    parameters = trainable(model)
    for name, value in ema.items():
        value.lerp_(parameters[name], weight)


@contextmanager
def _stoppable(accelerator: Accelerator) -> Iterator[Callable[[], bool]]:
    """Whether a SIGTERM came to any of the processes, so that all finish the same step; in the main thread only."""
    asked = threading.Event()

    def stopped() -> bool:
        if asked.is_set():
            accelerator.set_trigger()
        return bool(accelerator.check_trigger())

    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def ask(number: int, frame: FrameType | None) -> None:
        asked.set()

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGTERM, before)
