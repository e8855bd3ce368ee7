"""Diffusion transformers as hosts: every mixer, mounted, unmounted, trained, saved, as in a UNet."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from mixers import list_mixers
from unet_adapters import MixerAdapter, find_host, find_sites
from unet_adapters.capture import capture_sites, replay

SIZES = ((8, 12), (12, 8))  # latents; patches of 2 × 2


def pixart() -> nn.Module:
    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=8,
        caption_channels=12,
        norm_num_groups=4,
    )


def pixart_1024() -> nn.Module:
    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        num_layers=2,
        cross_attention_dim=24,
        sample_size=8,
        caption_channels=12,
        use_additional_conditions=True,
    )


def sd35() -> nn.Module:
    return SD3Transformer2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        pos_embed_max_size=16,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )


MODELS: dict[str, Callable[[], nn.Module]] = {"PixArt": pixart, "PixArt-1024": pixart_1024, "SD3.5 medium": sd35}


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def model(request) -> Any:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(1)
        model = request.param()
        for name, parameter in model.named_parameters():
            if ".to_q" in name or ".to_k" in name:
                parameter.data.mul_(3)  # sharper attention: a mixer must change the output visibly
            elif not parameter.any():
                parameter.data.normal_(std=0.1)
    return model.eval().requires_grad_(False)


# Mixers that are softmax attention on so small an image: one block of keys, and a window that covers it.
SOFTMAX_HERE = {"softmax", "softmax_window", "sparse_linear"}


def run(model: Any, size: tuple[int, int] = SIZES[0], seed: int = 2) -> Tensor:
    inputs = find_host(model).dummy_inputs(size, batch=2, generator=torch.Generator().manual_seed(seed))
    return model(**inputs).sample


def close(left: Tensor, right: Tensor, atol: float = 1e-5) -> bool:
    return torch.allclose(left, right, rtol=0, atol=atol)


@torch.no_grad()
def test_softmax_is_the_stock_model(model) -> None:
    base = run(model)
    with MixerAdapter.build(model, "softmax").mounted():
        assert close(run(model), base)
    assert torch.equal(run(model), base)


@pytest.mark.parametrize("name", list_mixers())
def test_every_mixer_mounts_trains_and_leaves(model, name) -> None:
    base = run(model)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    objects = dict(model.named_parameters())
    adapter = MixerAdapter.build(model, name).mount()
    mixed = run(model)
    assert mixed.shape == base.shape and mixed.isfinite().all()
    assert close(mixed, base) == (name in SOFTMAX_HERE)
    mixed.square().mean().backward()
    unused = [key for key, parameter in adapter.parameters_by_name().items() if parameter.grad is None]
    assert all(".to_q." in key or ".to_k." in key for key in unused)  # the controls read neither queries nor keys
    adapter.unmount()
    assert torch.equal(run(model), base)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert all(parameter is objects[key] for key, parameter in model.named_parameters())


@torch.no_grad()
def test_sites_and_tokens(model) -> None:
    host = find_host(model)
    sites = host.sites()
    assert len(sites) == 2 and len({site.group for site in sites}) == 2
    adapter = MixerAdapter.build(model, "linear_attention", causality="causal", scan="column")
    for mounted in (False, True):
        adapter.mount() if mounted else adapter.unmount()
        for size in SIZES:
            with capture_sites(model, [site.name for site in sites]) as calls:
                run(model, size)
            for site in sites:
                call = calls[site.name]
                assert call.grid == (size[0] // 2, size[1] // 2)
                assert call.input.shape[1] == host.tokens_at(site, size)
                assert torch.equal(replay(model, site.name, call), call.output)


def test_two_sizes_before_one_backward_under_gradient_checkpointing(model) -> None:
    adapter = MixerAdapter.build(model, "linear_attention", causality="causal", scan="column").mount()
    gradients = {}
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.train()
        loss = sum(run(model, size).square().mean() for size in SIZES)
        gradients[checkpointing] = torch.autograd.grad(loss, list(adapter.student.parameters()))
    assert all(torch.equal(plain, again) for plain, again in zip(gradients[False], gradients[True], strict=True))


@torch.no_grad()
def test_lora_before_and_after_mounting_is_the_same(model) -> None:
    adapter = MixerAdapter.build(model, "linfusion")
    base = run(model)
    plain = run(adapter.mount().model)
    torch.manual_seed(5)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    after = run(model)
    assert not close(after, plain)
    adapter.unmount()
    assert not close(run(model), base)
    with adapter.mounted():
        assert torch.equal(run(model), after)
        wrapped.unload()
        assert torch.equal(run(model), plain)
    assert torch.equal(run(model), base)


@torch.no_grad()
def test_min_tokens_and_fused_projections(model) -> None:
    base = run(model)
    adapter = MixerAdapter.build(model, "linfusion", min_tokens=1000)
    for parameter in adapter.student.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    with adapter.mounted():
        assert torch.equal(run(model), base)
        model.fuse_qkv_projections()
        if not isinstance(model, SD3Transformer2DModel):  # diffusers' fused processor does not run its attn2
            assert close(run(model), base)
        with pytest.raises(RuntimeError, match="unfuse_qkv_projections"):
            adapter.unmount()
        model.unfuse_qkv_projections()
    assert torch.equal(run(model), base)


@torch.no_grad()
def test_adapters_and_mounted_models_are_saved(model, tmp_path) -> None:
    other = deepcopy(model)
    base = run(model)
    adapter = MixerAdapter.build(model, "linfusion", "every:2")
    for parameter in adapter.student.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    adapter.save_pretrained(tmp_path / "adapter")
    with adapter.mounted():
        mixed = run(model)
        model.save_pretrained(tmp_path / "mounted")
    assert torch.equal(run(model), base) and not close(mixed, base)
    with MixerAdapter.from_pretrained(tmp_path / "adapter", other).mounted():
        assert torch.equal(run(other), mixed)
    assert torch.equal(run(MixerAdapter.from_mounted(tmp_path / "mounted").model), mixed)


def test_another_architecture_is_refused(model, tmp_path) -> None:
    MixerAdapter.build(model, "linfusion").save_pretrained(tmp_path)
    with torch.device("meta"):
        other = PixArtTransformer2DModel(num_attention_heads=2, attention_head_dim=4, num_layers=1)
    with pytest.raises(ValueError, match="made for another model; these sites differ"):
        MixerAdapter.from_pretrained(tmp_path, other)


def test_what_is_no_host_yet_is_refused_with_the_reason() -> None:
    with torch.device("meta"):
        sd3 = SD3Transformer2DModel(num_layers=2, num_attention_heads=2, attention_head_dim=4)
        flux = FluxTransformer2DModel(num_layers=1, num_single_layers=1, num_attention_heads=2, attention_head_dim=16)
    with pytest.raises(ValueError, match="no self-attention that a mixer can replace"):
        find_sites(sd3)
    with pytest.raises(TypeError, match=r"FluxTransformer2DModel: .*joint attention"):
        find_sites(flux)
