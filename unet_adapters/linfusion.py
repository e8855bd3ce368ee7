"""The published LinFusion format (Liu et al. 2024, 2409.02097), both ways.

A folder with `config.json`, whose `modules_list` names the replaced layers, and safetensors weights, whose tensors are
named by the index into that list: `{i}.to_q.weight`, …, `{i}.to_q_.0.weight` for the MLP before `to_q`. Its own q, k, v
and output projections are part of it. Nothing is ever unpickled, and the model is not changed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mixers import create_mixer
from mixers.files import atomic_path
from unet_adapters.checkpoint import DESCRIPTION, SavedAdapter
from unet_adapters.files import write_tensors
from unet_adapters.hosts import Host
from unet_adapters.hosts.unet_profiles import UNetProfile, find_profile, profile_with_sites
from unet_adapters.hub import fetch
from unet_adapters.projections import base_layer, why_not_trainable
from unet_adapters.site_mixer import OF_THE_SITE, SiteMixer
from unet_adapters.sites import Site
from unet_adapters.weight_files import STEM, closest_variant, find_weight_files

CONFIG = "config.json"
WEIGHTS = f"{STEM}.safetensors"
DOWNLOADS = [CONFIG, f"{STEM}*.safetensors", f"{STEM}.safetensors.index*.json"]
CLASS = "LinFusion"
WITH_MLP = "linfusion"
WITHOUT_MLP = "linear_attention"  # LinFusion without its MLPs
EPS = 1e-4
NO_MLP = -1
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
FLOATS = ("F16", "BF16", "F32", "F64")
# Compared separately, without effect on the formula, or (output_gain) written into to_out.
IGNORED_OPTIONS = {"mid_dim", "backend", "reference_length", "output_gain"}


@dataclass(frozen=True)
class TensorMapping:
    """One tensor of a module: its published name, its name in the student, its shape; ours = factor × published."""

    published: str
    ours: str
    shape: tuple[int, ...]
    factor: int = 1


@dataclass(frozen=True)
class LinFusionModule:
    """One entry of `modules_list`, under the published names.

    `projection_mid_dim` is the width of the MLPs f before to_q and to_k; None means `dim_n`. With -1, f is the
    identity, so that the published to_q(x + f(x)) is to_q(2x): our weights are then twice the published ones, which is
    exact.
    """

    module_name: str
    dim_n: int
    heads: int
    projection_mid_dim: int | None

    @property
    def site_mixer(self) -> SiteMixer:
        """The mixer that computes this module."""
        if self.projection_mid_dim == NO_MLP:
            return SiteMixer(WITHOUT_MLP, {"eps": EPS})
        return SiteMixer(WITH_MLP, {"eps": EPS, "mid_dim": self.projection_mid_dim})

    def tensors(self, index: int) -> list[TensorMapping]:
        """Its tensors, 17 with the MLPs and 5 without."""
        d = self.dim_n
        m = self.projection_mid_dim or d
        shapes: dict[tuple[str, str], tuple[int, ...]] = {(f"{p}.weight", f"{p}.weight"): (d, d) for p in PROJECTIONS}
        shapes["to_out.0.bias", "to_out.0.bias"] = (d,)
        mlps = (("to_q_", "mixer.for_q.net"), ("to_k_", "mixer.for_k.net")) if m != NO_MLP else ()
        for published, ours in mlps:
            for layer, shape in ((0, (m, d)), (1, (m,)), (3, (d, m))):
                shapes[f"{published}.{layer}.weight", f"{ours}.{layer}.weight"] = shape
                shapes[f"{published}.{layer}.bias", f"{ours}.{layer}.bias"] = shape[:1]
        doubled = ("to_q.weight", "to_k.weight") if m == NO_MLP else ()
        return [
            TensorMapping(f"{index}.{a}", f"{self.module_name}.{b}", shape, 2 if a in doubled else 1)
            for (a, b), shape in shapes.items()
        ]


def read_linfusion(source: str | os.PathLike[str], host: Host, variant: str | None = None) -> SavedAdapter:
    """Read a published LinFusion for a host, which is not changed.

    Args:
        source: a folder, or the id of a Hub repository.
        variant: of the weights, "fp16" for instance; None for the plain ones or, if there are none, the only variant.

    Raises:
        FileNotFoundError: no such files, here or on the Hub; or pickled weights only.
        ValueError: damaged files, or the modules are not sites of this model.
    """
    folder = fetch(source, DOWNLOADS)
    modules = _read_modules(folder / CONFIG)
    _require_sites(modules, host, folder / CONFIG)
    site_mixers = {module.module_name: module.site_mixer for module in modules}
    sites = [site for site in host.sites() if site.name in site_mixers]
    for site in sites:
        _check_projections(site, host.model.get_submodule(site.name))
    return SavedAdapter(sites, site_mixers, True, 0, _read_weights(_weight_files(folder, variant), modules))


def write_linfusion(
    directory: str | os.PathLike[str],
    layers: Sequence[tuple[Site, nn.Module]],
    site_mixers: Mapping[str, SiteMixer],
    min_tokens: int,
    student: nn.Module,
) -> None:
    """Write a student in the published format; projections that it does not train are copied from its layers.

    LoRAs that are not fused are not part of it. Output gains, which the format does not have, are multiplied into
    to_out: the same map. Cost: one copy of the weights.

    Args:
        directory: created if there is none.
        layers: each site and its attention layer.
        site_mixers: by site name.
        min_tokens: see `MixerAdapter.build`.
        student: the weights.

    Raises:
        ValueError: the format cannot express a mixer or an option of this student.
    """
    if min_tokens:
        raise ValueError(f"the LinFusion format cannot express min_tokens={min_tokens}: use save_pretrained")
    modules = [_describe(site, site_mixers[site.name]) for site, _ in layers]
    for site, layer in layers:
        _check_projections(site, layer)
    ours = student.state_dict()
    weights = {}
    for index, (module, (site, layer)) in enumerate(zip(modules, layers, strict=True)):
        for part in module.tensors(index):
            tensor = ours[part.ours] if part.ours in ours else _layer_tensor(site, layer, part.ours)
            if part.ours == f"{module.module_name}.to_out.0.weight":
                tensor = _with_output_gain(tensor, ours.get(f"{module.module_name}.mixer.output_gain"))
            weights[part.published] = (tensor.detach().cpu() / part.factor).contiguous()
    entries = [asdict(module) for module in modules]
    config = {"_class_name": CLASS, "_diffusers_version": diffusers.__version__, "modules_list": entries}
    folder = Path(directory)
    with ExitStack() as stack:
        config_path = stack.enter_context(atomic_path(folder / CONFIG, durable=True))
        weights_path = stack.enter_context(atomic_path(folder / WEIGHTS, durable=True))
        write_tensors(weights_path, weights, {"format": "pt"}, reported_path=folder / WEIGHTS)
        config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _with_output_gain(to_out: Tensor, gain: Tensor | None) -> Tensor:
    """Multiply the columns (d, h·v) that read each head by its gain (h,)."""
    return to_out if gain is None else to_out * gain.to(to_out).repeat_interleave(to_out.shape[1] // len(gain))


def _layer_tensor(site: Site, attention: nn.Module, name: str) -> Tensor:
    projection, _, key = name.removeprefix(f"{site.name}.").rpartition(".")
    layer = base_layer(attention.get_submodule(projection))
    reason = why_not_trainable(layer)
    if reason is not None:
        raise ValueError(f"{site.name}.{projection}: {reason}, so it cannot be written in the LinFusion format")
    return layer.get_parameter(key)


def _describe(site: Site, site_mixer: SiteMixer) -> LinFusionModule:
    if site_mixer.mixer not in (WITH_MLP, WITHOUT_MLP):
        raise ValueError(
            f"the LinFusion format holds {WITH_MLP}, and {WITHOUT_MLP} with eps={EPS}; "
            f"{site.name} is {site_mixer.mixer}: use save_pretrained"
        )
    mid_dim = site_mixer.config.get("mid_dim") if site_mixer.mixer == WITH_MLP else NO_MLP
    published = create_mixer(site_mixer.mixer, site.dim, site.heads, eps=EPS, own_projections=False).config.to_dict()
    published["feature_map"] = "elu_plus_one"
    ours = {**site_mixer.config, "feature_map": site_mixer.config.get("feature_map") or "elu_plus_one"}
    others = {k: v for k, v in ours.items() if k not in IGNORED_OPTIONS | OF_THE_SITE and v != published.get(k)}
    if others:
        listing = ", ".join(f"{key}={value!r} (it has {published.get(key)!r})" for key, value in others.items())
        raise ValueError(f"the LinFusion format cannot express {listing} of {site.name}: use save_pretrained")
    return LinFusionModule(site.name, site.dim, site.heads, mid_dim)


def _check_projections(site: Site, attention: nn.Module) -> None:
    for name in PROJECTIONS:
        expected = {"weight", "bias"} if name == "to_out.0" else {"weight"}
        parameters = base_layer(attention.get_submodule(name)).named_parameters(recurse=False)
        actual = {key for key, _ in parameters}
        if actual != expected:
            raise ValueError(
                f"{site.name}.{name} of the model has {' and '.join(sorted(actual))}; "
                f"in the LinFusion format it has {' and '.join(sorted(expected))}"
            )


def _require_sites(modules: list[LinFusionModule], host: Host, path: Path) -> None:
    saved_sites = {module.module_name: {"dim": module.dim_n, "heads": module.heads} for module in modules}
    host_sites = host.fingerprint()
    differing = [name for name, site in saved_sites.items() if host_sites.get(name) != site]
    if differing:
        first = differing[0]
        saved = saved_sites[first]
        site = host_sites.get(first)
        here = f"dim {site['dim']}, heads {site['heads']} here" if site else "no such site here"
        raise ValueError(
            f"{path} is for {_profile_name(profile_with_sites(saved_sites))} and this UNet is "
            f"{_profile_name(find_profile(host.model))}: {first} (dim {saved['dim']}, heads {saved['heads']} there; "
            f"{here}) is the first of {len(differing)} modules that do not fit"
        )


def _profile_name(profile: UNetProfile | None) -> str:
    return "a UNet without a published profile" if profile is None else profile.name


def _read_modules(path: Path) -> list[LinFusionModule]:
    if not path.is_file():
        other = path.parent / DESCRIPTION
        reason = f"; it is an adapter for from_pretrained ({DESCRIPTION})" if other.is_file() else ""
        raise FileNotFoundError(f"{path} does not exist: not a LinFusion folder{reason}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, it is not JSON: {error}") from error
    class_name = config.get("_class_name") if isinstance(config, dict) else None
    if class_name != CLASS:
        raise ValueError(f"{path} describes {class_name or 'no diffusers model'}, expected _class_name {CLASS!r}")
    entries = config.get("modules_list")
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} is damaged: modules_list should be a list of modules")
    modules = [_parse_entry(entry, index, path) for index, entry in enumerate(entries)]
    names = [module.module_name for module in modules]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{path} is damaged: it lists {repeated[0]} more than once")
    return modules


def _parse_entry(entry: Any, index: int, path: Path) -> LinFusionModule:
    fields = {"module_name", "dim_n", "heads", "projection_mid_dim"}
    values = {key: value for key, value in entry.items() if key in fields} if isinstance(entry, dict) else {}
    if values.keys() == fields and _is_valid(LinFusionModule(**values)):
        return LinFusionModule(**values)
    raise ValueError(
        f"{path} is damaged: entry {index} of modules_list should have a module_name, dim_n that heads divides, and "
        f"projection_mid_dim (null, -1 or positive), got {json.dumps(entry)[:200]}"
    )


def _is_valid(module: LinFusionModule) -> bool:
    def is_count(value: Any) -> bool:
        return type(value) is int and value > 0

    mid_dim = module.projection_mid_dim
    if not (is_count(module.dim_n) and is_count(module.heads) and module.dim_n % module.heads == 0):
        return False
    return isinstance(module.module_name, str) and (mid_dim is None or mid_dim == NO_MLP or is_count(mid_dim))


def _weight_files(folder: Path, variant: str | None) -> list[Path]:
    if variant is not None:
        return find_weight_files(folder, STEM, variant)
    return find_weight_files(folder, STEM, closest_variant(folder, STEM))


def _read_weights(files: list[Path], modules: list[LinFusionModule]) -> dict[str, Tensor]:
    expected = {part.published: part for index, module in enumerate(modules) for part in module.tensors(index)}
    weights: dict[str, Tensor] = {}
    stored: set[str] = set()
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                _check_tensors(path, file, expected, stored)
                stored |= set(file.keys())
                for name in file.keys():  # noqa: SIM118 -- not a mapping
                    part = expected[name]
                    weights[part.ours] = file.get_tensor(name) * part.factor
        except SafetensorError as error:
            raise ValueError(f"{path} is truncated, damaged or not a safetensors file: {error}") from error
    path = files[0]
    missing = [f"{name} is missing" for name in expected if name not in stored]
    _raise_misfit(path, missing)
    infinite = [name for name, part in expected.items() if not bool(weights[part.ours].isfinite().all())]
    if infinite:
        raise ValueError(f"{path} is damaged: {infinite[0]} has values that are not finite numbers")
    return weights


def _check_tensors(path: Path, file: Any, expected: Mapping[str, TensorMapping], stored: set[str]) -> None:
    names = list(file.keys())
    faults = []
    for name in [*(n for n in expected if n in names), *(n for n in names if n not in expected)]:
        view = file.get_slice(name)
        if name not in expected:
            faults.append(f"{name} is left over")
        elif name in stored:
            faults.append(f"{name} is in another shard, too")
        elif tuple(view.get_shape()) != expected[name].shape:
            faults.append(f"{name} is {tuple(view.get_shape())}, expected {expected[name].shape}")
        elif view.get_dtype() not in FLOATS:
            faults.append(f"{name} is stored as {view.get_dtype()}, expected one of {', '.join(FLOATS)}")
    _raise_misfit(path, faults)


def _raise_misfit(path: Path, faults: list[str]) -> None:
    if faults:
        more = f", and {len(faults) - 1} more of the kind" if len(faults) > 1 else ""
        raise ValueError(f"{path} does not fit its {CONFIG}: {faults[0]}{more}")
