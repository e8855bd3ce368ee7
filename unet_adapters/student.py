"""The trainable weights of an adapter: one tree of modules, named as in the UNet, apart from the UNet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from unet_adapters.sites import Site

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
MIXER = "mixer"


class Student(nn.Module):
    """All trainable weights of an adapter, mounted or not: `parameters()` is what an optimizer needs.

    The names of its state dict are those of the mounted UNet: `<site>.mixer.*`, and, where projections are trained,
    `<site>.to_q.weight` and so on. A module on the way to a site has no other content.
    """

    def place(self, path: str, module: nn.Module) -> None:
        """Put `module` at the dotted `path`, making the modules on the way."""
        parent: nn.Module = self
        *way, last = path.split(".")
        for name in way:
            if name not in parent._modules:
                parent.add_module(name, nn.Module())
            parent = parent.get_submodule(name)
        parent.add_module(last, module)

    def projection(self, site: str, name: str) -> nn.Module | None:
        """The trained Parameters of one projection of one site; None where the teacher's are used."""
        try:
            return self.get_submodule(f"{site}.{name}")
        except AttributeError:
            return None


def base_layer(layer: nn.Module) -> nn.Module:
    """The layer itself, or the one that a LoRA wraps."""
    unwrap = getattr(layer, "get_base_layer", None)
    return layer if unwrap is None else unwrap()


def copy_projections(attn: nn.Module, site: Site) -> dict[str, nn.Module]:
    """Trainable copies of the Parameters of a site's projections, by projection name.

    Raises:
        ValueError: a weight is not floating point (quantized), so that it cannot be trained.
    """
    copies = {}
    for name in PROJECTIONS:
        holder = nn.Module()
        for key, parameter in base_layer(attn.get_submodule(name)).named_parameters(recurse=False):
            if not parameter.dtype.is_floating_point or parameter.dtype.itemsize < 2:
                raise ValueError(
                    f"{site.name}.{name}.{key} is stored as {parameter.dtype} and cannot be trained: "
                    "build with train_projections=False"
                )
            holder.register_parameter(key, nn.Parameter(parameter.detach().clone()))
        copies[name] = holder
    return copies


def swap_in(layer: nn.Module, holder: nn.Module) -> dict[str, nn.Parameter]:
    """Put the holder's Parameter objects on `layer`; returns the layer's own, to be put back by `swap_out`."""
    originals = dict(base_layer(layer).named_parameters(recurse=False))
    for key, parameter in holder.named_parameters(recurse=False):
        base_layer(layer)._parameters[key] = parameter
    return originals


def swap_out(layer: nn.Module, holder: nn.Module, originals: dict[str, nn.Parameter]) -> None:
    """Put the original Parameter objects back, where the layer has been moved to meanwhile.

    A Parameter object that replaced the student's while it was mounted (by a conversion, say) becomes the student's.
    """
    base = base_layer(layer)
    for key, original in originals.items():
        current = base._parameters[key]
        assert current is not None
        holder._parameters[key] = current
        if (current.device, current.dtype) != (original.device, original.dtype):
            original.data = original.data.to(current.device, current.dtype)
        base._parameters[key] = original


@contextmanager
def teacher_projections(attn: nn.Module, teacher: Mapping[str, Mapping[str, nn.Parameter]]) -> Iterator[None]:
    """The teacher's Parameter objects inside, what was there again on exit; `teacher`: projection -> its Parameters."""
    layers = {name: base_layer(attn.get_submodule(name)) for name in teacher}
    students = {name: dict(layer._parameters) for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            for key, original in teacher[name].items():
                current = layer._parameters[key]
                if current is not None and (current.device, current.dtype) != (original.device, original.dtype):
                    original.data = original.data.to(current.device, current.dtype)
                layer._parameters[key] = original
        yield
    finally:
        for name, layer in layers.items():
            layer._parameters.update(students[name])


def follow(student: nn.Module, reference: Tensor, dtype: torch.dtype | None) -> None:
    """Move a student to the device of its host, and to `dtype` if the host's has changed (None: it has not)."""
    if any(p.device != reference.device or (dtype is not None and p.dtype != dtype) for p in student.parameters()):
        student.to(device=reference.device, dtype=dtype)
