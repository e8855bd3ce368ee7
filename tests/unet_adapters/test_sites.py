"""Which layers are sites, and how to choose among them."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from unet_adapters import MixerAdapter, find_sites


def names(sites) -> list[str]:
    return [site.name for site in sites]


def test_sites_are_the_self_attention_of_the_unet(unet) -> None:
    sites = find_sites(unet)
    levels = [(site.group, site.dim, site.heads) for site in sites]
    assert levels == [("down_blocks.0", 8, 2), ("up_blocks.1", 8, 2), ("up_blocks.1", 8, 2), ("mid_block", 16, 2)]
    assert all(not unet.get_submodule(site.name).is_cross_attention for site in sites)
    with MixerAdapter.build(unet, "linear_attention").mounted():
        assert find_sites(unet) == sites


def test_a_pipeline_is_unwrapped(unet) -> None:
    pipe = type("Pipe", (), {"unet": unet})()
    assert find_sites(pipe) == find_sites(unet)
    with pytest.raises(TypeError, match="model or a pipeline"):
        find_sites(object())


@pytest.mark.parametrize(
    ("select", "indices"),
    [
        ("mid_block", [3]),
        ("up_blocks.*", [1, 2]),
        (["mid_block.*", "down_blocks.0"], [0, 3]),
        (["all"], [0, 1, 2, 3]),
        ("every:1", [0, 1, 2, 3]),
        ("every:3", [0, 3]),
        (lambda site: site.dim == 8, [0, 1, 2]),
    ],
)
def test_select(unet, select, indices) -> None:
    everything = find_sites(unet)
    assert find_sites(unet, select) == [everything[index] for index in indices]


@pytest.mark.parametrize("select", ["nowhere*", [], lambda site: False])
def test_no_match_lists_what_exists(unet, select) -> None:
    with pytest.raises(ValueError, match=r"no site matches.*\n  down_blocks\.0\.attentions"):
        MixerAdapter.build(unet, "linear_attention", select=select)


@pytest.mark.parametrize("select", ["every:", "every:0", "every:x", "every:-1"])
def test_every_n_wants_a_positive_number(unet, select) -> None:
    with pytest.raises(ValueError, match="every:n"):
        find_sites(unet, select)


def test_cross_attention_and_vae_are_left_alone() -> None:
    with torch.device("meta"):
        vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
        cross = UNet2DConditionModel(
            block_out_channels=(8,),
            norm_num_groups=4,
            attention_head_dim=2,
            cross_attention_dim=12,
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            only_cross_attention=True,
        )
    with pytest.raises(TypeError, match="no registered host knows the architecture AutoencoderKL"):
        find_sites(vae)
    assert {site.group for site in find_sites(cross)} <= {"mid_block"}


def test_sd15_has_sixteen_sites() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
    sites = find_sites(unet)
    assert [sum(site.dim == dim for site in sites) for dim in (320, 640, 1280)] == [5, 5, 6]
    with pytest.raises(RuntimeError, match="meta device"):
        MixerAdapter.build(unet, "linear_attention")
