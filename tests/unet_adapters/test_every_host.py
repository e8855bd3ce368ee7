"""Every kind of host with every mixer: mounted, unmounted, trained, saved, offloaded, compiled."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import accelerate
import pytest
import torch
from diffusers import (
    Flux2Transformer2DModel,
    Lumina2Transformer2DModel,
    PixArtTransformer2DModel,
)

from mixers import list_mixers
from tests.unet_adapters.comparisons import close
from tests.unet_adapters.host_models import MODELS, SIZES, checkpoint_blocks, disturb, make_inputs, make_model, run
from unet_adapters import MixerAdapter, find_host, find_sites
from unet_adapters.capture import capture_sites, replay
from unet_adapters.mounted_layer import image_output

# Mixers that can be softmax attention on so small an image: one block of keys, and a window that covers it.
SOFTMAX_HERE = {"softmax_window", "sparse_linear"}

# Mixers that a host with rotary embeddings refuses, the reason, and the options with which it takes them.
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "mila": ("it rotates by positions of its own", {"rotary": False}),
    "rala": ("it rotates by positions of its own", {"rotary": False, "rope": "before_map"}),
    "polaformer": ("its numerator and its denominator are not computed apart", {"rope": "before_map"}),
    "sparse_linear": ("its linear part maps what its exact part rotates", {"rope": "before_map"}),
    "linfusion_low_rank": ("its features are k·r products", {"rope": "before_map"}),
}


@pytest.fixture(params=list(MODELS))
def kind(request) -> str:
    return request.param


@pytest.fixture
def model(kind) -> Any:
    return make_model(kind)


def options_for(model: Any, name: str) -> dict[str, Any]:
    rotary = any(site.rotary for site in find_sites(model))
    return REFUSED[name][1] if rotary and name in REFUSED else {}


@torch.no_grad()
def test_softmax_is_the_stock_model_in_both_streams(model) -> None:
    base = run(model)
    sites = find_sites(model)
    outputs: dict[str, list[Any]] = {site.name: [] for site in sites}
    for site in sites:
        layer = model.get_submodule(site.name)
        layer.register_forward_hook(lambda _m, _a, output, name=site.name: outputs[name].append(output))
    run(model)
    with MixerAdapter.build(model, "softmax").mounted():
        assert close(run(model), base, 1e-5)
    for stock, mounted in outputs.values():
        pairs = zip(stock, mounted, strict=True) if isinstance(stock, tuple) else [(stock, mounted)]
        assert all(close(mixed, expected, 1e-5) for expected, mixed in pairs)
    assert torch.equal(run(model), base)


@pytest.mark.parametrize("name", list_mixers())
def test_every_mixer_mounts_trains_and_leaves_or_is_refused(model, name) -> None:
    base = run(model)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    objects = dict(model.named_parameters())
    options = options_for(model, name)
    if options:
        with pytest.raises(ValueError, match=REFUSED[name][0]):
            MixerAdapter.build(model, name)
    adapter = MixerAdapter.build(model, name, **options).mount()
    mixed = run(model)
    assert mixed.shape == base.shape and mixed.isfinite().all()
    if name not in SOFTMAX_HERE:
        assert close(mixed, base, 1e-5) == (name == "softmax")
    mixed.square().mean().backward()
    unused = [key for key, parameter in adapter.parameters_by_name().items() if parameter.grad is None]
    # The controls read neither queries nor keys, except that the text is read with the queries of joint attention.
    assert all(".to_q." in key or ".to_k." in key for key in unused)
    adapter.unmount()
    assert torch.equal(run(model), base)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert all(parameter is objects[key] for key, parameter in model.named_parameters())


@pytest.mark.parametrize("text", ["softmax", "shared", "linear"])
def test_every_text_mode_runs_where_there_is_text(model, text) -> None:
    base = run(model)
    if not any(site.text for site in find_sites(model)):
        with pytest.raises(ValueError, match=f"text='{text}' has no effect: none of the selected sites"):
            MixerAdapter.build(model, "linear_attention", text=text)
        return
    outputs = {}
    for mode in ("softmax", "shared", "linear"):
        with MixerAdapter.build(model, "linear_attention", text=mode).mounted():
            outputs[mode] = run(model)
    assert not close(outputs[text], base, 1e-5) and outputs[text].isfinite().all()
    assert sum(close(outputs[text], other, 1e-5) for other in outputs.values()) == 1


def test_a_temperature_where_queries_and_keys_are_normed(model) -> None:
    adapter = MixerAdapter.build(model, "linear_attention")
    for site in adapter.sites:
        temperature = adapter.mixers[site.name].log_temperature
        assert (temperature is not None) == site.qk_norm


@torch.no_grad()
def test_sites_and_tokens(model) -> None:
    host = find_host(model)
    sites = host.sites()
    assert [site.name for site in sites] == [n for n, _ in model.named_modules() if n in {s.name for s in sites}]
    adapter = MixerAdapter.build(model, "linear_attention", causality="causal", scan="column")
    for mounted in (False, True):
        adapter.mount() if mounted else adapter.unmount()
        for size in SIZES:
            with capture_sites(model, [site.name for site in sites]) as calls:
                run(model, size)
            for site in sites:
                call = calls[site.name]
                assert call.grid is not None and call.grid[0] * call.grid[1] == call.tokens
                assert call.tokens == host.tokens_at(site, size)
                assert torch.equal(replay(model, site.name, call), call.output)


@torch.no_grad()
def test_replaying_a_teachers_call_on_the_student(model) -> None:
    adapter = MixerAdapter.build(model, "softmax", causality="noncausal")
    names = [site.name for site in adapter.sites]
    with capture_sites(model, names) as calls:
        run(model)
    with adapter.mounted():
        for name in names:
            assert close(replay(model, name, calls[name]), calls[name].output, 1e-5)


def test_two_sizes_before_one_backward_under_gradient_checkpointing(model) -> None:
    adapter = MixerAdapter.build(model, "linear_attention", causality="causal", scan="column").mount()
    gradients = {}
    for checkpointing in (False, True):
        if checkpointing:
            checkpoint_blocks(model)
        model.train()
        loss = sum(run(model, size).square().mean() for size in SIZES)
        gradients[checkpointing] = torch.autograd.grad(loss, list(adapter.student.parameters()), allow_unused=True)
    for plain, again in zip(gradients[False], gradients[True], strict=True):
        assert plain is again is None or torch.equal(plain, again)


NOT_FUSED = {"SD3.5 medium"}  # diffusers' fused joint processor does not run attn2, mounted or not


@torch.no_grad()
def test_min_tokens_and_fused_projections(model, kind) -> None:
    base = run(model)
    adapter = disturb(MixerAdapter.build(model, "linfusion", min_tokens=1000))
    with adapter.mounted():
        assert torch.equal(run(model), base)
        model.fuse_qkv_projections()
        if kind not in NOT_FUSED:
            assert close(run(model), base, 1e-5)
        with pytest.raises(RuntimeError, match="unfuse_qkv_projections"):
            adapter.unmount()
        model.unfuse_qkv_projections()
    assert torch.equal(run(model), base)


@torch.no_grad()
def test_adapters_and_mounted_models_are_saved(model, tmp_path) -> None:
    other = deepcopy(model)
    base = run(model)
    adapter = disturb(MixerAdapter.build(model, "linfusion", "every:2"))
    adapter.save_pretrained(tmp_path / "adapter")
    with adapter.mounted():
        mixed = run(model)
        model.save_pretrained(tmp_path / "mounted")
    assert torch.equal(run(model), base) and not close(mixed, base, 1e-5)
    with MixerAdapter.from_pretrained(tmp_path / "adapter", other).mounted():
        assert torch.equal(run(other), mixed)
    assert torch.equal(run(MixerAdapter.from_mounted(tmp_path / "mounted").model), mixed)


def test_another_architecture_is_refused(model, tmp_path) -> None:
    MixerAdapter.build(model, "linfusion").save_pretrained(tmp_path)
    with torch.device("meta"):
        other = PixArtTransformer2DModel(num_attention_heads=2, attention_head_dim=4, num_layers=1)
    with pytest.raises(ValueError, match="made for another model; these sites differ"):
        MixerAdapter.from_pretrained(tmp_path, other)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["Flux"])
def test_a_mask_hides_the_padding_of_the_text(model) -> None:
    host = find_host(model)
    inputs = host.dummy_inputs(SIZES[0], batch=2)
    length = inputs["encoder_hidden_states"].shape[1] + inputs["hidden_states"].shape[1]
    mask = torch.ones(2, 1, 1, length, dtype=torch.bool)
    mask[1, ..., 4:512] = False  # the second prompt has four tokens
    inputs["joint_attention_kwargs"] = {"attention_mask": mask}
    stock = model(**inputs).sample
    with MixerAdapter.build(model, "softmax").mounted():
        assert close(model(**inputs).sample, stock, 1e-5)
    short = {**inputs, "joint_attention_kwargs": None}
    short |= {name: inputs[name][1:] for name in ("hidden_states", "pooled_projections", "timestep")}
    short["encoder_hidden_states"] = inputs["encoder_hidden_states"][1:, :4]
    short["txt_ids"] = inputs["txt_ids"][:4]
    for text in ("softmax", "shared", "linear"):
        with MixerAdapter.build(model, "linear_attention", text=text).mounted():
            assert close(model(**inputs).sample[1:], model(**short).sample, 1e-5)


# Kinds whose layers take a mask and do nothing with it, mounted or not.
MASKS_IGNORED = {"SD3", "SD3.5 medium", "SD3.5 large"}


@torch.no_grad()
def test_a_layer_treats_a_mask_as_the_stock_layer_does(model, kind) -> None:
    if kind.startswith("Flux"):
        pytest.skip("the text is in the mask: see test_a_mask_hides_the_padding_of_the_text")
    site = find_sites(model)[0]
    layer = model.get_submodule(site.name)
    tokens = torch.randn(2, 6, site.dim)
    arguments = {"encoder_hidden_states": torch.randn(2, 3, site.dim)} if site.text else {}
    mask = torch.zeros(2, 1, 6)
    mask[..., 4:] = -1e4
    stock = image_output(layer(tokens, attention_mask=mask, **arguments))
    assert torch.equal(stock, image_output(layer(tokens, **arguments))) == (kind in MASKS_IGNORED)
    with MixerAdapter.build(model, "softmax", site.name).mounted():
        assert close(image_output(layer(tokens, attention_mask=mask, **arguments)), stock, 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["HunyuanDiT"])
def test_one_rotation_for_all_tokens_and_none(model) -> None:
    inputs = make_inputs(model)
    one = tuple(part[:1] for part in inputs["image_rotary_emb"])
    repeated = tuple(part.expand(24, -1) for part in one)
    with MixerAdapter.build(model, "linear_attention", causality="causal", scan="column").mounted():
        outputs = [model(**inputs | {"image_rotary_emb": rotary}).sample for rotary in (one, repeated)]
        assert torch.equal(*outputs)
    for rotary in (one, None):
        inputs["image_rotary_emb"] = rotary
        stock = model(**inputs).sample
        with MixerAdapter.build(model, "softmax").mounted():
            assert close(model(**inputs).sample, stock, 1e-5)


OFFLOADING = {
    "model": lambda model: accelerate.cpu_offload_with_hook(model, execution_device="cpu"),
    "sequential": lambda model: accelerate.cpu_offload(model, execution_device="cpu"),
    "group": lambda model: model.enable_group_offload(torch.device("cpu"), offload_type="leaf_level"),
}


# HunyuanDiT's text pooling reads weights of its layers without calling them, which leaf-wise hooks do not see.
NOT_OFFLOADED = {("HunyuanDiT", "sequential"), ("HunyuanDiT", "group")}


@torch.no_grad()
@pytest.mark.parametrize("offloading", OFFLOADING)
def test_offloading_changes_nothing(model, kind, offloading) -> None:
    inputs = make_inputs(model)
    if (kind, offloading) in NOT_OFFLOADED:  # also without a mixer
        with pytest.raises((ValueError, RuntimeError), match=r"does not support group offloading|meta"):
            OFFLOADING[offloading](model)
            model(**inputs)
        return
    disturb(MixerAdapter.build(model, "linfusion")).mount()
    expected = run(model)
    OFFLOADING[offloading](model)
    assert close(model(**inputs).sample, expected)
    assert close(model(**inputs).sample, expected)


@torch.no_grad()
def test_a_compiled_block_computes_the_same(model, kind) -> None:
    if kind == "UNet":
        pytest.skip("a whole tiny UNet compiles for a minute; test_pipelines.py compiles one transformer of it")
    base = run(model)
    adapter = disturb(MixerAdapter.build(model, "linfusion", causality="causal", scan="column"))
    with adapter.mounted():
        expected = run(model)
    torch._dynamo.reset()
    for group in (adapter.sites[0].group, adapter.sites[-1].group):  # of Flux, a double and a single block
        model.get_submodule(group).compile(backend="eager", fullgraph=True)
    with adapter.mounted():
        assert close(run(model), expected, 1e-5)
    assert close(run(model), base, 1e-5)


def flux2() -> Any:
    return Flux2Transformer2DModel(num_layers=1, num_single_layers=1, num_attention_heads=2, attention_head_dim=16)


def lumina2() -> Any:
    return Lumina2Transformer2DModel(hidden_size=24, num_layers=1, num_refiner_layers=1, num_attention_heads=2)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (flux2, "Flux2Transformer2DModel: its blocks fuse the projections"),
        (lumina2, "Lumina2Transformer2DModel: it joins text and image in one sequence, in which the image begins"),
    ],
)
def test_architectures_without_a_host_are_refused_with_the_reason(make, reason) -> None:
    with torch.device("meta"):
        model = make()
    with pytest.raises(TypeError, match=f"cannot mount mixers in {reason}"):
        find_sites(model)
