"""Promises about cost, compilation and long sequences."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mixers.mixer import TokenMixer
from mixers.testing.inputs import CheckInputs, grid_of, run_mixer, small_blocks, with_option
from mixers.testing.tolerances import assert_close

LONG = 1021
MANY = 2**20


def check_flops(mixer: TokenMixer, inputs: CheckInputs) -> None:
    """`flops` equals torch's count of the matrix products and convolutions of a forward pass, with wider values too."""
    for expand in (mixer.config.expand, 2 * mixer.config.expand):
        try:
            config = dataclasses.replace(mixer.config, expand=expand)
        except ValueError:  # the widths of queries and values have to be equal
            continue
        subject = type(mixer)(config, mixer.dim, mixer.heads).double()
        x = inputs.tokens(subject, 128, batch=1)
        # torch does not count the fused attention of a CPU.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            run_mixer(subject, x)
        counted = counter.get_total_flops()
        promised = subject.flops(128)
        what = f"torch counts {counted:,} at 128 tokens with expand={expand}"
        assert abs(counted - promised) <= 0.01 * counted, f"{what}, `flops` is {promised:,}"


def check_costs_grow_as_promised(mixer: TokenMixer, inputs: CheckInputs) -> None:
    """flops grow linearly if and only if the trait says so; the state of a linear mixer does not grow."""
    near = mixer.mixing_flops(1024)
    far = mixer.mixing_flops(4096)
    assert near >= 0 and mixer.flops(1024) > 0 and mixer.state_size(1024) >= 0
    assert (far <= 4.01 * near) == mixer.traits.linear, f"4 times the tokens cost {far / near:.2f} times as much"
    grows = mixer.state_size(4096) != mixer.state_size(1024)
    assert grows != mixer.traits.linear, f"linear={mixer.traits.linear}, and the state grows: {grows}"


def check_compiles_once(mixer: TokenMixer, inputs: CheckInputs) -> None:
    """torch.compile gives one graph that equals eager mode, gradients included, and also runs at a second length."""
    torch._dynamo.reset()
    compilations = 0

    def count(graph: Any, example: Any) -> Any:
        nonlocal compilations
        compilations += 1
        return graph

    # The sides of a grid are plain numbers, dynamic only by `dynamic`, which must not include eps and other floats.
    compiled = torch.compile(mixer, fullgraph=True, backend=count, dynamic=mixer.traits.needs_grid or None)
    for length in (66, 140):
        x = inputs.tokens(mixer, length)
        grid = grid_of(mixer, length)
        first = x.clone().requires_grad_()
        second = x.clone().requires_grad_()
        torch._dynamo.mark_dynamic(first, 1)
        with torch._dynamo.config.patch(specialize_float=True):
            fast = compiled(first, grid=grid)
        eager = mixer(second, grid=grid)
        assert_close(fast, eager, what=f"compiled against eager at l = {length}")
        (actual,) = torch.autograd.grad(fast.square().sum(), first)
        (expected,) = torch.autograd.grad(eager.square().sum(), second)
        assert_close(actual, expected, what=f"gradient compiled against eager at l = {length}")
    assert compilations == 1, f"two lengths took {compilations} compilations"


def check_long_sequences(mixer: TokenMixer, inputs: CheckInputs) -> None:
    """With 1,021 tokens in small blocks, chunked gives the output and gradient of recurrent."""
    x = inputs.tokens(mixer, LONG, batch=1).requires_grad_()
    outcomes = []
    for backend in ("chunked", "recurrent"):
        with small_blocks(1 << 10):
            y = run_mixer(with_option(mixer, backend=backend), x)
            outcomes.append((y, *torch.autograd.grad(y.square().sum(), x)))
    for what, actual, expected in zip(("output", "gradient"), *outcomes, strict=True):
        assert_close(actual, expected, what=f"{what} in blocks against the recurrence, l = {LONG}")


def check_a_million_tokens(mixer: TokenMixer, inputs: CheckInputs) -> None:
    """Outputs are finite in half precision at 2²⁰ tokens: in float16 if normalized or normed, otherwise in bfloat16."""
    width = 4 if mixer.traits.needs_grid else 2  # a rotation in two dimensions needs 4 channels per head
    small = type(mixer)(mixer.config, width * mixer.heads, mixer.heads)
    dtype = torch.float16 if mixer.traits.normalized or mixer.config.norm else torch.bfloat16
    small = small.to(dtype).requires_grad_(False)
    y = run_mixer(small, inputs.tokens(small, MANY, batch=1))
    assert y.isfinite().all(), f"{int((~y.isfinite()).sum())} of {y.numel()} values are not finite in {dtype}"
