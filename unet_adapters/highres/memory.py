"""How much memory a computation needs at its peak, found without doing it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry


class Allocations(TorchDispatchMode):
    """Counts the bytes of the tensors alive that were made inside, and the most there ever were.

    On fake tensors, which have shapes and no data, it tells what a computation would need that fills a machine, in
    seconds. What a library allocates for itself inside an operator is not seen, but for convolutions on a CPU: oneDNN
    copies their input and their weights into layouts of its own (measured with torch 2.13: to within 5 %).

    Attributes:
        on_cpu: whether convolutions make these copies.
        alive: bytes now.
        peaks: the most bytes so far while each module was at work itself, by name; "" is outside of all.
        tensors: elements of the largest tensor that each made, likewise.
        flops: floating-point operations of matrix products and convolutions.
    """

    def __init__(self, on_cpu: bool = False) -> None:
        super().__init__()
        self.on_cpu = on_cpu
        self.alive = self.flops = 0
        self.peaks: dict[str, int] = {}
        self.tensors: dict[str, int] = {}
        self._at_work = [""]
        self._known: set[int] = set()

    @property
    def peak(self) -> int:
        """The most bytes so far."""
        return max(self.peaks.values(), default=0)

    @property
    def largest(self) -> int:
        """Elements of the largest tensor that was made so far."""
        return max(self.tensors.values(), default=0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):  # half of all calls
            return args[0].fake_device
        kwargs = kwargs or {}
        self._see((args, kwargs), ours=False)  # weights and inputs were there before
        result = func(*args, **kwargs)
        self._see(result, ours=True)
        if self.on_cpu and func is torch.ops.aten.convolution.default:
            self._note(self.peaks, self.alive + args[0].nbytes + args[1].nbytes)
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **kwargs, out_val=result)
        return result

    def _see(self, tree: Any, ours: bool) -> None:
        for tensor in (leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor)):
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes() if ours else 0
            if key not in self._known:
                self._known.add(key)
                weakref.finalize(storage, self._free, key, size)
                self.alive += size
                self._note(self.peaks, self.alive)
                self._note(self.tensors, size // tensor.element_size())

    def _note(self, most: dict[str, int], size: int) -> None:
        most[self._at_work[-1]] = max(most.get(self._at_work[-1], 0), size)

    @contextmanager
    def by_module(self, network: nn.Module) -> Iterator[None]:
        """Inside, peaks are kept for each module of `network`."""
        hooks = []
        for name, module in network.named_modules():
            hooks.append(module.register_forward_pre_hook(lambda *_, name=name: self._at_work.append(name)))
            hooks.append(module.register_forward_hook(lambda *_: (self._at_work.pop(), None)[1], always_call=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


@torch.no_grad()
def foresee(
    run: Callable[..., Any],
    network: nn.Module,
    *inputs: tuple[tuple[int, ...], torch.dtype],
    device: torch.device,
    on_cpu: bool | None = None,
) -> Allocations:
    """What `run(*tensors)` would allocate for tensors of these shapes and dtypes; nothing is computed.

    Args:
        network: whose weights `run` uses.
        on_cpu: whether a CPU will do the work, whose convolutions copy; None: as `device` says.

    Cost: some seconds for a UNet, the more the more blocks of tokens its mixers go through.
    """
    counted, whole = Allocations(device.type == "cpu" if on_cpu is None else on_cpu), nn.Module()
    whole.network, whole.forward = network, run
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        weights: dict[str, Tensor] = {
            f"network.{name}": mode.from_tensor(weight) for name, weight in network.named_parameters()
        }
        tensors = tuple(torch.empty(shape, dtype=dtype, device=device) for shape, dtype in inputs)
        with counted, one_of_each(network, counted), counted.by_module(network):
            result = torch.func.functional_call(whole, weights, tensors)
        del result
    return counted


@contextmanager
def one_of_each(network: nn.Module, counted: Allocations) -> Iterator[None]:
    """Transformer blocks that follow one that is alike are not gone through inside: they need what that one needed."""
    lists = [m for m in network.modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    stacks = [m for m in lists if isinstance(m[0], BasicTransformerBlock) and _all_alike(m)]
    hooks = []
    try:
        for first, *others in stacks:
            flops = [0]
            hooks += [
                first.register_forward_pre_hook(lambda *_, flops=flops: flops.__setitem__(0, counted.flops)),
                first.register_forward_hook(lambda *_, flops=flops: flops.__setitem__(0, counted.flops - flops[0])),
            ]
            for other in others:
                other.forward = partial(_instead, counted, flops)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for stack in stacks:
            for other in list(stack)[1:]:
                other.__dict__.pop("forward", None)


def _instead(counted: Allocations, flops: list[int], x: Tensor, *_: Any, **__: Any) -> Tensor:
    counted.flops += flops[0]
    return torch.empty_like(x)


def _all_alike(stack: nn.ModuleList) -> bool:
    """Whether modules are made of the same parts, to the shape of every weight."""
    kinds = {
        (*((n, type(m)) for n, m in module.named_modules()), *((n, p.shape) for n, p in module.named_parameters()))
        for module in stack
    }
    return len(kinds) == 1
