"""The published LinFusion format (Liu et al. 2024, 2409.02097), both ways.

A folder with `config.json`, whose `modules_list` names the replaced layers, and one safetensors file whose tensors are
named by the index into that list: `{i}.to_q.weight`, …, `{i}.to_q_.0.weight` for the MLP before `to_q`. Its own q, k, v
and output projections are part of it. Nothing is ever unpickled, and a UNet is only looked at.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mixers import create_mixer
from unet_adapters.checkpoint import DESCRIPTION, OF_THE_SITE, Recipe, Saved, fingerprint
from unet_adapters.checks import check_host
from unet_adapters.hub import fetch
from unet_adapters.profiles import Profile, profile_of, profile_with
from unet_adapters.sites import Site, all_sites
from unet_adapters.student import PROJECTIONS, base_layer

CONFIG = "config.json"
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors")
CLASS = "LinFusion"
WITH_MLP, WITHOUT_MLP = "linfusion", "linear_attention"  # the second is the first without its MLPs
EPS = 1e-4
NO_MLP = -1
FLOATS = ("F16", "BF16", "F32", "F64")
WITHOUT_MEANING = {"mid_dim", "backend", "reference_length"}  # compared apart, or no part of the formula


@dataclass(frozen=True)
class Part:
    """One tensor of a module: its published name, its name in the student, its shape; ours = factor × published."""

    published: str
    ours: str
    shape: tuple[int, ...]
    factor: int = 1


@dataclass(frozen=True)
class Module:
    """One entry of `modules_list`, under the published names.

    `projection_mid_dim` is the width of the MLPs f before to_q and to_k: None is `dim_n`. With -1, f is the identity,
    so that the published to_q(x + f(x)) is to_q(2x): ours are then twice the published weights, which is exact.
    """

    module_name: str
    dim_n: int
    heads: int
    projection_mid_dim: int | None

    @property
    def recipe(self) -> Recipe:
        """The mixer that computes this module."""
        if self.projection_mid_dim == NO_MLP:
            return Recipe(WITHOUT_MLP, {"eps": EPS})
        return Recipe(WITH_MLP, {"eps": EPS, "mid_dim": self.projection_mid_dim})

    def parts(self, index: int) -> list[Part]:
        """Its tensors, 17 with the MLPs and 5 without."""
        d, m = self.dim_n, self.projection_mid_dim or self.dim_n
        shapes: dict[tuple[str, str], tuple[int, ...]] = {(f"{p}.weight", f"{p}.weight"): (d, d) for p in PROJECTIONS}
        shapes["to_out.0.bias", "to_out.0.bias"] = (d,)
        for theirs, ours in (("to_q_", "mixer.for_q.net"), ("to_k_", "mixer.for_k.net")) if m != NO_MLP else ():
            for layer, shape in ((0, (m, d)), (1, (m,)), (3, (d, m))):
                shapes[f"{theirs}.{layer}.weight", f"{ours}.{layer}.weight"] = shape
                shapes[f"{theirs}.{layer}.bias", f"{ours}.{layer}.bias"] = shape[:1]
        twice = ("to_q.weight", "to_k.weight") if m == NO_MLP else ()
        return [
            Part(f"{index}.{a}", f"{self.module_name}.{b}", shape, 2 if a in twice else 1)
            for (a, b), shape in shapes.items()
        ]


def read(source: str | os.PathLike[str], unet: nn.Module) -> Saved:
    """Read a published LinFusion for `unet`, which is only looked at.

    Raises:
        FileNotFoundError: no such files, here or on the Hub; or pickled weights only.
        ValueError: damaged files, or the modules are not sites of this UNet.
    """
    folder = fetch(source, [CONFIG, *WEIGHTS])
    modules = _modules(folder / CONFIG)
    _match(modules, unet, folder / CONFIG)
    sites = {site.name: site for site in all_sites(unet)}
    recipes = {module.module_name: module.recipe for module in modules}
    chosen = [site for name, site in sites.items() if name in recipes]
    for site in chosen:
        _check_projections(unet, site)
    return Saved(chosen, recipes, True, 0, _read_weights(_weights_file(folder), modules))


def write(
    directory: str | os.PathLike[str],
    unet: nn.Module,
    sites: Iterable[Site],
    recipes: Mapping[str, Recipe],
    min_tokens: int,
    student: nn.Module,
) -> None:
    """Write a student in the published format; projections that it does not train are copied from the UNet.

    LoRAs that are not fused are no part of it. Cost: one copy of the weights.

    Raises:
        ValueError: the format has no place for a mixer or an option of this student.
        RuntimeError: a LoRA is fused, or weights are on the meta device.
    """
    if min_tokens:
        raise ValueError(f"the LinFusion format has no place for min_tokens={min_tokens}: use save_pretrained")
    sites = list(sites)
    check_host(unet, sites, "save in the LinFusion format")
    modules = [_module(site, recipes[site.name]) for site in sites]
    for site in sites:
        _check_projections(unet, site)
    ours = student.state_dict()
    weights = {}
    for index, module in enumerate(modules):
        for part in module.parts(index):
            tensor = ours[part.ours] if part.ours in ours else _of_the_host(unet, part.ours)
            weights[part.published] = (tensor.detach().cpu() / part.factor).contiguous()
    entries = [asdict(module) for module in modules]
    config = {"_class_name": CLASS, "_diffusers_version": diffusers.__version__, "modules_list": entries}
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    aside = [folder / f"{name}.{os.getpid()}.tmp" for name in (WEIGHTS[0], CONFIG)]
    try:
        save_file(weights, aside[0], metadata={"format": "pt"})
        aside[1].write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for path, name in zip(aside, (WEIGHTS[0], CONFIG), strict=True):
            os.replace(path, folder / name)
    finally:
        for path in aside:
            path.unlink(missing_ok=True)


def _of_the_host(unet: nn.Module, name: str) -> Tensor:
    layer, _, key = name.rpartition(".")
    return base_layer(unet.get_submodule(layer)).get_parameter(key)


def _module(site: Site, recipe: Recipe) -> Module:
    if recipe.mixer not in (WITH_MLP, WITHOUT_MLP):
        raise ValueError(
            f"the LinFusion format holds {WITH_MLP}, and {WITHOUT_MLP} with eps={EPS}; "
            f"{site.name} is {recipe.mixer}: use save_pretrained"
        )
    mid = recipe.config.get("mid_dim") if recipe.mixer == WITH_MLP else NO_MLP
    module = Module(site.name, site.dim, site.heads, mid)
    theirs = create_mixer(recipe.mixer, site.dim, site.heads, eps=EPS, own_projections=False).config.to_dict()
    theirs["feature_map"] = "elu_plus_one"
    ours = {**recipe.config, "feature_map": recipe.config.get("feature_map") or "elu_plus_one"}
    other = {k: v for k, v in ours.items() if k not in WITHOUT_MEANING | OF_THE_SITE and v != theirs.get(k)}
    if other:
        listed = ", ".join(f"{key}={value!r} (it has {theirs.get(key)!r})" for key, value in other.items())
        raise ValueError(f"the LinFusion format has no place for {listed} of {site.name}: use save_pretrained")
    return module


def _check_projections(unet: nn.Module, site: Site) -> None:
    expected = {p: {"weight", "bias"} if p == "to_out.0" else {"weight"} for p in PROJECTIONS}
    for name, keys in expected.items():
        layer = base_layer(unet.get_submodule(f"{site.name}.{name}"))
        found = {key for key, _ in layer.named_parameters(recurse=False)}
        if found != keys:
            raise ValueError(
                f"{site.name}.{name} of the UNet has {' and '.join(sorted(found))}; "
                f"in the LinFusion format it has {' and '.join(sorted(keys))}"
            )


def _match(modules: list[Module], unet: nn.Module, path: Path) -> None:
    theirs = {module.module_name: {"dim": module.dim_n, "heads": module.heads} for module in modules}
    here = fingerprint(unet)
    differing = [name for name, site in theirs.items() if here.get(name) != site]
    if differing:
        first = differing[0]
        saved, found = theirs[first], here.get(first)
        there = f"dim {found['dim']}, heads {found['heads']} here" if found else "no such site here"
        raise ValueError(
            f"{path} is for {_called(profile_with(theirs))} and this UNet is {_called(profile_of(unet))}: {first} "
            f"(dim {saved['dim']}, heads {saved['heads']} there; {there}) is the first of {len(differing)} modules "
            "that do not fit"
        )


def _called(profile: Profile | None) -> str:
    return "a UNet without a published profile" if profile is None else profile.name


def _modules(path: Path) -> list[Module]:
    if not path.is_file():
        ours = (
            f"; it is an adapter for from_pretrained ({DESCRIPTION})" if (path.parent / DESCRIPTION).is_file() else ""
        )
        raise FileNotFoundError(f"{path} does not exist: not a LinFusion folder{ours}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, it is not JSON: {error}") from error
    kind = config.get("_class_name") if isinstance(config, dict) else None
    if kind != CLASS:
        raise ValueError(f"{path} describes {kind or 'nothing of diffusers'}, expected _class_name {CLASS!r}")
    entries = config.get("modules_list")
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} is damaged: modules_list should be a list of modules")
    modules = [_parse(entry, index, path) for index, entry in enumerate(entries)]
    names = [module.module_name for module in modules]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{path} is damaged: it lists {twice[0]} more than once")
    return modules


def _parse(entry: Any, index: int, path: Path) -> Module:
    def whole(value: Any) -> bool:
        return type(value) is int and value > 0

    fields = {"module_name", "dim_n", "heads", "projection_mid_dim"}
    given = {key: value for key, value in entry.items() if key in fields} if isinstance(entry, dict) else {}
    if given.keys() == fields:
        module = Module(**given)
        mid = module.projection_mid_dim
        sizes = whole(module.dim_n) and whole(module.heads) and module.dim_n % module.heads == 0
        if isinstance(module.module_name, str) and sizes and (mid is None or mid == NO_MLP or whole(mid)):
            return module
    raise ValueError(
        f"{path} is damaged: entry {index} of modules_list should have a module_name, dim_n that heads divides, and "
        f"projection_mid_dim (null, -1 or positive), got {json.dumps(entry)[:200]}"
    )


def _weights_file(folder: Path) -> Path:
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    pickled = [p.name for p in sorted(folder.iterdir()) if p.suffix in {".bin", ".pt", ".pth", ".ckpt", ".pkl"}]
    reason = f"{pickled[0]} is a pickle, which is never read" if pickled else "LinFusion weights are read from there"
    raise FileNotFoundError(f"{folder} has no {WEIGHTS[0]}: {reason}")


def _read_weights(path: Path, modules: list[Module]) -> dict[str, Tensor]:
    parts = {part.published: part for index, module in enumerate(modules) for part in module.parts(index)}
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 -- not a mapping
            faults = [f"{name} is missing" for name in parts if name not in slices]
            faults += [f"{name} is left over" for name in slices if name not in parts]
            for name, part in parts.items():
                shape = tuple(slices[name].get_shape()) if name in slices else part.shape
                if shape != part.shape:
                    faults.append(f"{name} is {shape}, expected {part.shape}")
                elif name in slices and slices[name].get_dtype() not in FLOATS:
                    faults.append(
                        f"{name} is stored as {slices[name].get_dtype()}, expected one of {', '.join(FLOATS)}"
                    )
            if faults:
                more = f", and {len(faults) - 1} more of the kind" if len(faults) > 1 else ""
                raise ValueError(f"{path} does not fit its {CONFIG}: {faults[0]}{more}")
            weights = {part.ours: file.get_tensor(name) * part.factor for name, part in parts.items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated, damaged or not a safetensors file: {error}") from error
    spoilt = [name for name, part in parts.items() if not bool(weights[part.ours].isfinite().all())]
    if spoilt:
        raise ValueError(f"{path} is damaged: {spoilt[0]} has values that are not finite numbers")
    return weights
