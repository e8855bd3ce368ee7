"""Mounted UNets in diffusers' pipelines: what is done to a pipeline works as it does on a stock one, in any order."""

from __future__ import annotations

from copy import deepcopy

import accelerate
import pytest
import torch
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPAGPipeline,
)
from diffusers.hooks import HookRegistry
from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0

from tests.unet_adapters.comparisons import assert_same_model, close, fingerprint, mounted_layers
from tests.unet_adapters.pipelines import (
    CHANGES,
    MIXERS,
    PIPELINES,
    column_scan,
    component,
    linfusion,
    load_ip_adapter,
    load_lora,
    make,
    noise,
    run,
)
from unet_adapters import MixerAdapter

every_mixer = pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)


@every_mixer
@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines(name, mixer) -> None:
    """The mixers are in force; what they do is exactly undone; only the UNet's own self-attention is touched."""
    pipe = make(name)
    then = fingerprint(pipe.unet)
    base = run(pipe, name)
    adapter = mixer(pipe).mount()
    mounted = run(pipe, name)
    assert mounted.isfinite().all() and not close(mounted, base, 1e-2)
    layers = mounted_layers(pipe.unet)
    assert layers == [site.name for site in adapter.sites]
    assert all(layer.endswith("attn1") and "motion_modules" not in layer for layer in layers)
    assert torch.equal(run(pipe, name), mounted)
    adapter.unmount()
    assert torch.equal(run(pipe, name), base)
    assert_same_model(fingerprint(pipe.unet), then)


GUIDES = {
    "ControlNet": {"controlnet_conditioning_scale": 0.0},
    "multi-ControlNet": {"controlnet_conditioning_scale": [0.0, 0.0]},
    "T2I-Adapter": {"adapter_conditioning_scale": 0.0},
    "PAG": {"pag_scale": 0.0},
}


@pytest.mark.parametrize(("name", "off"), GUIDES.items())
def test_guides_act_on_a_mounted_unet(name, off) -> None:
    pipe = make(name)
    plain = make()
    for host in (pipe, plain):
        linfusion(host).mount()
    assert close(run(pipe, name, **off), run(plain))
    assert not close(run(pipe, name), run(plain), 1e-3)


@every_mixer
def test_a_controlnet_has_sites_of_its_own(mixer) -> None:
    pipe = make("ControlNet")
    base = run(pipe, "ControlNet")
    with mixer(pipe).mounted():
        one = run(pipe, "ControlNet")
        with mixer(pipe.controlnet).mounted():
            assert not close(run(pipe, "ControlNet"), one, 1e-3)
        assert torch.equal(run(pipe, "ControlNet"), one)
    assert torch.equal(run(pipe, "ControlNet"), base)


@every_mixer
def test_from_pipe_shares_the_mounted_unet(mixer) -> None:
    pipe = make()
    base = run(pipe)
    adapter = mixer(pipe).mount()
    for kind, name in ((StableDiffusionImg2ImgPipeline, "img2img"), (StableDiffusionPAGPipeline, "PAG")):
        other = kind.from_pipe(pipe)
        fresh = make(name)
        assert other.unet is pipe.unet
        with mixer(fresh).mounted():
            assert torch.equal(run(other, name), run(fresh, name))
    adapter.unmount()
    assert torch.equal(run(pipe), base)


CASES = [("text-to-image", "linfusion", change) for change in CHANGES]
CASES += [("text-to-image", "column scan", change) for change in ("LoRA", "IP-Adapter", "FreeU", "channels last")]
CASES += [("SDXL", "linfusion", change) for change in ("LoRA", "IP-Adapter with a mask", "FreeU")]


