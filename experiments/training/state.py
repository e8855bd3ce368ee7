"""What training changes, as named tensors: parameters, optimizer moments, weight average, gradient scale."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that training changes, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@dataclass
class TrainingState:
    """What a checkpoint holds; `restore` puts it back in place.

    Attributes:
        model: its parameters that require gradients.
        optimizer: as `create_optimizer` returns it, not wrapped.
        ema: name -> averaged parameter; empty if there is no average.
        scaler: of float16 gradients, or None.
        writes: whether this process writes the checkpoints.
        start_time: when training began, on the clock of `time.perf_counter`; earlier runs of a resumed training count.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: dict[str, Tensor] = field(default_factory=dict)
    scaler: Any = None
    writes: bool = True
    start_time: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Seconds of training so far, in all runs."""
        return time.perf_counter() - self.start_time

    def tensors(self) -> dict[str, Tensor]:
        """Return everything by name, on the CPU."""
        tensors: dict[str, Tensor] = {f"model/{n}": p.detach() for n, p in trainable_parameters(self.model).items()}
        tensors |= {f"ema/{name}": value for name, value in self.ema.items()}
        for name, slot, value in self._moments():
            tensors[f"optimizer/{slot}/{name}"] = value
        if self.scaler is not None:
            state = self.scaler.state_dict()
            tensors |= {f"scaler/{key}": torch.tensor(float(value)) for key, value in state.items()}
        return {key: value.contiguous().cpu() for key, value in tensors.items()}

    def restore(self, tensors: Mapping[str, Tensor], path: Path) -> None:
        """Put everything back.

        Args:
            tensors: as `tensors` returned them.
            path: of the checkpoint, for messages.

        Raises:
            ValueError: the checkpoint is of another model, or only one of the two has a weight average.
        """
        parameters = trainable_parameters(self.model)
        destinations: dict[str, Tensor] = {f"model/{name}": p for name, p in parameters.items()}
        destinations |= {f"ema/{name}": value for name, value in self.ema.items()}
        stored = {key for key in tensors if key.startswith(("model/", "ema/"))}
        if set(destinations) != stored or any(tensors[k].shape != value.shape for k, value in destinations.items()):
            raise ValueError(
                f"Cannot resume from {path}: it holds another model, or `ema` was switched "
                f"({len(stored - set(destinations))} unknown and {len(set(destinations) - stored)} missing tensors, or "
                f"other shapes). Delete {path.parent} to start from the beginning."
            )
        with torch.no_grad():
            for key, destination in destinations.items():
                destination.copy_(tensors[key])
        scale = {}
        for key, value in tensors.items():
            kind, _, rest = key.partition("/")
            if kind == "optimizer":
                slot, _, name = rest.partition("/")
                parameter = parameters[name]
                if slot != "step":  # Moments have the strides of their parameter: a fused update needs the same order.
                    value = torch.empty_like(parameter, requires_grad=False).copy_(value)
                self.optimizer.state[parameter][slot] = value
            elif kind == "scaler":
                scale[rest] = float(value)
        if scale and self.scaler is not None:
            integers = {"growth_interval", "_growth_tracker"}
            self.scaler.load_state_dict({k: int(v) if k in integers else v for k, v in scale.items()})

    def _moments(self) -> Iterator[tuple[str, str, Tensor]]:
        for name, parameter in trainable_parameters(self.model).items():
            for slot, value in self.optimizer.state.get(parameter, {}).items():
                yield name, slot, value
