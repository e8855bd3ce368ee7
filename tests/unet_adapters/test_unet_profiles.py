"""The published UNets as data: what they say is what diffusers builds, and every mixer fits every one of them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from mixers import create_mixer, list_mixers
from unet_adapters import PROFILES, MixerAdapter, UNetProfile, find_host, find_profile, find_sites
from unet_adapters.hosts.unet_profiles import profile_with_sites
from unet_adapters.linfusion import LinFusionModule

NAMED = {profile.name: profile for profile in PROFILES}
every_profile = pytest.mark.parametrize("profile", PROFILES, ids=lambda profile: profile.name)

# name: (parameters, sites, latent divisor, (dim, heads) -> sites)
KNOWN = {
    "SD-1.5": (859_520_964, 16, 8, {(320, 8): 5, (640, 8): 5, (1280, 8): 6}),
    "SD-1.5 inpainting": (859_535_364, 16, 8, {(320, 8): 5, (640, 8): 5, (1280, 8): 6}),
    "SD-2.1": (865_910_724, 16, 8, {(320, 5): 5, (640, 10): 5, (1280, 20): 6}),
    "SDXL base": (2_567_463_684, 70, 4, {(640, 10): 10, (1280, 20): 60}),
    "SDXL refiner": (2_259_526_660, 44, 8, {(768, 12): 20, (1536, 24): 24}),
}


@every_profile
def test_the_data_is_what_diffusers_builds(profile) -> None:
    unet = profile.unet()
    assert list(find_host(unet).fingerprint().items()) == list(profile.fingerprint.items())
    assert find_profile(unet) is profile and find_profile(type("Pipe", (), {"unet": unet})()) is profile
    assert all(parameter.is_meta for parameter in unet.parameters()) and not unet.training
    if profile.name in KNOWN:
        parameters, sites, divisor, kinds = KNOWN[profile.name]
        shapes = [(site.dim, site.heads) for site in find_sites(unet)]
        assert sum(p.numel() for p in unet.parameters()) == parameters
        assert len(shapes) == sites and {kind: shapes.count(kind) for kind in shapes} == kinds
        assert find_host(unet).latent_multiple == divisor


def test_the_embedded_profile_is_that_of_the_weights() -> None:
    folder = Path(__file__).parents[2] / "experiments/teacher/weights/unet"
    config = {k: v for k, v in json.loads((folder / "config.json").read_text()).items() if k[0] != "_"}
    ours = {k: list(v) if isinstance(v, tuple) else v for k, v in NAMED["embedded"].unet().config.items()}
    assert {key: ours[key] for key in config} == config


@pytest.mark.parametrize(
    ("name", "tensors", "millions"), [("SD-1.5", 272, 99.2), ("SD-2.1", 272, 99.2), ("SDXL base", 1190, 819.9)]
)
def test_the_size_of_a_published_linfusion(name, tensors, millions) -> None:
    entries = NAMED[name].fingerprint.items()
    parts = [p for i, (n, s) in enumerate(entries) for p in LinFusionModule(n, s["dim"], s["heads"], None).tensors(i)]
    assert len(parts) == tensors
    assert round(sum(torch.Size(part.shape).numel() for part in parts) / 1e6, 1) == millions


def test_which_profile() -> None:
    sd = NAMED["SD-1.5"]
    inpainting = NAMED["SD-1.5 inpainting"]
    assert find_profile(sd.unet(in_channels=8)) is sd  # of an editing model
    assert find_profile(sd.unet(attention_head_dim=4)) is None
    assert inpainting.unet().config.in_channels == 9
    some = dict(list(NAMED["SDXL base"].fingerprint.items())[3:5])
    assert profile_with_sites(some) is NAMED["SDXL base"]
    assert profile_with_sites({**some, "x": {"dim": 8, "heads": 2}}) is None


@every_profile
@pytest.mark.parametrize("mixer", list_mixers())
def test_every_mixer_can_be_made_for_every_site(profile, mixer) -> None:
    with torch.device("meta"):
        for dim, heads in {(site["dim"], site["heads"]) for site in profile.fingerprint.values()}:
            built = create_mixer(mixer, dim, heads, own_projections=False)
            assert all(parameter.is_meta for parameter in built.parameters())


def narrow(profile: UNetProfile) -> dict[str, object]:
    """Changes that make the same structure with narrower layers; the number of heads divides what is left."""
    widths = profile.config["block_out_channels"]
    changes: dict[str, object] = {"cross_attention_dim": 16, "norm_num_groups": 8}
    if profile.name != "embedded":
        changes["block_out_channels"] = tuple(width // 8 for width in widths)
    if "addition_embed_type" in profile.config:
        changes |= {"addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 32}
    return changes


@cache
def small(profile: UNetProfile) -> UNet2DConditionModel:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(1)
        return profile.unet("cpu", **narrow(profile))


def forward(unet: UNet2DConditionModel, profile: UNetProfile) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    side = find_host(unet).latent_multiple
    sample = torch.randn(1, profile.config["in_channels"], side, 2 * side, generator=generator)
    words = torch.randn(1, 3, 16, generator=generator)
    added = {"text_embeds": torch.randn(1, 8, generator=generator), "time_ids": torch.arange(6.0)[None]}
    return unet(sample, 7, words, added_cond_kwargs=added).sample


@every_profile
@torch.no_grad()
def test_every_mixer_runs_in_a_narrow_copy(profile) -> None:
    """Every profile runs LinFusion and its share of the other mixers, so that each runs in the sites of one profile."""
    unet = small(profile)
    assert list(find_host(unet).fingerprint()) == list(profile.fingerprint)
    base = forward(unet, profile)
    share = list_mixers()[PROFILES.index(profile) :: len(PROFILES)]
    for mixer in {*share, "linfusion"}:
        with MixerAdapter.build(unet, mixer, train_projections=False).mounted():
            mixed = forward(unet, profile)
        assert mixed.shape == base.shape and mixed.isfinite().all(), mixer
    assert torch.equal(forward(unet, profile), base)