@pytest.mark.parametrize(("name", "mixer", "change"), CASES)
def test_before_and_after_mounting_is_the_same(name, mixer, change) -> None:
    pipe, change = make(name), CHANGES[change]
    then = fingerprint(pipe.unet)
    base = run(pipe, name)
    adapter = MIXERS[mixer](pipe).mount()
    plain = run(pipe, name)

    change.do(pipe)
    after = run(pipe, name, **change.call())
    assert close(after, plain) == change.keeps
    adapter.unmount()
    stock = run(pipe, name, **change.call())
    assert not close(after, stock, 1e-3)
    adapter.mount()  # done before mounting, the adapter built before it was done
    assert close(run(pipe, name, **change.call()), after)
    change.undo(pipe)
    assert close(run(pipe, name), plain)
    adapter.unmount()
    assert torch.equal(run(pipe, name), base)
    assert_same_model(fingerprint(pipe.unet), then)

    change.do(pipe)
    adapter = MIXERS[mixer](pipe).mount()  # built after it was done
    assert close(run(pipe, name, **change.call()), after)
    adapter.unmount()
    change.undo(pipe)  # undone after unmounting
    assert torch.equal(run(pipe, name), base)
    assert_same_model(fingerprint(pipe.unet), then)


@every_mixer
def test_a_lora_that_is_fused_while_mounted(mixer) -> None:
    """As stock: fusing adds to the weights, so that unfusing gives them back up to rounding."""
    pipe = make()
    base = run(pipe)
    adapter = mixer(pipe)
    plain = run(adapter.mount() and pipe)
    load_lora(pipe)
    loaded = run(pipe)
    pipe.fuse_lora()
    assert close(run(pipe), loaded)
    for act in (adapter.unmount, lambda: adapter.save_pretrained("nowhere")):
        with pytest.raises(RuntimeError, match="LoRA is fused"):
            act()
    assert close(run(pipe), loaded)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert close(run(pipe), plain, 1e-4)
    adapter.unmount()
    assert close(run(pipe), base, 1e-4)


@every_mixer
def test_a_lora_that_is_fused_and_unloaded_before_mounting_is_part_of_the_teacher(mixer) -> None:
    pipe = make()
    load_lora(pipe)
    with mixer(pipe).mounted():
        loaded = run(pipe)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    with mixer(pipe).mounted():
        assert close(run(pipe), loaded)


@every_mixer
def test_a_dtype_before_and_after_mounting(mixer) -> None:
    first = make()
    second = make()
    adapters = mixer(first).mount(), mixer(second)
    plain = run(first)
    for pipe in (first, second):
        pipe.to(dtype=torch.bfloat16)
    stock = run(second)
    with adapters[1].mounted():
        after = run(second)
        assert after.dtype == torch.bfloat16 and torch.equal(run(first), after)
        assert (after - plain).abs().mean() < 0.5 * (stock - plain).abs().mean()
    assert torch.equal(run(second), stock)
    adapters[0].unmount()
    assert torch.equal(run(first), stock)


@every_mixer
def test_copies_of_a_pipeline(mixer) -> None:
    pipe = make()
    base = run(pipe)
    adapter = mixer(pipe).mount()
    mounted = run(pipe)
    alone = deepcopy(pipe.unet)
    pipe.unet, original = alone, pipe.unet
    assert torch.equal(run(pipe), mounted)
    pipe.unet, twin = deepcopy((original, adapter))
    assert torch.equal(run(pipe), mounted)
    twin.unmount()
    assert torch.equal(run(pipe), base) and not mounted_layers(pipe.unet)
    pipe.unet = original
    assert torch.equal(run(pipe), mounted)


@every_mixer
def test_sequential_offload(mixer) -> None:
    """After mounting it works; before, mounting is refused with nothing changed, and the way around it works."""
    pipe = make()
    base = run(pipe)
    adapter = mixer(pipe).mount()
    mounted = run(pipe)
    accelerate.cpu_offload(pipe.unet, execution_device="cpu")  # what enable_sequential_cpu_offload does to each model
    assert close(run(pipe), mounted)
    for act in (adapter.unmount, lambda: adapter.save_pretrained("nowhere")):
        with pytest.raises(RuntimeError, match="on the meta device"):
            act()
    assert close(run(pipe), mounted)
    pipe.remove_all_hooks()
    assert torch.equal(run(adapter.unmount() and pipe), base)

    accelerate.cpu_offload(pipe.unet, execution_device="cpu")
    for act in (adapter.mount, lambda: mixer(pipe)):
        with pytest.raises(RuntimeError, match="remove the offloading hooks"):
            act()
    assert torch.equal(run(pipe), base) and not mounted_layers(pipe.unet)
    pipe.remove_all_hooks()
    accelerate.cpu_offload(adapter.mount().model, execution_device="cpu")
    assert close(run(pipe), mounted)


