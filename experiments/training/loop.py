"""fit: the only training loop.

    model(batch(step)) -> {"loss": …, terms…}  ->  backward  ->  clip  ->  AdamW  ->  EMA  ->  state on disk

Everything random in a step is seeded by (seed, step), so a run that is killed and started again
gives the same weights, to the last bit on one CPU, as one that was not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from experiments.training.state import load_state, save_state, trainable

Report = Callable[[int, dict[str, float]], None]


class FitConfig(BaseModel):
    """How to train. A step is one optimiser update."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(gt=0)
    batch_size: int = Field(gt=0)
    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(0.0, ge=0)
    warmup: int = Field(50, ge=0, description="steps of linear warm-up; then cosine decay to a tenth of the rate")
    clip: float = Field(1.0, gt=0, description="largest gradient norm")
    ema: float = Field(0.0, ge=0, lt=1, description="decay of the weight average that is kept at the end; 0: none")
    checkpoint_every: int = Field(100, gt=0)
    log_every: int = Field(10, gt=0)
    seed: int = 0


def learning_rate_factor(step: int, config: FitConfig) -> float:
    """Share of the learning rate at `step`: linear warm-up, then a cosine from 1 to 0.1."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    done = min(1.0, max(0, step - config.warmup) / max(1, config.steps - config.warmup))
    return warm * (0.55 + 0.45 * math.cos(math.pi * done))


def fit(
    model: nn.Module,
    batch: Callable[[int], Any],
    config: FitConfig,
    directory: Path,
    report: Report | None = None,
) -> list[dict[str, float]]:
    """Train the parameters of `model` that require gradients; the trained values are left in `model`.

    Args:
        model: `model(batch) -> {"loss": scalar, …}`; the other entries are logged beside the loss.
        batch: step number -> the batch; must depend on nothing but the number (and torch's seeded RNG).
        config: steps, rates and so on.
        directory: receives `state.safetensors` (resumed from where it exists) and `metrics.jsonl`.
        report: called after each step with its number and losses, for a progress display.

    Returns:
        The logged metrics, one record per `log_every` steps.

    Raises:
        FloatingPointError: the loss is not finite; the state on disk is the last good one.
        ValueError: the state on disk belongs to another model or is damaged.
    """
    accelerator = Accelerator()
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=config.learning_rate, weight_decay=config.weight_decay)
    state, log = directory / "state.safetensors", directory / "metrics.jsonl"
    ema = {n: p.detach().clone() for n, p in trainable(model).items()} if config.ema else {}
    start = load_state(state, model, optimizer, ema) if state.exists() else 0
    history = [r for r in _read(log) if r["step"] <= start]
    directory.mkdir(parents=True, exist_ok=True)
    log.write_text("".join(json.dumps(r) + "\n" for r in history))
    stepper, prepared = accelerator.prepare(model, optimizer)
    for step in range(start, config.steps):
        torch.manual_seed(config.seed * 1_000_003 + step)
        losses = _update(accelerator, stepper, prepared, batch(step), config, step)
        _average(ema, model, config.ema, step)
        done = step + 1
        if done % config.log_every == 0 or done == config.steps:
            history.append({"step": done, **losses})
            with log.open("a") as file:
                file.write(json.dumps(history[-1]) + "\n")
        if done % config.checkpoint_every == 0 or done == config.steps:
            save_state(state, done, model, optimizer, ema)
        if report:
            report(done, losses)
    with torch.no_grad():
        for name, value in ema.items():
            trainable(model)[name].copy_(value)
    return history


def pick(step: int, config: FitConfig, total: int) -> Tensor:
    """Indices of the batch of `step`: a function of the seed and the step alone."""
    generator = torch.Generator().manual_seed(config.seed * 7_000_003 + step)
    return torch.randint(0, total, (config.batch_size,), generator=generator)


def _update(
    accelerator: Accelerator, model: Any, optimizer: Any, batch: Any, config: FitConfig, step: int
) -> dict[str, float]:
    losses: dict[str, Tensor] = model(batch)
    values = {name: float(value.detach()) for name, value in losses.items()}
    if not math.isfinite(values["loss"]):
        raise FloatingPointError(
            f"Training stopped at step {step}: the loss is not finite ({values}). The state saved before it is "
            "intact; lower the learning rate, or look for the term that broke first."
        )
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate * learning_rate_factor(step, config)
    optimizer.zero_grad()
    accelerator.backward(losses["loss"])
    accelerator.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], config.clip)
    optimizer.step()
    return values


@torch.no_grad()
def _average(ema: dict[str, Tensor], model: nn.Module, decay: float, step: int) -> None:
    weight = 1 - min(decay, (1 + step) / (10 + step))  # a young average must not remember the start
    for name, value in ema.items():
        value.lerp_(trainable(model)[name], weight)


def _read(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
