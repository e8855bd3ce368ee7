"""`MixerAdapter`: mixers in place of the self-attention of a diffusers model, mounted and unmounted in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mixers import TokenMixer
from unet_adapters import hub
from unet_adapters.attention import register_for_layer_skip
from unet_adapters.checkpoint import SavedAdapter, load_weights, read_adapter, save_adapter
from unet_adapters.hosts import Host, find_host
from unet_adapters.linfusion import read_linfusion, write_linfusion
from unet_adapters.mounted_config import erase_mixers, read_mixer_weights, read_mounted_model, record_mixers
from unet_adapters.mounted_layer import guard_processors, unguard_processors
from unet_adapters.preconditions import check_no_lora, check_not_fused, check_site, check_weights
from unet_adapters.projections import copy_projections
from unet_adapters.site_mixer import SiteMixer, check_layer_options
from unet_adapters.site_mount import SiteMount
from unet_adapters.sites import Select, Site
from unet_adapters.status import SiteStatus, StatusTable
from unet_adapters.student_weights import MIXER, StudentWeights


class MixerAdapter:
    """A student of a diffusers model: one mixer per site, and (by default) trainable copies of the sites' projections.

    Mounting changes the class of each attention layer in place, adds the mixer as its child `mixer` and exchanges the
    Parameter objects of its projections; unmounting puts the same objects back, so that the model is bit-identical to
    the teacher again, whatever was trained. Adapters on different sites of one model can be mounted together.

    Freeze the model (`requires_grad_(False)`, or peft's `add_adapter`) while unmounted: mounted, its parameters include
    the student's. With gradient checkpointing, which runs forward again, call `backward` before the model is mounted or
    unmounted.

    While mounted, `model.state_dict()` has the student's weights and the extra names `<site>.mixer.*`: save with
    `save_pretrained`, and unmount around whatever copies a model strictly.

    Attributes:
        host: what is known of the model's architecture.
        sites: the layers that get a mixer.
        student: a module with all trainable weights and nothing else; pass its `parameters()` to an optimizer. It is
            the same object, with the same names, mounted or not.
        mixers: the mixer of each site, by site name.
    """

    def __init__(
        self,
        host: Host,
        sites: list[Site],
        site_mixers: dict[str, SiteMixer],
        train_projections: bool,
        min_tokens: int = 0,
        weights: Mapping[str, Tensor] | None = None,
    ):
        self.host = host
        self._fingerprint = host.fingerprint()  # now: peers such as FreeNoise wrap modules, which changes their names
        self.sites = sites
        self.min_tokens = min_tokens
        self.mixers: dict[str, TokenMixer] = {site.name: site_mixers[site.name].create(site) for site in sites}
        self.train_projections = train_projections
        self.student = StudentWeights()
        self._mixer_names = {site.name: site_mixers[site.name].mixer for site in sites}
        self._mounts = [self._prepare(site, weights) for site in sites]
        self._hooks: list[RemovableHandle] = []
        self._dtype = host.dtype
        self.student.to(dtype=self._dtype).requires_grad_(True)
        for mount in self._mounts:
            mount.follow(None)

    @classmethod
    def build(
        cls,
        pipe_or_model: Any,
        mixer_name: str,
        select: Select = "all",
        *,
        causality: str | None = None,
        normalize: bool | None = None,
        train_projections: bool = True,
        min_tokens: int = 0,
        **options: Any,
    ) -> MixerAdapter:
        """Make an adapter for a model; the model is not changed, and nothing is mounted.

        Args:
            pipe_or_model: a diffusers pipeline, or its UNet or transformer.
            mixer_name: as listed by `mixers.list_mixers()`.
            select: which sites, see `find_sites`; the others stay softmax attention (a hybrid).
            causality: None for the mixer's published default.
            normalize: None for the mixer's published default.
            train_projections: give the student its own copies of the q, k, v and output projections, which start
                from the teacher's values. False: the teacher's projections are used, and not trained.
            min_tokens: a site that is called with fewer tokens is the teacher's softmax attention, which is faster
                there; decided at each call. `mixlab crossover` measures the number for a machine.
            **options: of the mixer. `text` and `rope` are for sites that attend to text and rotate queries and keys;
                other sites ignore them.

        Raises:
            ValueError: no such site, or one that a mixer cannot replace; or the mixer refuses its options.
            RuntimeError: a site is mounted already, a LoRA is fused, or weights are on the meta device.
            TypeError: no registered host knows the architecture.

        Cost: memory for the mixers, plus one copy of the sites' projections if these are trained.
        """
        host = find_host(pipe_or_model)
        sites = host.select_sites(select)
        _check_sites(host, sites, "build")
        if min_tokens < 0:
            raise ValueError(f"min_tokens={min_tokens}: expected the number of tokens from which mixers run, 0 or more")
        check_layer_options(sites, options)
        site_mixer = SiteMixer(mixer_name, {"causality": causality, "normalize": normalize, **options})
        return cls(host, sites, {site.name: site_mixer for site in sites}, train_projections, min_tokens)

    def _prepare(self, site: Site, weights: Mapping[str, Tensor] | None) -> SiteMount:
        layer = self.host.model.get_submodule(site.name)
        mixer = self.mixers[site.name]
        mounted_class = self.host.mounted_class(layer)
        assert mounted_class is not None
        self.student.add_at(f"{site.name}.{MIXER}", mixer)
        holders = {}
        if self.train_projections:
            holders = copy_projections(layer, site, mounted_class.projection_names, weights)
        for name, holder in holders.items():
            self.student.add_at(f"{site.name}.{name}", holder)
        return SiteMount(site, layer, mixer, mounted_class, holders)

    @property
    def model(self) -> Any:
        """The diffusers model."""
        return self.host.model

    @property
    def is_mounted(self) -> bool:
        """Whether the mixers are in the model now; read from the model's own layers."""
        return self._mounts[0].is_mounted

    def mount(self) -> MixerAdapter:
        """Put the mixers in: all sites or, on any error, none. Does nothing if they are in already.

        Mixers follow their layers to their devices, and the model to its dtype if that has changed since the adapter
        was built.

        Raises:
            ValueError, RuntimeError: as `build`; or the projections are fused.
        """
        if self.is_mounted:
            return self
        self._check("mount")
        for mount in self._mounts:
            check_site(self.host, mount.site, mount.layer)
        dtype = self.host.dtype
        for mount in self._mounts:
            mount.follow(dtype if dtype != self._dtype else None)
        self._dtype = dtype
        register_for_layer_skip()
        with ExitStack() as undo:
            for mount in self._mounts:
                undo.callback(mount.unmount)
                mount.mount(self.min_tokens)
            needing_grid = [mount.layer for mount in self._mounts if mount.mixer.traits.needs_grid]
            self._hooks = self.host.attach_grid(needing_grid)
            self._hooks += self.host.attach_text_lengths(mount.layer for mount in self._mounts)
            undo.pop_all()
        guard_processors(self.model)
        record_mixers(self.model, self.site_mixers, self.min_tokens, self.train_projections)
        return self

    def unmount(self) -> MixerAdapter:
        """Give the model its own layers and Parameter objects back. Does nothing if the adapter is not mounted.

        Raises:
            RuntimeError: a LoRA is fused, projections are fused, or weights are on the meta device.
        """
        if not self.is_mounted:
            return self
        self._check("unmount")
        for mount in self._mounts:
            mount.unmount()
        for hook in self._hooks:
            hook.remove()
        unguard_processors(self.model)
        erase_mixers(self.model, self.mixers)
        self._dtype = self.host.dtype
        return self

    @contextmanager
    def mounted(self) -> Iterator[MixerAdapter]:
        """Mounted inside the context; on exit as it was before."""
        with self._as(True):
            yield self

    @contextmanager
    def unmounted(self) -> Iterator[MixerAdapter]:
        """Unmounted (the teacher) inside the context; on exit as it was before."""
        with self._as(False):
            yield self

    @property
    def site_mixers(self) -> dict[str, SiteMixer]:
        """How to make the mixer of each site again, by site name."""
        return {name: SiteMixer(self._mixer_names[name], mixer.config.to_dict()) for name, mixer in self.mixers.items()}

    def parameters_by_name(self) -> dict[str, nn.Parameter]:
        """The trainable parameters, named as in the mounted model: `<site>.mixer.*`, `<site>.to_q.weight`, ..."""
        return dict(self.student.named_parameters())

    def status(self, size: tuple[int, int] | None = None) -> StatusTable:
        """One row per site: group, tokens, dim, heads, mixer, new parameters, mounted; `print` it for a table.

        Args:
            size: (height, width) of an image in pixels, for the number of tokens.
        """
        mounted = self.is_mounted
        scale = self.host.vae_scale_factor
        latent_size = None if size is None else (size[0] // scale, size[1] // scale)
        return StatusTable(
            SiteStatus(
                site=site.name,
                group=site.group,
                tokens=None if latent_size is None else self.host.tokens_at(site, latent_size),
                dim=site.dim,
                heads=site.heads,
                mixer=self._mixer_names[site.name],
                new_parameters=sum(parameter.numel() for parameter in self.mixers[site.name].parameters()),
                mounted=mounted,
            )
            for site in self.sites
        )

    def save_pretrained(self, directory: str | PathLike[str]) -> None:
        """Write `adapter.json` and `adapter.safetensors` (the student's weights only); see `checkpoint`.

        Raises:
            RuntimeError: a LoRA is on a mixer, or fused into the mounted student; or the model is offloaded.
        """
        check_no_lora(self.student, "save")
        if self.is_mounted:
            check_weights(self.model, self._layers, "save")
        save_adapter(
            directory, self._fingerprint, self.site_mixers, self.train_projections, self.min_tokens, self.student
        )

    @classmethod
    def from_pretrained(cls, source: str | PathLike[str], pipe_or_model: Any) -> MixerAdapter:
        """Read an adapter for this model from a directory or, if there is none, from the Hub; it is not mounted.

        Raises:
            FileNotFoundError: `source` is neither a directory with an adapter nor a repository with one.
            ValueError: the files are damaged or of a newer format, or belong to a model with other sites, which the
                message names. The model is unchanged in every case.
        """
        host = find_host(pipe_or_model)
        return cls._restore(host, read_adapter(source, host))

    @classmethod
    def from_mounted(cls, folder: str | PathLike[str], *, variant: str | None = None, **settings: Any) -> MixerAdapter:
        """Read a UNet or transformer that was saved while mounted, and mount it again; it is the adapter's `model`.

        diffusers alone reads such a folder as softmax attention and drops the mixers' weights with a warning. The
        projections in the file are the student's: the teacher's are lost, so unmounting gives softmax attention on the
        student's projections. `save_pretrained` of the adapter keeps both; this is for a model saved by mistake.

        Args:
            folder: of the model, with config.json and safetensors files. The class is what config.json names: a
                UNet2DConditionModel, a UNetMotionModel, a ControlNetModel.
            variant: of the weights, as in diffusers' `from_pretrained`: "fp16" for instance.
            **settings: further arguments of that `from_pretrained`.

        Raises:
            ValueError: the model was not mounted when it was saved, it is not a diffusers model, its sites are not
                those of its config, or weights of a mixer are missing; or `min_tokens` differs between its sites, or
                needs the teacher's projections, which the file lacks.
            FileNotFoundError: no config.json, or no safetensors weights of this variant.
        """
        folder = Path(folder)
        model, site_mixers, min_tokens = read_mounted_model(folder, variant, settings)
        host = find_host(model)
        sites = [site for site in host.sites() if site.name in site_mixers]
        unknown = sorted(set(site_mixers) - {site.name for site in sites})
        if unknown:
            raise ValueError(f"{folder} names sites that its model does not have: {', '.join(unknown)}")
        adapter = cls(host, sites, site_mixers, False, min_tokens)
        weights = read_mixer_weights(folder, variant, adapter.student.state_dict())
        adapter.student.load_state_dict(weights)
        return adapter.mount()

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        message: str = "Upload adapter",
        token: str | None = None,
    ) -> str:
        """Upload what `save_pretrained` writes to the Hub, in one commit; returns the address of the repository.

        Args:
            repo_id: "name" or "owner/name"; the repository is created if there is none.
            private: of a new repository; None for the owner's default.
            message: of the commit.
            token: None for the one that `hf auth login` stored.

        Raises:
            ConnectionError: the upload failed.
            ValueError: `repo_id` is not a valid id.
            RuntimeError: as `save_pretrained`.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return hub.push(Path(folder), repo_id, private, message, token)

    def save_linfusion(self, directory: str | PathLike[str]) -> None:
        """Write the published LinFusion format, `config.json` and `diffusion_pytorch_model.safetensors`.

        Raises:
            ValueError: the format cannot express something of this adapter, which the message names.
            RuntimeError: as `save_pretrained`.
        """
        check_no_lora(self.student, "save")
        check_weights(self.model, self._layers, "save in the LinFusion format")
        layers = [(mount.site, mount.layer) for mount in self._mounts]
        write_linfusion(directory, layers, self.site_mixers, self.min_tokens, self.student)

    @classmethod
    def from_linfusion(
        cls, source: str | PathLike[str], pipe_or_model: Any, *, variant: str | None = None
    ) -> MixerAdapter:
        """Read published LinFusion weights, from a directory or the Hub ("Yuanshi/LinFusion-1-5"); it is not mounted.

        They fit a UNet with the same sites, whatever its name.

        Args:
            source: a folder, or the id of a Hub repository.
            pipe_or_model: a pipeline or a UNet.
            variant: "fp16" for instance; None for the plain weights or, if there are none, the only variant.

        Raises:
            FileNotFoundError: no such files, or pickled ones only.
            ValueError: the files are damaged, or for another UNet. The model is unchanged in every case.
        """
        host = find_host(pipe_or_model)
        return cls._restore(host, read_linfusion(source, host, variant))

    @classmethod
    def _restore(cls, host: Host, saved: SavedAdapter) -> MixerAdapter:
        _check_sites(host, saved.sites, "load an adapter")
        adapter = cls(host, saved.sites, saved.site_mixers, saved.train_projections, saved.min_tokens, saved.weights)
        load_weights(adapter.student, saved)
        return adapter

    @contextmanager
    def _as(self, mounted: bool) -> Iterator[None]:
        before = self.is_mounted
        self._set_mounted(mounted)
        try:
            yield
        finally:
            self._set_mounted(before)

    def _set_mounted(self, mounted: bool) -> None:
        if mounted:
            self.mount()
        else:
            self.unmount()

    def _check(self, verb: str) -> None:
        modules = {id(module) for module in self.model.modules()}
        for mount in self._mounts:
            if id(mount.layer) not in modules:
                raise RuntimeError(
                    f"cannot {verb}: {mount.site.name} was replaced by another layer since the adapter was built; "
                    "build it again"
                )
        check_weights(self.model, self._layers, verb)
        if self.train_projections:
            for mount in self._mounts:
                check_not_fused(mount.site, mount.layer, mount.mounted_class, verb)

    @property
    def _layers(self) -> dict[str, nn.Module]:
        return {mount.site.name: mount.layer for mount in self._mounts}


def _check_sites(host: Host, sites: list[Site], verb: str) -> None:
    layers = {site.name: host.model.get_submodule(site.name) for site in sites}
    check_weights(host.model, layers, verb)
    for site in sites:
        check_site(host, site, layers[site.name])
