"""Promises that one part of the input does not affect another: batch items, heads."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mixers.mixer import TokenMixer
from mixers.streams import with_values
from mixers.testing.inputs import CheckInputs, run_mixer
from mixers.testing.tolerances import assert_close


def check_batch_items_are_independent(mixer: TokenMixer, inputs: CheckInputs) -> None:
    """An item's output does not depend on the other items of the batch."""
    for length in inputs.lengths:
        x = inputs.tokens(mixer, length, batch=3)
        y = run_mixer(mixer, x)[1:2]
        assert_close(y, run_mixer(mixer, x[1:2]), what=f"an item in a batch against alone, l = {length}")


def check_empty_batch(mixer: TokenMixer, inputs: CheckInputs) -> None:
    """An empty batch gives an empty output and a gradient of zeros for every parameter."""
    x = inputs.tokens(mixer, max(inputs.lengths), batch=1)[:0]
    y = run_mixer(mixer, x)
    assert y.shape == x.shape, f"an empty batch gives {tuple(y.shape)}, expected {tuple(x.shape)}"
    gradients = torch.autograd.grad(y.sum(), list(mixer.parameters()), allow_unused=True, materialize_grads=True)
    assert not any(gradient.any() for gradient in gradients), "an empty batch gives gradients other than zero"


def check_heads_are_independent_in_values(mixer: TokenMixer, inputs: CheckInputs) -> None:
    """Before the output stage, a head's values affect no other head."""
    for length in inputs.lengths:
        streams = inputs.streams(mixer, length)
        v = streams.v.clone()
        v[:, :, 0] += 1
        before = mixer.mix(streams)
        after = mixer.mix(with_values(streams, v))
        assert_close(after[:, :, 1:], before[:, :, 1:], what="other heads when the first head's values change")


def check_heads_are_independent_in_queries(mixer: TokenMixer, inputs: CheckInputs) -> None:
    """Before the output stage, the queries of a head, or of a group that shares them, affect no other head."""
    _check_heads(mixer, inputs, "q", "queries")


def check_heads_are_independent_in_keys(mixer: TokenMixer, inputs: CheckInputs) -> None:
    """Before the output stage, the keys of a head, or of a group that shares them, affect no other head."""
    _check_heads(mixer, inputs, "k", "keys")


def _check_heads(mixer: TokenMixer, inputs: CheckInputs, stream: str, what: str) -> None:
    for length in inputs.lengths:
        streams = inputs.streams(mixer, length)
        changed: Tensor = getattr(streams, stream).clone()
        group = (changed == changed[:, :, :1]).all(-1).all(1).all(0)  # (h,): heads that share those of the first
        changed[:, :, group] += torch.linspace(0.3, 0.7, changed.shape[-1], dtype=changed.dtype)
        before = mixer.mix(streams)
        after = mixer.mix(replace(streams, q=changed) if stream == "q" else replace(streams, k=changed))
        assert_close(after[:, :, ~group], before[:, :, ~group], what=f"other heads when the first head's {what} change")
