"""Estimate the peak memory of a computation without performing it."""

from __future__ import annotations

import math
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
from torch.utils.flop_counter import flop_registry, sdpa_flop_count, shape_wrapper


def count_attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object) -> int:
    """Count the floating-point operations of fused attention from the shapes of its arguments."""
    return int(sdpa_flop_count(query, key, value))


CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: count_attention_flops}
"""Fused attention on a CPU; torch itself counts only that on a GPU. A `custom_mapping` of `FlopCounterMode`."""

_FLOPS = {**flop_registry, **{operator: shape_wrapper(count) for operator, count in CPU_ATTENTION.items()}}


class AllocationCounter(TorchDispatchMode):
    """Counts the live bytes of tensors created inside, their peak, and floating-point operations.

    With fake tensors, which have shapes and no data, it takes seconds for a computation that would fill a machine.
    Memory that a library allocates inside an operator is not visible, except for convolutions on a CPU: oneDNN copies
    their input and weights into its own layouts (measured with torch 2.13: accurate within 5 %).

    Attributes:
        on_cpu: whether to count the copies of convolutions.
        live_bytes: bytes alive now.
        module_peaks: peak bytes while each module itself was running, by name; "" is outside of all modules.
        module_tensors: elements of the largest tensor that each module created, by name.
        flops: floating-point operations of matrix products, attention and convolutions.
    """

    def __init__(self, on_cpu: bool = False) -> None:
        super().__init__()
        self.on_cpu = on_cpu
        self.live_bytes = 0
        self.flops = 0
        self.module_peaks: dict[str, int] = {}
        self.module_tensors: dict[str, int] = {}
        self._running = [""]
        self._storages: set[int] = set()

    @property
    def peak_bytes(self) -> int:
        """Peak of the live bytes so far."""
        return max(self.module_peaks.values(), default=0)

    @property
    def largest_tensor(self) -> int:
        """Elements of the largest tensor created so far."""
        return max(self.module_tensors.values(), default=0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):  # half of all calls
            return args[0].fake_device
        kwargs = kwargs or {}
        self._register((args, kwargs), created=False)  # weights and inputs existed before
        result = func(*args, **kwargs)
        self._register(result, created=True)
        if self.on_cpu and func is torch.ops.aten.convolution.default:
            self._record(self.module_peaks, self.live_bytes + args[0].nbytes + args[1].nbytes)
        if func._overloadpacket in _FLOPS:
            self.flops += _FLOPS[func._overloadpacket](*args, **kwargs, out_val=result)
        return result

    def _register(self, tree: Any, created: bool) -> None:
        for tensor in (leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor)):
            storage = tensor.untyped_storage()
            key = storage._cdata
            size = storage.nbytes() if created else 0
            if key not in self._storages:
                self._storages.add(key)
                weakref.finalize(storage, self._release, key, size)
                self.live_bytes += size
                self._record(self.module_peaks, self.live_bytes)
                self._record(self.module_tensors, size // tensor.element_size())

    def _record(self, maxima: dict[str, int], value: int) -> None:
        module = self._running[-1]
        maxima[module] = max(maxima.get(module, 0), value)

    @contextmanager
    def by_module(self, network: nn.Module) -> Iterator[None]:
        """Attribute peaks to each module of `network` inside."""
        hooks = []
        for name, module in network.named_modules():
            hooks.append(module.register_forward_pre_hook(lambda *_, name=name: self._running.append(name)))
            hooks.append(module.register_forward_hook(lambda *_: (self._running.pop(), None)[1], always_call=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _release(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.live_bytes -= size


@torch.no_grad()
def estimate_memory(
    run: Callable[..., Any],
    network: nn.Module,
    *inputs: tuple[tuple[int, ...], torch.dtype],
    device: torch.device,
    on_cpu: bool | None = None,
) -> AllocationCounter:
    """Count what `run(*tensors)` would allocate for tensors of these shapes and dtypes, without computing it.

    Args:
        run: the computation.
        network: the network whose weights `run` uses.
        *inputs: (shape, dtype) of each tensor.
        device: where the tensors are.
        on_cpu: whether the computation will run on a CPU, whose convolutions copy; None: as `device` says.

    Cost: some seconds for a UNet; more for mixers that loop over more blocks of tokens.
    """
    counter = AllocationCounter(device.type == "cpu" if on_cpu is None else on_cpu)
    whole = nn.Module()
    whole.network = network
    whole.forward = run
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        weights: dict[str, Tensor] = {
            f"network.{name}": mode.from_tensor(weight) for name, weight in network.named_parameters()
        }
        tensors = tuple(torch.empty(shape, dtype=dtype, device=device) for shape, dtype in inputs)
        with counter, reuse_identical_blocks(network, counter), counter.by_module(network):
            result = torch.func.functional_call(whole, weights, tensors)
        del result
    return counter


@contextmanager
def reuse_identical_blocks(network: nn.Module, counter: AllocationCounter) -> Iterator[None]:
    """Run only the first of identical transformer blocks inside; the others reuse its measurement."""
    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList) and len(module) > 1]
    stacks = [blocks for blocks in lists if isinstance(blocks[0], BasicTransformerBlock) and _all_identical(blocks)]
    hooks = []
    previous = [(block, vars(block).get("forward")) for _, *others in stacks for block in others]
    try:
        for first, *others in stacks:
            flops = [0]
            hooks += [
                first.register_forward_pre_hook(lambda *_, flops=flops: flops.__setitem__(0, counter.flops)),
                first.register_forward_hook(lambda *_, flops=flops: flops.__setitem__(0, counter.flops - flops[0])),
            ]
            for other in others:
                other.forward = partial(_reuse_measurement, counter, flops)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for block, forward in previous:
            vars(block).pop("forward", None)
            if forward is not None:  # of hooks: diffusers and accelerate replace the method of the instance
                vars(block)["forward"] = forward


def format_bytes(count: int, *, round_up: bool = False) -> str:
    """Format bytes with three digits and a binary unit.

    Args:
        count: bytes.
        round_up: round upwards, so that a budget copied from the text is enough.
    """
    power = min(4, int(math.log(max(count, 1), 1024)))
    value = count / 1024**power
    places = max(0, 2 - int(math.log10(max(value, 1))))
    value = math.ceil(value * 10**places) / 10**places if round_up else round(value, places)
    return f"{value:.{places}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def _reuse_measurement(counter: AllocationCounter, flops: list[int], x: Tensor, *_: Any, **__: Any) -> Tensor:
    counter.flops += flops[0]
    return torch.empty_like(x)


def _all_identical(blocks: nn.ModuleList) -> bool:
    """Return whether all blocks have the same modules and the same shapes of weights."""
    kinds = set()
    for block in blocks:
        modules = tuple((name, type(module)) for name, module in block.named_modules())
        shapes = tuple((name, parameter.shape) for name, parameter in block.named_parameters())
        kinds.add((modules, shapes))
    return len(kinds) == 1
