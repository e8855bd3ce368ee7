"""What diffusion transformers on square patches have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, ClassVar

from diffusers.models.attention_processor import Attention
from torch import nn
from torch.utils.hooks import RemovableHandle

from unet_adapters.attention import MixerAttention, check_attention
from unet_adapters.hosts.base import GridSource, Host
from unet_adapters.hosts.grids import measure_image, pass_grid
from unet_adapters.mounted_layer import GridSize, MountedLayer
from unet_adapters.sites import Site


class PatchTransformerHost(Host):
    """A transformer whose sites all mix the same tokens: patches of `patch_size` × `patch_size` latent pixels.

    Attributes:
        attention_kwargs: the argument of the model's forward that reaches the attention layers.
        rotary: whether they rotate queries and keys.
    """

    attention_kwargs: ClassVar[str]
    rotary: ClassVar[bool] = False

    def sites(self) -> list[Site]:
        """Every layer of `_self_attentions`; a site's group is its block."""
        return [
            Site(
                name,
                int(layer.query_dim),
                int(layer.heads),
                group=name.rpartition(".")[0],
                text=layer.added_kv_proj_dim is not None,
                rotary=self.rotary,
                qk_norm=layer.norm_q is not None,
            )
            for name, layer in self._self_attentions()
        ]

    @abstractmethod
    def _self_attentions(self) -> Iterator[tuple[str, Any]]:
        """Name and layer of every self-attention, over image tokens alone or with text beside them."""

    def mounted_class(self, layer: nn.Module) -> type[MountedLayer] | None:
        """`MixerAttention` for diffusers' own `Attention`."""
        return MixerAttention if type(layer) is Attention else None

    def check_layer(self, site: Site, layer: Any) -> None:
        """See `attention.check_attention`."""
        check_attention(site, layer)

    def attach_grid(self, layers: Iterable[nn.Module]) -> list[RemovableHandle]:
        """The model adds the grid to the keyword arguments of its attention layers."""
        if not list(layers):
            return []
        attentions = [module for module in self.model.modules() if isinstance(module, Attention)]
        return pass_grid(self.model, self._measure, self.attention_kwargs, attentions)

    def grid_source(self, site_name: str) -> GridSource | None:
        """The model itself."""
        return GridSource("", self._measure)

    def tokens_at(self, site: Site, size: tuple[int, int]) -> int | None:
        """Patches of the latents."""
        side = self.model.config.patch_size
        return (size[0] // side) * (size[1] // side)

    def latent_shape(self, size: tuple[int, int], batch: int = 1) -> tuple[int, ...]:
        """(b, c, height, width)."""
        return (batch, self.model.config.in_channels, *size)

    @property
    def _measure(self) -> Any:
        return partial(measure_patches, patch_size=int(self.model.config.patch_size))


def measure_patches(args: tuple[Any, ...], kwargs: dict[str, Any], patch_size: int) -> GridSize | None:
    """(height, width) in patches of the latents that a model is called with."""
    size = measure_image(args, kwargs)
    return None if size is None else (size[0] // patch_size, size[1] // patch_size)
