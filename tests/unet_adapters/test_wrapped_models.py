"""Models whose modules peers wrap or replace, and models that are wrapped themselves."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.controlnets.controlnet_xs import ControlNetXSAdapter, UNetControlNetXSModel
from peft import LoraConfig, get_peft_model
from torch import nn

from tests.unet_adapters.pipelines import MIXERS, make
from tests.unet_adapters.pipelines import run as run_pipeline
from unet_adapters import MixerAdapter, find_host, find_sites


@pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)
def test_free_noise_split_inference(mixer, tmp_path) -> None:
    """FreeNoise wraps modules around the sites, which changes their names, but not those of what is saved."""
    pipe = make("AnimateDiff")
    adapter = mixer(pipe).mount()
    pipe.enable_free_noise(context_length=2, context_stride=1)
    mounted = run_pipeline(pipe, "AnimateDiff")
    pipe.enable_free_noise_split_inference(spatial_split_size=4, temporal_split_size=2)
    assert any(type(module).__name__ == "SplitInferenceModule" for module in pipe.unet.modules())
    torch.testing.assert_close(run_pipeline(pipe, "AnimateDiff"), mounted, rtol=0, atol=1e-4)
    assert adapter.is_mounted
    adapter.save_pretrained(tmp_path)
    plain = make("AnimateDiff")
    plain.enable_free_noise(context_length=2, context_stride=1)
    with MixerAdapter.from_pretrained(tmp_path, plain).mounted():
        assert torch.equal(run_pipeline(plain, "AnimateDiff"), mounted)
    if mixer is MIXERS["linfusion"]:
        adapter.save_linfusion(tmp_path / "published")
        with MixerAdapter.from_linfusion(tmp_path / "published", plain).mounted():
            torch.testing.assert_close(run_pipeline(plain, "AnimateDiff"), mounted, rtol=0, atol=1e-4)
    adapter.unmount()
    stock = run_pipeline(pipe, "AnimateDiff")
    assert not adapter.is_mounted and not torch.allclose(stock, mounted, atol=1e-3)
    with adapter.mounted():
        torch.testing.assert_close(run_pipeline(pipe, "AnimateDiff"), mounted, rtol=0, atol=1e-4)
    assert torch.equal(run_pipeline(pipe, "AnimateDiff"), stock)


@torch.no_grad()
def test_a_model_wrapped_by_peft_has_the_names_of_the_plain_one(unet, run, tmp_path) -> None:
    plain = find_sites(unet)
    base = run(unet)
    wrapped = get_peft_model(unet, LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    assert find_sites(wrapped) == plain
    adapter = MixerAdapter.build(wrapped, "linfusion")
    adapter.save_pretrained(tmp_path)
    with adapter.mounted():
        assert not torch.allclose(run(unet), base, atol=1e-5)
    restored = MixerAdapter.from_pretrained(tmp_path, wrapped.unload())
    assert [site.name for site in restored.sites] == [site.name for site in plain]


@torch.no_grad()
def test_a_compiled_model_has_the_names_of_the_plain_one(unet) -> None:
    assert find_sites(torch.compile(unet, backend="eager")) == find_sites(unet)


@torch.no_grad()
def test_a_model_wrapped_more_than_once_has_the_names_of_the_plain_one(unet) -> None:
    plain = find_sites(unet)
    lora = LoraConfig(r=2, target_modules=["to_q"])
    compiled = torch.compile(deepcopy(unet), backend="eager")
    assert find_sites(get_peft_model(compiled, lora)) == plain
    assert find_sites(torch.compile(get_peft_model(unet, lora), backend="eager")) == plain


def test_models_wrapped_for_parallel_training_are_refused(unet) -> None:
    parallel = nn.DataParallel(unet)
    for wrapped in (parallel, torch.compile(parallel, backend="eager"), type("Pipe", (), {"unet": parallel})()):
        with pytest.raises(TypeError, match=r"wrapped in DataParallel: .*`model\.module`"):
            MixerAdapter.build(wrapped, "linfusion")


def test_a_layer_that_was_replaced_is_noticed(unet) -> None:
    adapter = MixerAdapter.build(unet, "linfusion")
    block = unet.mid_block.attentions[0].transformer_blocks[0]
    block.attn1 = type(block.attn1)(16, heads=2, dim_head=8)
    with pytest.raises(RuntimeError, match=r"cannot mount: mid_block.* was replaced by another layer"):
        adapter.mount()
    assert not any(hasattr(module, "mixer") for module in unet.modules())


@torch.no_grad()
def test_status_of_a_controlnet_xs() -> None:
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        norm_num_groups=4,
        use_linear_projection=True,
        attention_head_dim=2,
    )
    control = ControlNetXSAdapter.from_unet(unet, size_ratio=1, conditioning_embedding_out_channels=(4, 4))
    model = UNetControlNetXSModel.from_unet(unet, control).eval()
    adapter = MixerAdapter.build(model, "linear_attention")
    rows = adapter.status(size=(64, 128))
    assert {row.group for row in rows} == {"down_blocks.1", "mid_block", "up_blocks.0"}
    assert {row.tokens for row in rows} == {4 * 8}
    inputs = torch.randn(1, 4, 8, 16), 7, torch.randn(1, 3, 8)
    image = torch.rand(1, 3, 16, 32)  # its embedding halves once
    base = model(*inputs, controlnet_cond=image).sample
    with adapter.mounted():
        assert not torch.allclose(model(*inputs, controlnet_cond=image).sample, base, atol=1e-6)
    assert torch.equal(model(*inputs, controlnet_cond=image).sample, base)


@torch.no_grad()
def test_a_peer_that_regroups_tokens_is_named(unet, run) -> None:
    """tomesd, HiDiffusion and HyperTile hand an attention layer other tokens than its transformer has."""
    adapter = MixerAdapter.build(unet, "linear_attention", causality="causal", scan="column").mount()
    layer = unet.get_submodule(adapter.sites[0].name)
    layer.register_forward_pre_hook(lambda _module, args: (args[0][:, ::2], *args[1:]))
    with pytest.raises(ValueError, match=r"got 40 tokens of an image with 8 × 10: a patch such as tomesd"):
        run(unet)


def test_hosts_are_found_by_architecture(unet) -> None:
    host = find_host(type("Pipe", (), {"unet": unet, "vae_scale_factor": 4})())
    assert host.model is unet and host.vae_scale_factor == 4 and host.name == "unet"
    with pytest.raises(TypeError, match="no registered host knows the architecture Linear"):
        find_host(nn.Linear(2, 2))
