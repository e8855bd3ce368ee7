"""Inner models of test-time training: small networks whose weights take one gradient step on the keys and values.

An inner model f maps the keys of a head to its values. Its weights start from learned ones, W₀, and are trained on all
tokens of an image at once,

    W = W₀ − rate · clip(∂ℓ/∂W₀),    ℓ = (scale / l) Σ_j ½‖f(k_j) − v_j‖²  or  −(scale / l) Σ_j f(k_j)·v_j,

and the queries pass through the trained model: y_i = f_W(q_i). The gradients are written out, so that an outer backward
pass differentiates plain matrix products. Tensors are (b, h, l, ·), in float32 at least.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixers.image_grid import ImageGrid

InnerLoss = Literal["dot", "mse"]
"""The loss that the inner model is trained on: products of f(k) with v, or half of the squared error."""


@dataclass(frozen=True)
class InnerStep:
    """The gradient step of an inner model.

    Attributes:
        loss: `dot` or `mse`.
        rate: learning rate.
        scale: factor of the loss, before the mean over tokens.
        clip: divide every column g of a gradient by ‖g‖ + 1, as ViT³ does.
    """

    loss: InnerLoss
    rate: float
    scale: float
    clip: bool

    def error(self, predicted: Tensor, v: Tensor) -> Tensor:
        """Return ∂ℓ/∂f(k_j), (b, h, l, v), for predictions and values of the same shape."""
        return (predicted - v if self.loss == "mse" else -v) * (self.scale / v.shape[-2])

    def update(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """Return the weights after the step, (b, h, in, out)."""
        if self.clip:
            gradient = gradient / (gradient.norm(dim=-2, keepdim=True) + 1)
        return weight - self.rate * gradient

    def products(self, q: Tensor, k: Tensor, gradient: Tensor) -> Tensor:
        """Return how q_i meets a change of the gradient along k_j, with the step's factor, for every column.

        A value v_j changes column c of a gradient along k_j, and the step along P_c k_j, where P_c is the derivative of
        the clipping: 1 / (n + 1) − g gᵀ / (n (n + 1)²) for a column g of norm n.

        Args:
            q: (b, h, l, in).
            k: (b, h, l, in).
            gradient: (b, h, in, out).

        Returns:
            rate · scale / l · q_iᵀ P_c k_j: (b, h, out, l, l), or (b, h, 1, l, l) without clipping.
        """
        plain = (q @ k.mT * (self.rate * self.scale / k.shape[-2]))[:, :, None]
        if not self.clip:
            return plain
        norm = gradient.norm(dim=-2)[..., None, None]  # (b, h, out, 1, 1)
        along = (q @ gradient).mT[..., None] * (k @ gradient).mT[..., None, :]
        along = along * (self.rate * self.scale / k.shape[-2])
        return plain / (norm + 1) - along / (norm.clamp_min(torch.finfo(q.dtype).tiny) * (norm + 1) ** 2)


class InnerModel(nn.Module):
    """Base of the inner models.

    Args:
        heads: number of heads h.
        key_dim: k, channels of queries and keys.
        value_dim: v, channels of values.
    """

    def __init__(self, heads: int, key_dim: int, value_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.key_dim = key_dim
        self.value_dim = value_dim

    def forward(self, q: Tensor, k: Tensor, v: Tensor, step: InnerStep) -> Tensor:
        """Train on k and v, and apply the trained model to q: (b, h, l, v)."""
        raise NotImplementedError

    def derivative(self, q: Tensor, k: Tensor, v: Tensor, step: InnerStep) -> Tensor:
        """Return ∂y_ic / ∂v_jc, the derivative within each value channel: (b, h, v, l, l). Costs O(l²·v) memory."""
        raise NotImplementedError

    def flops(self, length: int, step: InnerStep) -> int:
        """Return the operations of a forward pass of all heads."""
        raise NotImplementedError

    def _train(self, gradients: tuple[Tensor, ...], step: InnerStep) -> list[Tensor]:
        """Return all weights after the step, in the order in which the model creates them."""
        return [step.update(w.to(g.dtype), g) for w, g in zip(self.parameters(), gradients, strict=True)]


class LinearModel(InnerModel):
    """f(k) = k W, for which the step is linear attention: y = q W₀ + rate · scale / l · q Kᵀ (V − K W₀).

    With the loss `dot` without K W₀. Parameters: `w1` (h, k, v).
    """

    def __init__(self, heads: int, key_dim: int, value_dim: int) -> None:
        super().__init__(heads, key_dim, value_dim)
        self.w1 = _initial_weight(heads, key_dim, value_dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, step: InnerStep) -> Tensor:
        """Train on k and v, and apply the trained model to q: (b, h, l, v)."""
        (weight,) = self._train((self._gradient(k, v, step),), step)
        return q @ weight

    def values_part(self, q: Tensor, k: Tensor, v: Tensor, step: InnerStep) -> Tensor:
        """Return the part that is linear in the values, without clipping: rate · scale / l · q (Kᵀ V)."""
        return q @ (k.mT @ v * (step.rate * step.scale / k.shape[-2]))

    def offset(self, q: Tensor, k: Tensor, step: InnerStep) -> Tensor:
        """Return what does not depend on the values, the result for values of zero: (b, h, l, v)."""
        weight = self.w1.to(q.dtype)
        if step.loss == "mse":
            weight = weight - (step.rate * step.scale / k.shape[-2]) * (k.mT @ k) @ weight
        return q @ weight

    def derivative(self, q: Tensor, k: Tensor, v: Tensor, step: InnerStep) -> Tensor:
        """Return ∂y_ic / ∂v_jc, which without clipping does not depend on the values."""
        products = step.products(q, k, self._gradient(k, v, step))
        return products.expand(-1, -1, self.value_dim, -1, -1)

    def flops(self, length: int, step: InnerStep) -> int:
        """Return the operations of two products, of K W₀ in the loss `mse`, and of the offset if it is separate."""
        product = 2 * length * self.key_dim * self.value_dim
        if step.clip:
            return self.heads * product * (3 if step.loss == "mse" else 2)
        gram = 2 * length * self.key_dim**2 + 2 * self.key_dim**2 * self.value_dim
        return self.heads * (3 * product + (gram if step.loss == "mse" else 0))

    def _gradient(self, k: Tensor, v: Tensor, step: InnerStep) -> Tensor:
        predicted = k @ self.w1.to(k.dtype) if step.loss == "mse" else v
        return k.mT @ step.error(predicted, v)


class SwiGLUModel(InnerModel):
    """f(k) = (k W₁) ⊙ SiLU(k W₂): ViT³'s SwiGLU without an output layer. Parameters: `w1` and `w2` (h, k, v)."""

    def __init__(self, heads: int, key_dim: int, value_dim: int) -> None:
        super().__init__(heads, key_dim, value_dim)
        self.w1 = _initial_weight(heads, key_dim, value_dim)
        self.w2 = _initial_weight(heads, key_dim, value_dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, step: InnerStep) -> Tensor:
        """Train on k and v, and apply the trained model to q: (b, h, l, v)."""
        first, second = self._train(self._gradients(k, v, step), step)
        return (q @ first) * F.silu(q @ second)

    def derivative(self, q: Tensor, k: Tensor, v: Tensor, step: InnerStep) -> Tensor:
        """Return ∂y_ic / ∂v_jc: two linear attentions, each with a gate on its queries and one on its keys."""
        gradients = self._gradients(k, v, step)
        first, second = self._train(gradients, step)
        products = [step.products(q, k, gradient) for gradient in gradients]
        value = q @ first
        gate = q @ second
        key_value = k @ self.w1.to(q.dtype)
        key_gate = k @ self.w2.to(q.dtype)
        return (
            _channels_first(F.silu(gate))[..., None] * products[0] * _channels_first(F.silu(key_gate))[..., None, :]
            + _channels_first(value * _silu_slope(gate))[..., None]
            * products[1]
            * _channels_first(key_value * _silu_slope(key_gate))[..., None, :]
        )

    def flops(self, length: int, step: InnerStep) -> int:
        """Return the operations of six products: two on the keys, two gradients, two on the queries."""
        return self.heads * 12 * length * self.key_dim * self.value_dim

    def _gradients(self, k: Tensor, v: Tensor, step: InnerStep) -> tuple[Tensor, Tensor]:
        value = k @ self.w1.to(k.dtype)
        gate = k @ self.w2.to(k.dtype)
        activated = F.silu(gate)
        error = step.error(value * activated, v)
        return k.mT @ (error * activated), k.mT @ (error * value * _silu_slope(gate))


