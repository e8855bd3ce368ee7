"""Training state on disk: one safetensors file, written atomically, never pickled."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def save_state(
    path: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, ema: Mapping[str, Tensor]
) -> None:
    """Write parameters, optimiser moments and EMA after `step` steps; a reader sees the old file or the new one."""
    tensors = {f"model/{name}": p.detach() for name, p in trainable(model).items()}
    tensors |= {f"ema/{name}": value for name, value in ema.items()}
    for name, slot, value in _moments(model, optimizer):
        tensors[f"optimizer/{slot}/{name}"] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, partial, metadata={"step": str(step)})
    os.replace(partial, path)


def load_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ema: dict[str, Tensor]) -> int:
    """Restore what `save_state` wrote, in place; returns the number of steps done.

    Raises:
        ValueError: the file is damaged or belongs to another model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in list(file.keys())}
    except SafetensorError as error:
        raise ValueError(
            f"Cannot resume from {path}: the file is damaged ({error}). Delete it to start again."
        ) from error
    parameters = trainable(model)
    expected, found = set(parameters), {k.removeprefix("model/") for k in tensors if k.startswith("model/")}
    if expected != found:
        raise ValueError(
            f"Cannot resume from {path}: it holds another model "
            f"({len(found - expected)} unknown and {len(expected - found)} missing parameters). "
            "Delete it to start again."
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"model/{name}"])
            if name in ema:
                ema[name].copy_(tensors[f"ema/{name}"])
    for key, value in tensors.items():
        kind, _, rest = key.partition("/")
        if kind == "optimizer":
            slot, _, name = rest.partition("/")
            parameter = parameters[name]
            optimizer.state[parameter][slot] = value if slot == "step" else value.to(parameter.device)
    return int(metadata["step"])


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, str, Tensor]]:
    for name, parameter in trainable(model).items():
        for slot, value in optimizer.state.get(parameter, {}).items():
            yield name, slot, value