@every_mixer
@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offload(mixer, kind) -> None:
    pipe = make()
    base = run(pipe)
    adapter = mixer(pipe).mount()
    mounted = run(pipe)
    pipe.unet.enable_group_offload(torch.device("cpu"), offload_type=kind, num_blocks_per_group=1)
    assert close(run(pipe), mounted)
    with pytest.raises(RuntimeError, match="group offloading is on"):
        adapter.unmount()
    for module in pipe.unet.modules():
        HookRegistry.check_if_exists_or_initialize(module).remove_hook("group_offloading", recurse=False)
    adapter.unmount()
    assert torch.equal(run(pipe), base)


@torch.no_grad()
def test_layerwise_casting() -> None:
    pipe = make()
    pipe.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    with pytest.raises(ValueError, match="train_projections=False"):
        MixerAdapter.build(pipe, "linfusion")
    stock = run(pipe)
    adapter = MixerAdapter.build(pipe, "linfusion", train_projections=False)
    assert {parameter.dtype for parameter in adapter.student.parameters()} == {torch.float32}
    with adapter.mounted():
        assert not close(run(pipe), stock, 1e-2)
    assert torch.equal(run(pipe), stock)
    pipe = make()
    linfusion(pipe).mount()
    mounted = run(pipe)
    pipe.unet.enable_layerwise_casting(torch.bfloat16, torch.float32)
    assert close(run(pipe), mounted, 0.1)


@torch.no_grad()
def test_compiled_before_mounting() -> None:
    """What was compiled sees mounting and unmounting, and the hooks that tell the grid."""
    unet = component("unet")
    inputs = (noise(1, 4, 8, 12), 7, noise(1, 3, 8))
    adapter = column_scan(unet)
    base = unet(*inputs).sample
    with adapter.mounted():
        mounted = unet(*inputs).sample
    unet.mid_block.attentions[0].compile(backend="eager", fullgraph=True)
    assert close(unet(*inputs).sample, base)
    with adapter.mounted():
        assert close(unet(*inputs).sample, mounted)
    assert close(unet(*inputs).sample, base) and not close(mounted, base, 1e-2)


@every_mixer
def test_self_attention_guidance_is_refused(mixer) -> None:
    from diffusers import StableDiffusionSAGPipeline

    pipe = make()
    adapter = mixer(pipe).mount()
    mounted = run(pipe)
    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    sag = StableDiffusionSAGPipeline(**parts, requires_safety_checker=False)
    with pytest.raises(ValueError, match="CrossAttnStoreProcessor works on softmax attention"):
        run(sag, sag_scale=1.0)
    assert torch.equal(run(pipe), mounted)
    with adapter.unmounted():
        run(sag, sag_scale=1.0)


@every_mixer
@torch.no_grad()
def test_a_mask_that_hides_tokens_is_refused(mixer) -> None:
    unet = component("unet")
    inputs = (noise(1, 4, 8, 12), 7, noise(1, 3, 8))
    mask = torch.ones(1, 96)
    with mixer(unet).mounted(), pytest.raises(ValueError, match="hides tokens"):
        unet(*inputs, attention_mask=mask.index_fill(1, torch.tensor([3]), 0))


def test_cross_attention_is_never_touched() -> None:
    pipe = make()
    load_ip_adapter(pipe)
    cross = {name: m for name, m in pipe.unet.named_modules() if name.endswith("attn2")}
    linfusion(pipe).mount()
    assert all(type(layer) is Attention and layer is cross[name] for name, layer in cross.items())
    assert all(isinstance(layer.processor, IPAdapterAttnProcessor2_0) for layer in cross.values())