class MLPModel(InnerModel):
    """f(k) = SiLU(k W₁) W₂ with k channels inside, as in T⁵. Parameters: `w1` (h, k, k) and `w2` (h, k, v)."""

    def __init__(self, heads: int, key_dim: int, value_dim: int) -> None:
        super().__init__(heads, key_dim, value_dim)
        self.w1 = _initial_weight(heads, key_dim, key_dim)
        self.w2 = _initial_weight(heads, key_dim, value_dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, step: InnerStep) -> Tensor:
        """Train on k and v, and apply the trained model to q: (b, h, l, v)."""
        first, second = self._train(self._gradients(k, v, step), step)
        return F.silu(q @ first) @ second

    def derivative(self, q: Tensor, k: Tensor, v: Tensor, step: InnerStep) -> Tensor:
        """Return ∂y_ic / ∂v_jc: linear attention on the hidden layer, and one per hidden channel on the keys."""
        gradients = self._gradients(k, v, step)
        start = self.w2.to(q.dtype)
        first, second = self._train(gradients, step)
        hidden = q @ first
        key_hidden = k @ self.w1.to(q.dtype)
        through_second = step.products(F.silu(hidden), F.silu(key_hidden), gradients[1])
        through_first = step.products(q, k, gradients[0])
        through_first = (
            _channels_first(_silu_slope(hidden))[..., None]
            * through_first
            * _channels_first(_silu_slope(key_hidden))[..., None, :]
        )
        return through_second + torch.einsum("bhmij,bhmc,hmc->bhcij", through_first, second, start)

    def flops(self, length: int, step: InnerStep) -> int:
        """Return the operations of six products, and with the loss `mse` of the prediction."""
        square = 2 * length * self.key_dim**2
        product = 2 * length * self.key_dim * self.value_dim
        return self.heads * (3 * square + (4 if step.loss == "mse" else 3) * product)

    def _gradients(self, k: Tensor, v: Tensor, step: InnerStep) -> tuple[Tensor, Tensor]:
        second = self.w2.to(k.dtype)
        hidden = k @ self.w1.to(k.dtype)
        activated = F.silu(hidden)
        error = step.error(activated @ second if step.loss == "mse" else v, v)
        return k.mT @ (error @ second.mT * _silu_slope(hidden)), activated.mT @ error


