"""How much memory a computation needs at its peak, found without doing it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode


class Allocations(TorchDispatchMode):
    """Counts the bytes of the tensors alive that were made inside, and the most there ever were.

    On fake tensors, which have shapes and no data, it tells what a computation would need that fills a machine, in
    seconds. What a library allocates for itself inside an operator is not seen.

    Attributes:
        alive: bytes now.
        peak: the most bytes so far.
        largest: elements of the largest tensor so far.
        flops: floating-point operations of matrix products and convolutions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = self.largest = self.flops = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self._see((args, kwargs), ours=False)  # weights and inputs were there before
        result = func(*args, **(kwargs or {}))
        self._see(result, ours=True)
        return result

    def _see(self, tree: Any, ours: bool) -> None:
        for tensor in (leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor)):
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes() if ours else 0
            if key not in self._known:
                self._known.add(key)
                weakref.finalize(storage, self._free, key, size)
                self.alive += size
                self.peak = max(self.peak, self.alive)
            self.largest = max(self.largest, storage.nbytes() // tensor.element_size())

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


@torch.no_grad()
def foresee(run: Callable[..., Any], *inputs: tuple[tuple[int, ...], torch.dtype], device: torch.device) -> Allocations:
    """What `run(*tensors)` would allocate for tensors of these shapes and dtypes; nothing is computed.

    Cost: a second or so for a UNet, whatever the size, besides loops over chunks.
    """
    counted = Allocations()
    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as flops:
        tensors = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in inputs]
        with counted:
            result = run(*tensors)
        del result
    counted.flops = flops.get_total_flops()
    return counted
