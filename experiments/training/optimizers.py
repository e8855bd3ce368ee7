"""The optimizers of `fit`: AdamW, or Muon for the weights of layers with AdamW for the rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from experiments.config import FitConfig
from experiments.training.state import trainable_parameters

_COEFFICIENTS = (3.4445, -4.775, 2.0315)  # of a quintic that drives singular values to about 1 in few iterations
_ITERATIONS = 5
_SMALLEST = 16  # rows and columns below which a weight counts as an output layer, whose rows are few and unlike


class Muon(torch.optim.Optimizer):
    """Momentum, replaced by the nearest orthogonal matrix (Jordan et al. 2024), for matrices and convolutions.

    Updates are scaled to the root mean square of AdamW's (2502.16982), 0.2 · √max(rows, columns), so that its learning
    rate fits. A convolution (o, i, h, w) is a matrix (o, i·h·w). `torch.optim.Muon` does the same for matrices alone.

    Args:
        parameters: of two axes or more.
        lr: learning rate.
        weight_decay: decoupled.
        momentum: of the average of gradients, which the newest one enters once more (Nesterov).
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0, momentum: float = 0.95
    ) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient; there is no closure."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                average = state.setdefault("momentum_buffer", torch.zeros_like(parameter))
                average.lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonalize(parameter.grad.lerp(average, group["momentum"]).flatten(1))
                scale = 0.2 * math.sqrt(max(update.shape))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.view(parameter.shape), alpha=-group["lr"] * scale)


def orthogonalize(matrix: Tensor) -> Tensor:
    """Return about the nearest matrix (m, n) with singular values of 1, by Newton-Schulz iterations in bfloat16."""
    a, b, c = _COEFFICIENTS
    wide = matrix.shape[0] <= matrix.shape[1]
    x = (matrix if wide else matrix.T).bfloat16()
    x = x / (x.norm() + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.T).to(matrix.dtype).contiguous()


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for some parameters and AdamW for the others, as one optimizer with one state.

    Args:
        matrices: Muon's.
        others: AdamW's.
        lr: learning rate.
        weight_decay: decoupled, of all parameters.
        fused: of AdamW.
    """

    def __init__(
        self,
        matrices: list[nn.Parameter],
        others: list[nn.Parameter],
        lr: float,
        weight_decay: float,
        fused: bool | None = None,
    ) -> None:
        super().__init__([*matrices, *others], {"lr": lr, "weight_decay": weight_decay})
        self._parts: list[torch.optim.Optimizer] = []
        if matrices:
            self._parts.append(Muon(matrices, lr, weight_decay))
        if others:
            self._parts.append(torch.optim.AdamW(others, lr=lr, weight_decay=weight_decay, fused=fused))
        for part in self._parts:
            part.state = self.state
        self.param_groups = [group for part in self._parts for group in part.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters; there is no closure."""
        for part in self._parts:
            part.step()


def create_optimizer(model: nn.Module, config: FitConfig) -> torch.optim.Optimizer:
    """Return the optimizer of a training's configuration for the parameters of `model` that require gradients.

    With `"muon"`, Muon updates the weights of linear and convolutional layers of at least 16 rows and columns.
    """
    parameters = trainable_parameters(model)
    on_cpu = all(p.device.type == "cpu" for p in parameters.values())
    options: dict[str, Any] = {
        "lr": config.learning_rate,
        "weight_decay": config.weight_decay,
        "fused": on_cpu or None,  # On CPUs the default is one operation after another for every parameter.
    }
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters.values(), **options)
    layers = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d)}
    is_matrix = {n: id(p) in layers and min(len(p), p[0].numel()) >= _SMALLEST for n, p in parameters.items()}
    matrices = [p for name, p in parameters.items() if is_matrix[name]]
    others = [p for name, p in parameters.items() if not is_matrix[name]]
    return MuonWithAdamW(matrices, others, **options)