class ConvolutionModel(nn.Module):
    """f(k) = a 3 × 3 depthwise convolution of the image: ViT³'s second inner model, for one head more.

    Trained with the loss `dot`. Within a channel it is a linear inner model on the nine neighbors of a token.
    Parameters: `w3` (k, 9), the weights of a (k, 1, 3, 3) convolution.

    Args:
        channels: k, channels of the head.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.w3 = _initial_weight(channels, 9)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, grid: ImageGrid, step: InnerStep) -> Tensor:
        """Train on k and v, and apply the trained model to q, (b, l, k) each: (b, l, k)."""
        q = _neighbors(q, grid)
        k = _neighbors(k, grid)
        weight = step.update(self.w3.to(q.dtype)[..., None], self._gradient(k, v, step))
        return (q @ weight).squeeze(-1).mT

    def values_part(self, q: Tensor, k: Tensor, v: Tensor, grid: ImageGrid, step: InnerStep) -> Tensor:
        """Return the part that is linear in the values, without clipping: (b, l, k)."""
        change = self._gradient(_neighbors(k, grid), v, step) * -step.rate
        return (_neighbors(q, grid) @ change).squeeze(-1).mT

    def offset(self, q: Tensor, grid: ImageGrid) -> Tensor:
        """Return what does not depend on the values, the convolution of q before training: (b, l, k)."""
        return (_neighbors(q, grid) @ self.w3.to(q.dtype)[..., None]).squeeze(-1).mT

    def derivative(self, q: Tensor, k: Tensor, v: Tensor, grid: ImageGrid, step: InnerStep) -> Tensor:
        """Return ∂y_ic / ∂v_jc: (b, k, l, l)."""
        q = _neighbors(q, grid)
        k = _neighbors(k, grid)
        return step.products(q, k, self._gradient(k, v, step)).squeeze(2)

    def flops(self, length: int, separate_offset: bool) -> int:
        """Return the operations of the gradient and of the convolution of q, and of the offset if it is separate."""
        return 18 * length * self.channels * (3 if separate_offset else 2)

    def _gradient(self, k: Tensor, v: Tensor, step: InnerStep) -> Tensor:
        """Return the gradient (b, k, 9, 1) for neighbors (b, k, l, 9) and values (b, l, k)."""
        return k.mT @ v.mT[..., None] * (-step.scale / v.shape[1])


def _initial_weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=0.02))


def _silu_slope(x: Tensor) -> Tensor:
    sigmoid = x.sigmoid()
    return sigmoid * (1 + x * (1 - sigmoid))


def _channels_first(x: Tensor) -> Tensor:
    """(b, h, l, c) -> (b, h, c, l)."""
    return x.mT


def _neighbors(x: Tensor, grid: ImageGrid) -> Tensor:
    """Return the 3 × 3 neighbors of every token, zeros outside the image: (b, l, c) -> (b, c, l, 9)."""
    batch, length, channels = x.shape
    image = x.mT.reshape(batch, channels, *grid)
    return F.unfold(image, 3, padding=1).view(batch, channels, 9, length).mT


INNER_MODELS: dict[str, Callable[[int, int, int], InnerModel]] = {
    "linear": LinearModel,
    "swiglu": SwiGLUModel,
    "mlp": MLPModel,
}
"""The inner models by name, as functions of (heads, key channels, value channels)."""
