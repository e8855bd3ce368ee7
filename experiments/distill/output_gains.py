"""One gain per site and head, by least squares, so that no student starts at another scale than the teacher.

For the same input tokens, let t_h be head h of the teacher's site and s_h that of the student's, both just before the
output projection. The gain g_h = ⟨s_h, t_h⟩ / ⟨s_h, s_h⟩ minimizes ‖g_h·s_h − t_h‖² over all tokens of some batches. A
student that differs from the teacher by a factor per head thus starts with error 0, and softmax attention gets 1.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from experiments.distill.loss import autocast
from experiments.teacher.teacher import Batch, Teacher
from unet_adapters import MixerAdapter
from unet_adapters.capture import capture_sites, replay

_log = logging.getLogger(__name__)


@torch.no_grad()
def fit_output_gains(teacher: Teacher, adapter: MixerAdapter, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Fit the gains of an adapter built with `output_gain=True`; leaves it unmounted and its gains as they were.

    Costs one forward pass of the teacher, and one of each site alone, per batch.

    Args:
        teacher: whose heads are matched.
        adapter: the student, before its training.
        batches: of `draw_batch`.

    Returns:
        By site: (h,) float32. A head whose output is zero, or not finite, gets 1; the latter is logged.
    """
    products: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    for batch in batches:
        batch = {name: value.to(teacher.denoiser.device) for name, value in batch.items()}
        noisy = teacher.scheduler.add_noise(batch["latents"], batch["noise"], batch["timesteps"])
        names = [site.name for site in adapter.sites]
        with autocast(teacher), _unit_gains(adapter):
            adapter.unmount()
            with _capture_heads(teacher.denoiser, adapter) as targets, capture_sites(teacher.denoiser, names) as calls:
                teacher.predict(noisy, batch["timesteps"], batch)
            adapter.mount()
            for name, call in calls.items():
                if call.tokens < adapter.min_tokens:
                    continue  # the site stays softmax at this size
                with _capture_heads(teacher.denoiser, adapter) as heads:
                    replay(teacher.denoiser, name, call)
                start = call.text_tokens or 0
                student_heads = heads[name][:, start:]
                target_heads = targets[name][:, start:]
                products[name] = products.get(name, 0) + (student_heads * target_heads).sum((0, 1, 3))
                squares[name] = squares.get(name, 0) + student_heads.square().sum((0, 1, 3))
            adapter.unmount()
    return {name: _solve(name, products[name], squares[name]) for name in products}


def apply_output_gains(adapter: MixerAdapter, gains: Mapping[str, Tensor]) -> None:
    """Copy gains (h,), by site, into the mixers' buffers; sites without an entry keep theirs."""
    for name, gain in gains.items():
        _buffer(adapter, name).copy_(gain)


def _solve(name: str, product: Tensor, square: Tensor) -> Tensor:
    gains = product / square
    usable = gains.isfinite()
    if not bool((usable | (square == 0)).all()):
        _log.warning("%s: the outputs of some heads are not finite before training, so they are not scaled.", name)
    return torch.where(usable, gains, 1.0).float().cpu()


def _buffer(adapter: MixerAdapter, site: str) -> Tensor:
    gain = adapter.mixers[site].output_gain
    if gain is None:
        raise ValueError(f"The mixer at {site} has no output gain: build the adapter with output_gain=True.")
    return gain


def _record_output(hook: Callable[..., None], module: nn.Module, _: tuple[Any, ...], output: Tensor) -> None:
    hook(module, (output,))


@contextmanager
def _unit_gains(adapter: MixerAdapter) -> Iterator[None]:
    """Set all gains to 1 inside the block."""
    previous = {name: _buffer(adapter, name).clone() for name in adapter.mixers}
    for name in previous:
        _buffer(adapter, name).fill_(1.0)
    try:
        yield
    finally:
        apply_output_gains(adapter, previous)


@contextmanager
def _capture_heads(unet: nn.Module, adapter: MixerAdapter) -> Iterator[dict[str, Tensor]]:
    """Record the inputs of the sites' output projections, as heads (b, l, h, v) in float64, by site.

    Of a layer without such a projection (Flux's single blocks), its output.
    """
    heads: dict[str, Tensor] = {}

    def record(name: str, count: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
            heads[name] = arguments[0].double().unflatten(-1, (count, -1))

        return hook

    handles = []
    for site in adapter.sites:
        attention: Any = unet.get_submodule(site.name)
        hook = record(site.name, site.heads)
        if not hasattr(attention, "to_out"):
            handles.append(attention.register_forward_hook(partial(_record_output, hook)))
            continue
        layer = attention.to_out[0] if isinstance(attention.to_out, nn.ModuleList) else attention.to_out
        handles.append(layer.register_forward_pre_hook(hook))
    try:
        yield heads
    finally:
        for handle in handles:
            handle.remove()
