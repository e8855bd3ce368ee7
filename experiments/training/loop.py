"""fit: the only training loop.

    batch(step)  ->  this process's part, in micro-batches  ->  model(part) -> {"loss": …, terms…}  ->  backward
    ->  guard  ->  clip  ->  optimizer  ->  EMA  ->  log, checkpoint, callback

Everything random in a step is a function of (seed, step, process). A run that is killed and started again therefore
ends with the same weights as an undisturbed one, bit-identical on one CPU; two processes give the weights of one, up to
rounding, if the model itself draws nothing.
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

from experiments.config import FitConfig
from experiments.core.signals import Interrupted
from experiments.training.checkpoints import initial_state, resume, save
from experiments.training.guard import check_gradients, check_losses
from experiments.training.log import MetricsLog
from experiments.training.processes import agree_on_start, open_accelerator, split_batch
from experiments.training.schedule import learning_rate_factor
from experiments.training.state import TrainingState, trainable_parameters

LossCallback = Callable[[int, dict[str, float]], None]
"""Called after each step as (completed steps, losses by name)."""

StageCallback = Callable[[str, int, int, dict[str, float]], None]
"""Called after each step of a training in stages as (stage, completed steps, steps, losses by name)."""


def fit(
    model: nn.Module,
    batch: Callable[[int], Any],
    config: FitConfig,
    directory: Path,
    callback: LossCallback | None = None,
    *,
    watched: nn.Module | None = None,
) -> list[dict[str, float]]:
    """Train the parameters of `model` that require gradients, in place and on their device.

    SIGINT and SIGTERM end the training after the running step, whose state is saved; a second SIGINT ends it at once.

    Args:
        model: `model(batch) -> {"loss": scalar, …}`; the other entries are logged beside the loss.
        batch: step number -> the batch of that update, for all processes together: tensors, or tuples, lists or
            dictionaries of them, with the batch as the first axis. It must depend on the number and on torch's seeded
            generator alone.
        config: steps, rates and so on.
        directory: receives `checkpoints/` (resumed from if there are some) and `metrics.jsonl`.
        callback: called after each step, for progress, samples and the like.
        watched: the network whose layers are searched if a number is not finite; None: `model`.

    Returns:
        The logged metrics, one record per `log_every` steps.

    Raises:
        FloatingPointError: the loss or a gradient is not finite; the state from before that step is saved.
        Interrupted: a process received SIGINT or SIGTERM; the state after the last step is saved.
        ValueError: checkpoints of another model, a batch that cannot be divided, or what `open_accelerator` refuses.
    """
    accelerator = open_accelerator(config, model, directory)
    state = initial_state(model, config, accelerator.scaler, writes=accelerator.is_main_process)
    start = agree_on_start(resume(directory, state))
    log = MetricsLog(directory, accelerator)
    history = log.truncate(start)
    # The Sequential protects `model`: accelerate changes the `forward` of what it prepares.
    stepper, optimizer = accelerator.prepare(nn.Sequential(model), state.optimizer)
    with closing(log), _stop_requests(accelerator) as requested_signal:
        for step in range(start, config.steps):
            items = _draw_batch(batch, config.seed, step, accelerator.process_index)
            with _saved_on_failure(directory, step, state, config.keep):
                losses = _update(accelerator, stepper, optimizer, items, config, step, watched or model)
            _update_average(state.ema, model, config.ema, step)
            completed = step + 1
            stop = requested_signal()
            if _is_due(completed, config.log_every, config):
                history.append(log.write(completed, losses, optimizer.param_groups[0]["lr"], config.batch_size))
            saved = False
            if stop is not None or _is_due(completed, config.checkpoint_every, config):
                saved = save(directory, completed, state, config.keep)
            if callback:
                callback(completed, losses)
            if stop is not None:
                raise Interrupted(_stop_message(completed, config.steps, saved), stop)
    _apply_average(state.ema, model)
    return history


def _draw_batch(batch: Callable[[int], Any], seed: int, step: int, process: int) -> Any:
    """Draw the batch of a step, the same in every process, and seed what the model draws after it."""
    step_seed = seed * 1_000_003 + step
    torch.manual_seed(step_seed)
    items = batch(step)
    if process > 0:  # what the model draws for its part differs from what the others draw
        torch.manual_seed(step_seed * 4099 + process)
    return items


@contextmanager
def _saved_on_failure(directory: Path, step: int, state: TrainingState, keep: int) -> Iterator[None]:
    """Save the state from before a step whose numbers are not finite."""
    try:
        yield
    except FloatingPointError:
        save(directory, step, state, keep)
        raise


def _is_due(completed: int, every: int, config: FitConfig) -> bool:
    return completed % every == 0 or completed == config.steps


def _update(
    accelerator: Accelerator,
    stepper: Any,
    optimizer: Any,
    batch: Any,
    config: FitConfig,
    step: int,
    watched: nn.Module,
) -> dict[str, float]:
    """Run one step; returns the losses, averaged over micro-batches and processes."""
    parts = split_batch(batch, accelerator.process_index, accelerator.num_processes, config.accumulation)
    unwrapped = accelerator.unwrap_model(stepper)
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate * learning_rate_factor(step, config)
    optimizer.zero_grad()
    sums: dict[str, Tensor] = {}
    for number, part in enumerate(parts, 1):
        with nullcontext() if number == len(parts) else accelerator.no_sync(stepper):
            losses: dict[str, Tensor] = stepper(part)
            accelerator.backward(losses["loss"].float() / len(parts))
        sums = {name: sums.get(name, 0.0) + loss.detach().float() / len(parts) for name, loss in losses.items()}
    means = accelerator.reduce(torch.stack(list(sums.values())), "mean")  # not finite if one process's is not
    values: dict[str, float] = dict(zip(sums, means.tolist(), strict=True))
    check_losses(values, step, lambda: [unwrapped(part) for part in parts], watched)
    norm = accelerator.clip_grad_norm_([p for p in stepper.parameters() if p.requires_grad], config.clip)
    scaler = accelerator.scaler
    if scaler is None or scaler.get_scale() < 1:  # above, float16's scaler skips such steps and halves its scale
        check_gradients(unwrapped[0], norm, step)
    optimizer.step()
    return values


@torch.no_grad()
def _update_average(ema: dict[str, Tensor], model: nn.Module, decay: float, step: int) -> None:
    weight = 1 - min(decay, (1 + step) / (10 + step))  # early on, so that the initial values are soon forgotten
    parameters = trainable_parameters(model)
    for name, value in ema.items():
        value.lerp_(parameters[name], weight)


@torch.no_grad()
def _apply_average(ema: dict[str, Tensor], model: nn.Module) -> None:
    parameters = trainable_parameters(model)
    for name, value in ema.items():
        parameters[name].copy_(value)


def _stop_message(completed: int, steps: int, saved: bool) -> str:
    consequence = "Run the same command again to continue." if saved else "Its state could not be saved."
    return f"Stopped after step {completed} of {steps}. {consequence}"


@contextmanager
def _stop_requests(accelerator: Accelerator) -> Iterator[Callable[[], int | None]]:
    """Yield a function that returns the signal by which some process was asked to stop, or None.

    Signals are handled in the main thread only. All processes get the same answer, so that they finish the same step.
    """
    received: list[int] = []

    def requested_signal() -> int | None:
        if received:
            accelerator.set_trigger()
        if not accelerator.check_trigger():
            return None
        return received[0] if received else signal.SIGTERM

    if threading.current_thread() is not threading.main_thread():
        yield requested_signal
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    # A worker process that ignores SIGINT, because its parent handles it, keeps ignoring it.
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield requested_signal
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
