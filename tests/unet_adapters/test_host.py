"""What a host may do to a mounted UNet: processors, masks, LoRA, offloading, layouts."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    PAGCFGIdentitySelfAttnProcessor2_0,
    PAGIdentitySelfAttnProcessor2_0,
)
from peft import LoraConfig

from unet_adapters import MixerAdapter

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def adapter(unet) -> MixerAdapter:
    return MixerAdapter.build(unet, "linear_attention")


def first(adapter: MixerAdapter) -> Attention:
    return adapter.model.get_submodule(adapter.sites[0].name)


CHANGES = {
    "attention slices on": lambda unet: unet.set_attention_slice("max"),
    "attention slices off": lambda unet: unet.set_attention_slice(None),
    "default processor": lambda unet: unet.set_default_attn_processor(),
    "another processor": lambda unet: unet.set_attn_processor(AttnProcessor2_0()),
    "processors by name": lambda unet: unet.set_attn_processor({key: AttnProcessor() for key in unet.attn_processors}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_mixer_survives_a_change_of_processors(adapter, run, change) -> None:
    unet = adapter.model
    base = run(adapter.model)
    mounted = run(adapter.mount().model)
    change(unet)
    torch.testing.assert_close(run(unet), mounted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(mounted, base, atol=1e-5)
    processors = unet.attn_processors
    adapter.unmount()
    assert unet.attn_processors == processors
    torch.testing.assert_close(run(unet), base, rtol=1e-4, atol=1e-5)


def test_fusing_projections_is_undone_before_unmounting(adapter, run) -> None:
    unet = adapter.model
    base = run(adapter.model)
    mounted = run(adapter.mount().model)
    unet.fuse_qkv_projections()
    torch.testing.assert_close(run(unet), mounted)
    with pytest.raises(RuntimeError, match="unfuse_qkv_projections"):
        adapter.unmount()
    unet.unfuse_qkv_projections()
    assert torch.equal(run(adapter.unmount().model), base)


def test_a_mask_hides_padding_as_if_it_did_not_exist(adapter) -> None:
    attn = first(adapter.mount())
    x = torch.randn(2, 6, 8)
    free = attn(x)
    visible = [0, 1, 3, 4, 5]
    for keep in (torch.ones(2, 1, 6, dtype=torch.bool), torch.zeros(2, 1, 6)):
        assert torch.equal(attn(x, attention_mask=keep), free)
        hide = keep.clone()
        hide[:, 0, 2] = False if hide.dtype == torch.bool else -10000.0
        torch.testing.assert_close(attn(x, attention_mask=hide)[:, visible], attn(x[:, visible]))


def test_masks_that_are_not_padding_are_refused(unet, adapter) -> None:
    x = torch.randn(2, 6, 8)
    hide = torch.zeros(2, 1, 6)
    hide[0, 0, 2] = -10000.0
    with adapter.mounted():
        attn = first(adapter)
        with pytest.raises(ValueError, match="the same for every query"):
            attn(x, attention_mask=hide.expand(2, 6, 6))
        with pytest.raises(ValueError, match="adds numbers to the scores"):
            attn(x, attention_mask=hide / 1e4)
    with MixerAdapter.build(unet, "rwkv6").mounted() as other, pytest.raises(ValueError, match="hides tokens"):
        first(other)(x, attention_mask=hide)


def test_cross_attention_falls_back_to_the_nominal_processor(adapter) -> None:
    attn = first(adapter)
    x = torch.randn(2, 6, 8)
    other = torch.randn(2, 3, 8)
    stock = attn(x, encoder_hidden_states=other)
    adapter.mount()
    assert torch.equal(attn(x, encoder_hidden_states=other), stock)


def test_a_processor_that_a_mixer_would_ignore_is_refused(adapter) -> None:
    class StoreProcessor:
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
            raise AssertionError

    attn = first(adapter.mount())
    before = attn.get_processor()
    for put in (attn.set_processor, lambda p: setattr(attn, "processor", p)):  # some pipelines go past set_processor
        with pytest.raises(ValueError, match="StoreProcessor works on softmax"):
            put(StoreProcessor())
        assert attn.get_processor() is before


def test_the_layer_keeps_its_contract(unet) -> None:
    adapter = MixerAdapter.build(unet, "softmax", select="mid_block")
    attn = first(adapter)
    x = torch.randn(2, 16, 3, 5)
    attn.residual_connection = True
    attn.rescale_output_factor = 2.0
    attn.group_norm = torch.nn.GroupNorm(4, 16)
    torch.nn.init.normal_(attn.group_norm.weight)
    stock = attn(x)
    with adapter.mounted():
        torch.testing.assert_close(attn(x), stock)


@pytest.mark.parametrize("kind", [PAGIdentitySelfAttnProcessor2_0, PAGCFGIdentitySelfAttnProcessor2_0])
def test_perturbed_attention_guidance(unet, kind) -> None:
    adapter = MixerAdapter.build(unet, "softmax")
    attn = first(adapter)
    x = torch.randn(6, 6, 8)
    plain = attn(x)
    attn.processor = kind()
    stock = attn(x)
    with adapter.mounted():
        torch.testing.assert_close(attn(x), stock)
    assert not torch.allclose(plain, stock)


def lora(unet, seed: int = 5) -> None:
    torch.manual_seed(seed)
    config = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    unet.add_adapter(config, "style")


def test_lora_before_and_after_mounting_is_the_same(unet, run) -> None:
    adapter = MixerAdapter.build(unet, "linear_attention")
    base = run(unet)
    plain = run(adapter.mount().model)
    lora(unet)
    after = run(unet)
    assert not torch.allclose(after, plain, atol=1e-5)
    adapter.unmount()
    stock = run(unet)
    assert not torch.allclose(stock, base, atol=1e-5)
    with adapter.mounted():
        assert torch.equal(run(unet), after)
    with MixerAdapter.build(unet, "linear_attention").mounted():  # built on a UNet that has the LoRA
        assert torch.equal(run(unet), after)
        unet.delete_adapters("style")
        unet.unload_lora()
        assert torch.equal(run(unet), plain)
    assert torch.equal(run(unet), base)


def test_a_fused_lora_is_refused(unet, run) -> None:
    adapter = MixerAdapter.build(unet, "linear_attention")
    lora(unet)
    unet.fuse_lora()
    for act in (adapter.mount, lambda: MixerAdapter.build(unet, "linear_attention")):
        with pytest.raises(RuntimeError, match="LoRA is fused"):
            act()
    unet.unfuse_lora()
    adapter.mount()
    unet.fuse_lora()
    with pytest.raises(RuntimeError, match="cannot unmount: a LoRA is fused"):
        adapter.unmount()
    assert adapter.is_mounted
    unet.unfuse_lora()
    adapter.unmount()


def test_weights_on_meta_are_refused(adapter) -> None:
    site = adapter.sites[-1]
    adapter.model.get_submodule(site.name).to("meta")
    with pytest.raises(RuntimeError, match=rf"cannot mount: weights of {site.name} are on the meta device"):
        adapter.mount()
    assert not adapter.is_mounted and type(first(adapter)) is Attention


def test_layers_that_are_not_stock_are_refused(unet) -> None:
    adapter = MixerAdapter.build(unet, "linear_attention")
    attn = first(adapter)
    attn.norm_q = torch.nn.LayerNorm(8)
    with pytest.raises(ValueError, match="has norm_q across heads"):
        adapter.mount()
    attn.norm_q = None
    attn.add_k_proj = torch.nn.Linear(8, 8)
    with pytest.raises(ValueError, match="has add_k_proj, which a mixer would skip"):
        adapter.mount()
    attn.__class__ = type("Theirs", (Attention,), {})
    with pytest.raises(RuntimeError, match="is a Theirs, not diffusers' own"):
        adapter.mount()


def test_user_hooks_on_the_layer_still_run(adapter, run) -> None:
    calls = []
    first(adapter).register_forward_hook(lambda *_: calls.append(1))
    run(adapter.mount().model)
    run(adapter.unmount().model)
    assert len(calls) == 2


def test_compiled_unets_see_the_mixer(adapter, run) -> None:
    unet = adapter.model
    base = run(adapter.model)
    attn = first(adapter)
    compiled = torch.compile(attn, backend="eager", fullgraph=True)
    x = torch.randn(1, 6, 8)
    before = compiled(x)
    with adapter.mounted():
        torch.testing.assert_close(compiled(x), attn(x))
        assert not torch.allclose(compiled(x), before, atol=1e-5)
    torch.testing.assert_close(compiled(x), before)
    assert torch.equal(run(unet), base)
