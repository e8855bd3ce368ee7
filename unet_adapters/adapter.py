"""`MixerAdapter`: mixers for the self-attention of a UNet, put in and taken out in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.utils.hooks import RemovableHandle

from mixers import TokenMixer
from unet_adapters import checkpoint, hub, linfusion
from unet_adapters.attention import MixerAttention
from unet_adapters.checkpoint import Recipe
from unet_adapters.checks import check_host, check_no_lora, check_not_fused, check_site
from unet_adapters.grid import PLACE as GRID
from unet_adapters.grid import tell_grids
from unet_adapters.sites import Select, Site, find_sites, resolve_unet
from unet_adapters.stamp import stamp, unstamp
from unet_adapters.status import SiteStatus, Status, tokens_at
from unet_adapters.student import MIXER, PROJECTIONS, Student, copy_projections, follow, swap_in, swap_out


class MixerAdapter:
    """A student of a UNet: one mixer per site, and (by default) trainable copies of the sites' projections.

    Mounting changes the class of each attention layer in place, adds the mixer as its child `mixer` and swaps the
    Parameter objects of its projections; unmounting puts the same objects back, so that the UNet is again the
    teacher to the last bit, whatever was trained. Adapters on different sites of one UNet can be mounted together.

    Freeze the UNet (`requires_grad_(False)`, or peft's `add_adapter`) while unmounted: mounted, its parameters include
    the student's. With gradient checkpointing, which runs forward again, call `backward` before the UNet is mounted or
    unmounted.

    While mounted, `unet.state_dict()` has the student's weights and the extra names `<site>.mixer.*`: save with
    `save_pretrained`, and unmount around whatever copies a UNet strictly.

    Attributes:
        sites: the layers it stands in for.
        student: a module with all trainable weights and nothing else; hand its `parameters()` to an optimizer. It
            is the same object, with the same names, mounted or not.
        mixers: the mixer of each site, by site name.
    """

    def __init__(
        self,
        unet: nn.Module,
        sites: list[Site],
        recipes: dict[str, Recipe],
        train_projections: bool,
        min_tokens: int = 0,
    ):
        self.unet = unet
        self.sites = sites
        self.min_tokens = min_tokens
        self._names = {site.name: recipes[site.name].mixer for site in sites}
        self.mixers: dict[str, TokenMixer] = {site.name: recipes[site.name].make(site) for site in sites}
        self.train_projections = train_projections
        self.student = Student()
        self._originals: dict[tuple[str, str], dict[str, nn.Parameter]] = {}
        self._hooks: list[RemovableHandle] = []
        for site in sites:
            attn = self._layer(site)
            self.student.place(f"{site.name}.{MIXER}", self.mixers[site.name])
            for name, holder in copy_projections(attn, site).items() if train_projections else ():
                self.student.place(f"{site.name}.{name}", holder)
        self._dtype = _host_dtype(unet)
        self._pixels = 8  # a side of a latent's place in pixels, as of Stable Diffusion's autoencoders
        self.student.to(device=next(unet.parameters()).device, dtype=self._dtype).requires_grad_(True)

    @classmethod
    def build(
        cls,
        unet_or_pipe: Any,
        mixer_name: str,
        select: Select = "all",
        *,
        causality: str | None = None,
        normalize: bool | None = None,
        train_projections: bool = True,
        min_tokens: int = 0,
        **options: Any,
    ) -> MixerAdapter:
        """Make an adapter for a UNet; nothing of the UNet is changed, and nothing is mounted.

        Args:
            unet_or_pipe: a diffusers UNet, or a pipeline with one.
            mixer_name: as listed by `mixers.list_mixers()`.
            select: which sites, see `find_sites`; the others stay softmax attention (a hybrid).
            causality, normalize: None for the mixer's published default.
            train_projections: give the student its own copies of the q, k, v and output projections, which start
                from the teacher's values. False: the teacher's projections are used, and not trained.
            min_tokens: where a site is called with fewer tokens, it is the teacher's softmax attention, which is faster
                there; decided at each call. `mixlab crossover` measures the number for a machine.
            **options: of the mixer.

        Raises:
            ValueError: no such site, or one that no mixer can stand in for; or the mixer refuses its options.
            RuntimeError: a site is mounted already, a LoRA is fused, or weights are on the meta device.

        Cost: memory for the mixers, plus one copy of the sites' projections where these are trained.
        """
        unet = resolve_unet(unet_or_pipe)
        sites = find_sites(unet, select)
        _check_all(unet, sites, "build")
        asked = Recipe(mixer_name, {"causality": causality, "normalize": normalize, **options})
        if min_tokens < 0:
            raise ValueError(f"min_tokens={min_tokens}: expected the number of tokens from which mixers run, 0 or more")
        adapter = cls(unet, sites, {site.name: asked for site in sites}, train_projections, min_tokens)
        adapter._pixels = getattr(unet_or_pipe, "vae_scale_factor", adapter._pixels)
        return adapter

    @property
    def is_mounted(self) -> bool:
        """Whether the mixers are in the UNet now; read from the UNet itself."""
        first = self.sites[0]
        return getattr(self._layer(first), MIXER, None) is self.mixers[first.name]

    def mount(self) -> MixerAdapter:
        """Put the mixers in: all sites or, on any error, none. Does nothing if they are in already.

        The student follows the UNet to its device, and to its dtype if that has changed since it was built.

        Raises:
            ValueError, RuntimeError: as `build`; or the projections are fused.
        """
        if self.is_mounted:
            return self
        _check_all(self.unet, self.sites, "mount")
        for site in self.sites if self.train_projections else ():
            check_not_fused(self._layer(site), site, "mount")
        dtype = _host_dtype(self.unet)
        follow(self.student, next(self.unet.parameters()), dtype if dtype != self._dtype else None)
        self._dtype = dtype
        with ExitStack() as undo:
            for site in self.sites:
                self._seat(site, undo.callback)
            told = [site.name for site in self.sites if self.mixers[site.name].traits.needs_grid]
            self._hooks = tell_grids(self.unet, told)
            undo.pop_all()
        stamp(self.unet, self.recipes, self.min_tokens)
        return self

    def unmount(self) -> MixerAdapter:
        """Give the UNet its own layers and Parameter objects back. Does nothing if the adapter is not mounted.

        Raises:
            RuntimeError: a LoRA is fused, projections are fused, or weights are on the meta device.
        """
        if not self.is_mounted:
            return self
        check_host(self.unet, self.sites, "unmount")
        for site in self.sites if self.train_projections else ():
            check_not_fused(self._layer(site), site, "unmount")
        for site in self.sites:
            for name in PROJECTIONS:
                self._restore(site, name)
            self._unseat(site)
        for hook in self._hooks:
            hook.remove()
        unstamp(self.unet, [site.name for site in self.sites])
        self._dtype = _host_dtype(self.unet)
        return self

    @contextmanager
    def mounted(self) -> Iterator[MixerAdapter]:
        """Mounted inside, and as it was before on exit."""
        with self._as(True):
            yield self

    @contextmanager
    def unmounted(self) -> Iterator[MixerAdapter]:
        """Unmounted inside (the teacher), and as it was before on exit."""
        with self._as(False):
            yield self

    @property
    def recipes(self) -> dict[str, Recipe]:
        """How to make the mixer of each site again."""
        return {name: Recipe(self._names[name], mixer.config.to_dict()) for name, mixer in self.mixers.items()}

    def parameters_by_name(self) -> dict[str, nn.Parameter]:
        """The trainable parameters, named as in the mounted UNet: `<site>.mixer.*`, `<site>.to_q.weight`, ..."""
        return dict(self.student.named_parameters())

    def status(self, size: tuple[int, int] | None = None) -> Status:
        """A row per site: level, tokens, dim, heads, mixer, new parameters, mounted; `print` it for a table.

        Args:
            size: (height, width) of an image in pixels, for the number of tokens.
        """
        mounted = self.is_mounted
        latent = None if size is None else (size[0] // self._pixels, size[1] // self._pixels)
        return Status(
            SiteStatus(
                site=site.name,
                level=site.level,
                tokens=None if latent is None else tokens_at(self.unet, site, latent),
                dim=site.dim,
                heads=site.heads,
                mixer=self._names[site.name],
                new_parameters=sum(parameter.numel() for parameter in self.mixers[site.name].parameters()),
                mounted=mounted,
            )
            for site in self.sites
        )

    def save_pretrained(self, directory: str | PathLike[str]) -> None:
        """Write `adapter.json` and `adapter.safetensors` (the student's weights only); see `checkpoint`.

        Raises:
            RuntimeError: a LoRA is on a mixer, or fused into the mounted student; or the UNet is offloaded.
        """
        check_no_lora(self.student, "save")
        if self.is_mounted:
            check_host(self.unet, self.sites, "save")
        checkpoint.save(directory, self.unet, self.recipes, self.train_projections, self.min_tokens, self.student)

    @classmethod
    def from_pretrained(cls, source: str | PathLike[str], unet_or_pipe: Any) -> MixerAdapter:
        """Read an adapter for this UNet from a directory or, if there is none, from the Hub; it is not mounted.

        Raises:
            FileNotFoundError: `source` is neither a directory with an adapter nor a repository with one.
            ValueError: the files are damaged or of a newer format, or belong to a UNet with other sites, which the
                message names. The UNet is unchanged in every case.
        """
        return cls._of(checkpoint.load(source, resolve_unet(unet_or_pipe)), unet_or_pipe)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        message: str = "Upload adapter",
        token: str | None = None,
    ) -> str:
        """Upload what `save_pretrained` writes to the Hub, in one commit; returns the repository's address.

        Args:
            repo_id: "name" or "owner/name"; the repository is made if there is none.
            private: of a new repository; None for the owner's default.
            message: of the commit.
            token: None for the one that `hf auth login` stored.

        Raises:
            ConnectionError: the Hub refused, or is out of reach.
            ValueError: no id of a repository.
            RuntimeError: as `save_pretrained`.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return hub.push(Path(folder), repo_id, private, message, token)

    def save_linfusion(self, directory: str | PathLike[str]) -> None:
        """Write the published LinFusion format, `config.json` and `diffusion_pytorch_model.safetensors`.

        Raises:
            ValueError: it has no place for something of this adapter, which the message names.
            RuntimeError: as `save_pretrained`.
        """
        check_no_lora(self.student, "save")
        linfusion.write(directory, self.unet, self.sites, self.recipes, self.min_tokens, self.student)

    @classmethod
    def from_linfusion(cls, source: str | PathLike[str], unet_or_pipe: Any) -> MixerAdapter:
        """Read published LinFusion weights, from a directory or the Hub ("Yuanshi/LinFusion-1-5"); it is not mounted.

        They fit a UNet with the same sites, whatever it is called.

        Raises:
            FileNotFoundError: no such files, or pickled ones only.
            ValueError: the files are damaged, or for another UNet. The UNet is unchanged in every case.
        """
        return cls._of(linfusion.read(source, resolve_unet(unet_or_pipe)), unet_or_pipe)

    @classmethod
    def _of(cls, saved: checkpoint.Saved, unet_or_pipe: Any) -> MixerAdapter:
        unet = resolve_unet(unet_or_pipe)
        _check_all(unet, saved.sites, "load an adapter")
        adapter = cls(unet, saved.sites, saved.recipes, saved.train_projections, saved.min_tokens)
        adapter._pixels = getattr(unet_or_pipe, "vae_scale_factor", adapter._pixels)
        checkpoint.fill(adapter.student, saved)
        return adapter

    @contextmanager
    def _as(self, mounted: bool) -> Iterator[None]:
        before = self.is_mounted
        self._set(mounted)
        try:
            yield
        finally:
            self._set(before)

    def _set(self, mounted: bool) -> None:
        if mounted:
            self.mount()
        else:
            self.unmount()

    def _layer(self, site: Site) -> nn.Module:
        return self.unet.get_submodule(site.name)  # by name: the UNet's modules may be wrapped or replaced meanwhile

    def _seat(self, site: Site, undo: Callable[..., Any]) -> None:
        attn = self._layer(site)
        undo(self._unseat, site)
        attn.__class__ = MixerAttention
        assert isinstance(attn, MixerAttention)
        attn.add_module(MIXER, self.mixers[site.name].train(attn.training))
        for name in PROJECTIONS:
            holder = self.student.projection(site.name, name)
            if holder is not None:
                undo(self._restore, site, name)
                self._originals[site.name, name] = swap_in(attn.get_submodule(name), holder)
        if self.min_tokens:
            attn.mixer_from = self.min_tokens
            taught = [name for name in PROJECTIONS if (site.name, name) in self._originals]
            attn.teacher = {name: self._originals[site.name, name] for name in taught}

    def _unseat(self, site: Site) -> None:
        attn = self._layer(site)
        attn._modules.pop(MIXER, None)
        for name in ("mixer_from", "teacher", GRID):
            attn.__dict__.pop(name, None)
        attn.__class__ = Attention

    def _restore(self, site: Site, name: str) -> None:
        originals = self._originals.pop((site.name, name), None)
        holder = self.student.projection(site.name, name)
        if originals is not None and holder is not None:
            swap_out(self._layer(site).get_submodule(name), holder, originals)


def _host_dtype(unet: nn.Module) -> torch.dtype:
    dtype = getattr(unet, "dtype", None)  # diffusers' answer is the compute dtype, also under layerwise casting
    return dtype if isinstance(dtype, torch.dtype) else next(unet.parameters()).dtype


def _check_all(unet: nn.Module, sites: list[Site], verb: str) -> None:
    check_host(unet, sites, verb)
    for site in sites:
        check_site(unet.get_submodule(site.name), site)
