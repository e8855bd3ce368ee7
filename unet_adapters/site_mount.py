"""One mixer in one attention layer: put in and taken out in place."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from mixers import TokenMixer
from unet_adapters.mounted_layer import MountedLayer
from unet_adapters.projections import TeacherProjection, swap_in, swap_out
from unet_adapters.sites import Site
from unet_adapters.student_weights import MIXER


class SiteMount:
    """What `mount` puts in a layer, and what `unmount` puts back.

    Attributes:
        site: the site.
        layer: the attention layer. A reference, not a name: peers such as AnimateDiff's FreeNoise wrap modules, which
            changes their names.
        mixer: the mixer.
        mounted_class: the class of the layer while the mixer is in it.
        holders: the student's own projections by name; empty if the teacher's are used.
    """

    def __init__(
        self,
        site: Site,
        layer: nn.Module,
        mixer: TokenMixer,
        mounted_class: type[MountedLayer],
        holders: Mapping[str, nn.Module],
    ) -> None:
        self.site = site
        self.layer = layer
        self.mixer = mixer
        self.mounted_class = mounted_class
        self.holders = dict(holders)
        self._originals: dict[str, TeacherProjection] = {}

    @property
    def is_mounted(self) -> bool:
        """Whether this mixer is in the layer now."""
        return self.layer._modules.get(MIXER) is self.mixer

    def follow(self, dtype: torch.dtype | None) -> None:
        """Move the mixer and the student's projections to the device of the layer, and to `dtype` unless it is None.

        The layers of one model may be on different devices (`device_map`).
        """
        device = next(self.layer.parameters()).device
        for module in (self.mixer, *self.holders.values()):
            tensors = [*module.parameters(), *module.buffers()]
            if any(t.device != device or (t.is_floating_point() and t.dtype != (dtype or t.dtype)) for t in tensors):
                module.to(device=device, dtype=dtype)

    def mount(self, min_tokens: int) -> None:
        """Change the layer's class, add the mixer, and exchange the Parameter objects of the projections."""
        self.layer.__class__ = self.mounted_class
        assert isinstance(self.layer, MountedLayer)
        self.layer.add_module(MIXER, self.mixer.train(self.layer.training))
        for name, holder in self.holders.items():
            self._originals[name] = swap_in(self.layer, name, holder)
        self.layer.teacher_bytes = sum(map(_bytes, self._originals.values()))
        if min_tokens:
            self.layer.mixer_from = min_tokens
            self.layer.teacher = dict(self._originals)

    def unmount(self) -> None:
        """Give the layer its own class and Parameter objects back; also after a `mount` that failed halfway."""
        for name, original in self._originals.items():
            swap_out(self.layer, name, self.holders[name], original)
        self._originals.clear()
        self.layer._modules.pop(MIXER, None)
        for name in ("mixer_from", "teacher", "teacher_bytes"):
            vars(self.layer).pop(name, None)
        self.layer.__class__ = self.mounted_class.stock_class


def _bytes(projection: TeacherProjection) -> int:
    parameters = projection.parameters() if isinstance(projection, nn.Module) else projection.values()
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)
