"""Promises about precision, gradients, cost and compilation."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mixers.mixer import TokenMixer
from mixers.testing.inputs import Inputs, grid_of, run
from mixers.testing.tolerances import TOLERANCES, assert_close

MANY = 2**20


def check_half_precision(mixer: TokenMixer, inputs: Inputs) -> None:
    """float16 and bfloat16 stay near float64, but for a few tokens whose output in float64 jumps as well.

    Where a feature map can be zero (relu), a query near zero sees a token or nothing.
    """
    x = inputs.tokens(mixer, max(inputs.lengths))
    truth = run(mixer, x)
    for dtype in (torch.bfloat16, torch.float16):
        half = run(copy.deepcopy(mixer).to(dtype), x.to(dtype))
        allowed = TOLERANCES[dtype].absolute + TOLERANCES[dtype].relative * truth.abs().max()
        off = (half.double() - truth).abs().amax(-1) > allowed
        few = 0 < off.sum() <= 2 + off.numel() // 10
        near = ~off | _steady(mixer, x, truth, dtype) if few else torch.ones_like(off)
        assert_close(half[near], truth[near], dtype, what=f"output in {dtype}")


def _steady(mixer: TokenMixer, x: Tensor, truth: Tensor, dtype: torch.dtype) -> Tensor:
    """(b, l): whether an output stays where it is, to twice the tolerance, when tokens move by a few roundings."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
    step = 4 * torch.finfo(dtype).eps * noise
    moved = torch.stack([(run(mixer, x + sign * step) - truth).abs().amax(-1) for sign in (1, -1)]).amax(0)
    return moved <= 2 * TOLERANCES[dtype].relative * truth.abs().max()


def check_extreme_inputs(mixer: TokenMixer, inputs: Inputs) -> None:
    """Finite in half precision for large, tiny, zero and constant tokens, and no gradient is NaN.

    float16 where the result is normalized or normed, bfloat16 elsewhere too: unnormalized products of large tokens may
    rightly pass what float16 holds.
    """
    x = inputs.tokens(mixer, max(inputs.lengths))
    cases = {"30 times as large": 30 * x, "tiny": 1e-6 * x, "zero": 0 * x, "all the same": x[:, :1].expand_as(x)}
    bounded = mixer.traits.normalized or mixer.config.norm
    for dtype in (torch.bfloat16, torch.float16) if bounded else (torch.bfloat16,):
        half = copy.deepcopy(mixer).to(dtype)
        for what, extreme in cases.items():
            chosen = extreme.to(dtype).detach().requires_grad_()
            y = run(half, chosen)
            assert y.isfinite().all(), f"not finite in {dtype} for inputs {what}"
            gradients = torch.autograd.grad(y.float().mean(), [chosen, *half.parameters()], allow_unused=True)
            for name, gradient in zip(["x", *(n for n, _ in half.named_parameters())], gradients, strict=True):
                if gradient is not None:
                    assert not gradient.isnan().any(), f"the gradient of {name} is NaN in {dtype}, inputs {what}"


def check_gradients(mixer: TokenMixer, inputs: Inputs) -> None:
    """Every parameter gets a finite gradient, and gradcheck agrees with finite differences."""
    mixer = copy.deepcopy(mixer)
    x = inputs.tokens(mixer, 4, batch=1).requires_grad_()
    run(mixer, x).square().sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None, f"{name} gets no gradient"
        assert parameter.grad.isfinite().all(), f"the gradient of {name} is not finite"
    assert torch.autograd.gradcheck(lambda t: run(mixer, t), (x.detach().requires_grad_(),))


def check_flops(mixer: TokenMixer, inputs: Inputs) -> None:
    """`flops` is what torch counts of the matrix products and convolutions of a forward."""
    x = inputs.tokens(mixer, 128, batch=1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run(mixer, x)
    counted, told = counter.get_total_flops(), mixer.flops(128)
    assert abs(counted - told) <= 0.01 * counted, f"torch counts {counted:,} at 128 tokens, the mixer tells {told:,}"


def check_costs_grow_as_told(mixer: TokenMixer, inputs: Inputs) -> None:
    """flops grow linearly exactly where the trait says so; the state of a linear mixer does not grow."""
    near, far = mixer.mixing_flops(1024), mixer.mixing_flops(4096)
    assert near >= 0 and mixer.flops(1024) > 0 and mixer.state_size(1024) >= 0
    assert (far <= 4.01 * near) == mixer.traits.linear, f"4 times the tokens cost {far / near:.2f} times as much"
    assert (mixer.state_size(4096) == mixer.state_size(1024)) == mixer.traits.linear, "the state grows, or does not"


def check_compiles_once(mixer: TokenMixer, inputs: Inputs) -> None:
    """torch.compile gives a whole graph that equals eager, gradients too, and serves a second length as it is."""
    torch._dynamo.reset()
    compilations = 0

    def counted(graph: Any, example: Any) -> Any:
        nonlocal compilations
        compilations += 1
        return graph

    # The sides of a grid are plain numbers, dynamic by `dynamic` alone, which eps and other floats are kept out of.
    compiled = torch.compile(mixer, fullgraph=True, backend=counted, dynamic=mixer.traits.needs_grid or None)
    for length in (66, 140):
        x, grid = inputs.tokens(mixer, length), grid_of(mixer, length)
        first, second = x.clone().requires_grad_(), x.clone().requires_grad_()
        torch._dynamo.mark_dynamic(first, 1)
        with torch._dynamo.config.patch(specialize_float=True):
            fast = compiled(first, grid=grid)
        eager = mixer(second, grid=grid)
        assert_close(fast, eager, what=f"compiled against eager at l = {length}")
        (got,) = torch.autograd.grad(fast.square().sum(), first)
        (wanted,) = torch.autograd.grad(eager.square().sum(), second)
        assert_close(got, wanted, what=f"gradient compiled against eager at l = {length}")
    assert compilations == 1, f"two lengths took {compilations} compilations"


def check_a_million_tokens(mixer: TokenMixer, inputs: Inputs) -> None:
    """Finite in half precision at 2²⁰ tokens: float16 where normalized, else bfloat16, as sums may pass float16."""
    small = type(mixer)(mixer.config, 2 * mixer.heads, mixer.heads)
    dtype = torch.float16 if mixer.traits.normalized else torch.bfloat16
    small = small.to(dtype).requires_grad_(False)
    y = run(small, inputs.tokens(small, MANY, batch=1))
    assert y.isfinite().all(), f"{int((~y.isfinite()).sum())} of {y.numel()} values are not finite in {dtype}"
