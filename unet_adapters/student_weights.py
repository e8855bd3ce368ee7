"""The trainable weights of an adapter: one tree of modules, named as in the mounted model, apart from the model."""

from __future__ import annotations

from torch import nn

MIXER = "mixer"


class StudentWeights(nn.Module):
    """All trainable weights of an adapter, mounted or not: `parameters()` is what an optimizer needs.

    The names of its state dict are those of the mounted model: `<site>.mixer.*`, and, where projections are trained,
    `<site>.to_q.weight` and so on. A module on the way to a site has no other content.
    """

    def add_at(self, path: str, module: nn.Module) -> None:
        """Put `module` at the dotted `path`, making the modules on the way."""
        parent: nn.Module = self
        *parents, last = path.split(".")
        for name in parents:
            if name not in parent._modules:
                parent.add_module(name, nn.Module())
            parent = parent.get_submodule(name)
        parent.add_module(last, module)
