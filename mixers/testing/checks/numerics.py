"""Promises about precision and gradients."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from mixers.mixer import TokenMixer
from mixers.testing.inputs import CheckInputs, run_mixer, with_norm
from mixers.testing.tolerances import TOLERANCES, assert_close


def check_half_precision(mixer: TokenMixer, inputs: CheckInputs) -> None:
    """float16 and bfloat16 stay near float64, except for a few tokens whose float64 output is unstable as well.

    A feature map that can be zero (relu) makes it unstable: a query near zero sees a token or nothing.
    """
    x = inputs.tokens(mixer, max(inputs.lengths))
    truth = run_mixer(mixer, x)
    for dtype in (torch.bfloat16, torch.float16):
        half = run_mixer(copy.deepcopy(mixer).to(dtype), x.to(dtype))
        allowed = TOLERANCES[dtype].absolute + TOLERANCES[dtype].relative * truth.abs().max()
        deviates = (half.double() - truth).abs().amax(-1) > allowed
        are_few = 0 < deviates.sum() <= 2 + deviates.numel() // 10
        compared = ~deviates | _is_stable(mixer, x, truth, dtype) if are_few else torch.ones_like(deviates)
        assert_close(half[compared], truth[compared], dtype, what=f"output in {dtype}")


def _is_stable(mixer: TokenMixer, x: Tensor, truth: Tensor, dtype: torch.dtype) -> Tensor:
    """(b, l): whether the output changes by at most twice the tolerance if tokens change by a few roundings."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
    step = 4 * torch.finfo(dtype).eps * noise
    change = torch.stack([(run_mixer(mixer, x + sign * step) - truth).abs().amax(-1) for sign in (1, -1)]).amax(0)
    return change <= 2 * TOLERANCES[dtype].relative * truth.abs().max()


def check_extreme_inputs(mixer: TokenMixer, inputs: CheckInputs) -> None:
    """Outputs are finite in half precision for large, tiny, zero and constant tokens, and no gradient is NaN.

    float16 only if the result is normalized, or with a norm: other products of large tokens may exceed float16.
    """
    x = inputs.tokens(mixer, max(inputs.lengths))
    cases = {"30 times as large": 30 * x, "tiny": 1e-6 * x, "zero": 0 * x, "all the same": x[:, :1].expand_as(x)}
    bounded = mixer if mixer.traits.normalized else with_norm(mixer)
    for dtype, subject in ((torch.bfloat16, mixer), (torch.float16, bounded)):
        half = copy.deepcopy(subject).to(dtype)
        for what, tokens in cases.items():
            tokens = tokens.to(dtype).detach().requires_grad_()
            y = run_mixer(half, tokens)
            assert y.isfinite().all(), f"not finite in {dtype} for inputs {what}"
            gradients = torch.autograd.grad(y.float().mean(), [tokens, *half.parameters()], allow_unused=True)
            for name, gradient in zip(["x", *(n for n, _ in half.named_parameters())], gradients, strict=True):
                if gradient is not None:
                    assert not gradient.isnan().any(), f"the gradient of {name} is NaN in {dtype}, inputs {what}"


def check_gradients(mixer: TokenMixer, inputs: CheckInputs) -> None:
    """Every parameter gets a finite gradient, and gradcheck agrees with finite differences in random directions."""
    mixer = copy.deepcopy(mixer)
    x = inputs.tokens(mixer, 4, batch=1).requires_grad_()
    run_mixer(mixer, x).square().sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None, f"{name} gets no gradient"
        assert parameter.grad.isfinite().all(), f"the gradient of {name} is not finite"
    assert torch.autograd.gradcheck(lambda t: run_mixer(mixer, t), (x.detach().requires_grad_(),), fast_mode=True)


def check_gradients_per_sample(mixer: TokenMixer, inputs: CheckInputs) -> None:
    """torch.func's vmap(grad(…)) over a batch equals the gradients computed sample by sample."""
    x = inputs.tokens(mixer, 5, batch=3)
    parameters = {name: parameter.detach() for name, parameter in mixer.named_parameters()}

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(_Runner(mixer), _prefixed(parameters), (sample[None],)).square().sum()

    together = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i, sample in enumerate(x):
        total = run_mixer(mixer, sample[None]).square().sum()
        gradients = torch.autograd.grad(total, list(mixer.parameters()), allow_unused=True, materialize_grads=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            assert_close(together[name][i], gradient, what=f"gradient of {name} for sample {i}")


class _Runner(torch.nn.Module):
    """A mixer that is passed the grid it needs."""

    def __init__(self, mixer: TokenMixer) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor) -> Tensor:
        return run_mixer(self.mixer, x)


def _prefixed(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"mixer.{name}": parameter for name, parameter in parameters.items()}
