"""Mounting, unmounting and training, for every registered mixer."""

from __future__ import annotations

import json
from copy import deepcopy

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention

from mixers import list_mixers
from unet_adapters import MixerAdapter, capture_outputs
from unet_adapters.attention import MixerAttention
from unet_adapters.mounted_config import CONFIG_KEY
from unet_adapters.site_mount import SiteMount

every_mixer = pytest.mark.parametrize("name", list_mixers())


def same(left, right) -> bool:
    assert left.keys() == right.keys()
    return all(torch.equal(left[name], right[name]) for name in left)


@every_mixer
@torch.no_grad()
def test_mounting_is_reversible(unet, run, weights, name) -> None:
    base = run(unet)
    before = weights(unet)
    objects = dict(unet.named_parameters())
    modules = dict(unet.named_modules())
    processors = list(unet.attn_processors)
    adapter = MixerAdapter.build(unet, name)
    assert torch.equal(run(unet), base) and not adapter.is_mounted

    mounted = run(adapter.mount().model)
    assert adapter.is_mounted and list(unet.attn_processors) == processors
    if name in ("softmax", "softmax_window"):  # on so small an image, a window covers all tokens
        torch.testing.assert_close(mounted, base, rtol=1e-4, atol=1e-5)
    else:
        assert (mounted - base).abs().max() > 1e-5

    adapter.unmount()
    assert torch.equal(run(unet), base) and same(weights(unet), before)
    assert dict(unet.named_modules()) == modules and list(unet.attn_processors) == processors
    now = dict(unet.named_parameters())
    assert now.keys() == objects.keys() and all(now[key] is objects[key] for key in now)
    with adapter.mounted():
        assert torch.equal(run(unet), mounted)
        with adapter.unmounted():
            assert torch.equal(run(unet), base)
        assert torch.equal(run(unet), mounted)
    assert torch.equal(run(unet), base)


@every_mixer
@pytest.mark.parametrize("train_projections", [True, False])
def test_training_the_student_leaves_the_teacher_alone(unet, run, train, weights, name, train_projections) -> None:
    adapter = MixerAdapter.build(unet, name, train_projections=train_projections)
    if not list(adapter.student.parameters()):
        pytest.skip("this mixer has no weights of its own")
    unet.requires_grad_(False)
    teacher = weights(unet)
    student = weights(adapter.student)
    base = run(unet)
    train(adapter)
    assert same(weights(unet), teacher) and torch.equal(run(unet), base)
    assert not same(weights(adapter.student), student)
    assert not any(parameter.requires_grad for parameter in unet.parameters())
    assert all(parameter.requires_grad for parameter in adapter.student.parameters())


@every_mixer
def test_every_student_weight_gets_a_gradient_also_when_checkpointing(unet, run, name) -> None:
    adapter = MixerAdapter.build(unet, name).mount()
    unet.train()
    gradients = []
    for switch in (unet.disable_gradient_checkpointing, unet.enable_gradient_checkpointing):
        switch()
        adapter.student.zero_grad()
        run(unet).square().mean().backward()
        gradients.append({key: p.grad for key, p in adapter.parameters_by_name().items() if p.grad is not None})
    unused = adapter.parameters_by_name().keys() - gradients[0].keys()
    assert all(".to_q." in key or ".to_k." in key for key in unused)  # the controls read neither queries nor keys
    assert gradients[0] and same(*gradients)


def test_student_names_are_those_of_the_mounted_unet(unet) -> None:
    adapter = MixerAdapter.build(unet, "linfusion", select="every:2")
    names = adapter.parameters_by_name()
    assert {f"{adapter.sites[0].name}.{key}" for key in ("to_q.weight", "to_out.0.bias")} <= names.keys()
    teacher = dict(unet.named_parameters())
    with adapter.mounted():
        inside = dict(unet.named_parameters())
        assert all(inside[name] is parameter for name, parameter in names.items())
    shared = names.keys() & teacher.keys()
    assert shared and all(torch.equal(names[name], teacher[name]) for name in shared)


@torch.no_grad()
def test_hybrids_mount_the_chosen_sites_only(unet, run) -> None:
    mid_block = MixerAdapter.build(unet, "linear_attention", select="mid_block")
    rest = MixerAdapter.build(unet, "linear_attention", select=lambda site: site.group != "mid_block")
    base = run(unet)
    with mid_block.mounted():
        kinds = {name: type(m) for name, m in unet.named_modules() if name.endswith("attn1")}
        assert [n for n, kind in kinds.items() if kind is MixerAttention] == [site.name for site in mid_block.sites]
        alone = run(unet)
        with rest.mounted():
            both = run(unet)
        assert torch.equal(run(unet), alone)
    with MixerAdapter.build(unet, "linear_attention").mounted():
        assert torch.equal(run(unet), both)
    assert torch.equal(run(unet), base) and not torch.equal(base, alone)


@torch.no_grad()
def test_a_unet_of_the_sdxl_kind() -> None:
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=(2, 4),
        cross_attention_dim=12,
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=56,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()
    added = {"text_embeds": torch.randn(1, 8), "time_ids": torch.arange(6.0)[None]}
    inputs = torch.randn(1, 4, 7, 9), 3, torch.randn(1, 3, 12)
    base = unet(*inputs, added_cond_kwargs=added).sample
    adapter = MixerAdapter.build(unet, "linfusion")
    assert [site.heads for site in adapter.sites] == [4] * 8
    with adapter.mounted():
        assert not torch.equal(unet(*inputs, added_cond_kwargs=added).sample, base)
    assert torch.equal(unet(*inputs, added_cond_kwargs=added).sample, base)


def test_mounting_twice_does_nothing_and_another_adapter_is_refused(unet, run) -> None:
    first, second = (MixerAdapter.build(unet, "linear_attention") for _ in range(2))
    first.unmount()
    first.mount().mount()
    with pytest.raises(RuntimeError, match="another adapter"):
        second.mount()
    with pytest.raises(RuntimeError, match="another adapter"):
        MixerAdapter.build(unet, "linear_attention")
    assert first.is_mounted and not second.is_mounted
    second.unmount()
    assert first.is_mounted


@torch.no_grad()
def test_a_failure_while_mounting_rolls_back(unet, run, monkeypatch) -> None:
    adapter = MixerAdapter.build(unet, "linear_attention")
    base = run(unet)
    objects = dict(unet.named_parameters())
    mount = SiteMount.mount

    def failing(site_mount, min_tokens):
        mount(site_mount, min_tokens)
        if site_mount.site is adapter.sites[1]:
            raise KeyboardInterrupt

    monkeypatch.setattr(SiteMount, "mount", failing)
    with pytest.raises(KeyboardInterrupt):
        adapter.mount()
    assert torch.equal(run(unet), base) and not adapter.is_mounted
    assert all(parameter is objects[name] for name, parameter in unet.named_parameters())
    assert all(type(m) is Attention for m in unet.modules() if isinstance(m, Attention))


@torch.no_grad()
def test_deepcopy_of_a_mounted_unet_is_independent(unet, run, train) -> None:
    adapter = MixerAdapter.build(unet, "linfusion").mount()
    copy = deepcopy(unet)
    mounted = run(unet)
    assert torch.equal(run(copy), mounted)
    with torch.enable_grad():
        train(adapter)
    assert torch.equal(run(copy), mounted) and not torch.equal(run(unet), mounted)
    twin_unet, twin = deepcopy((unet, adapter))
    assert twin.model is twin_unet and torch.equal(run(twin_unet), run(unet))
    assert torch.equal(run(twin.unmount().model), run(adapter.unmount().model))


@torch.no_grad()
@pytest.mark.parametrize("mixer", ["linfusion", "retnet", "uniform"])  # with parameters, with buffers, with neither
@pytest.mark.parametrize("train_projections", [True, False])
def test_every_mixer_follows_its_own_layer_to_its_device(unet, mixer, train_projections) -> None:
    """As in a model that `device_map` splits; the second device here is "meta"."""
    adapter = MixerAdapter.build(unet, mixer, train_projections=train_projections)
    unet.mid_block.to("meta")
    for mount in adapter._mounts:
        mount.follow(None)
    for name in adapter.mixers:
        part = adapter.student.get_submodule(name)
        devices = {tensor.device.type for tensor in (*part.parameters(), *part.buffers())}
        assert devices <= {"meta" if name.startswith("mid_block") else "cpu"}


def test_the_student_follows_the_unet_to_another_dtype(unet, run) -> None:
    adapter = MixerAdapter.build(unet, "linfusion")
    unet.to(torch.bfloat16)
    base = run(unet)
    with adapter.mounted():
        assert run(unet).dtype == torch.bfloat16
        unet.to(torch.float32)
        assert run(unet).dtype == torch.float32
    assert {parameter.dtype for parameter in unet.parameters()} == {torch.float32}
    assert torch.equal(run(unet.to(torch.bfloat16)), base)


def test_status_lists_what_is_new(unet) -> None:
    adapter = MixerAdapter.build(unet, "linfusion")
    rows = adapter.status()
    assert [row.site for row in rows] == [site.name for site in adapter.sites]
    assert all(row.mixer == "linfusion" and row.new_parameters > 0 and not row.mounted for row in rows)
    assert all(row.mounted and row.tokens is None for row in adapter.mount().status())


def test_status_tells_the_tokens_that_sites_see(unet, run) -> None:
    adapter = MixerAdapter.build(unet, "linfusion")
    with adapter.mounted(), capture_outputs(unet, [site.name for site in adapter.sites]) as outputs:
        run(unet)
    rows = adapter.status(size=(64, 80))
    assert {row.site: row.tokens for row in rows} == {name: y.shape[1] for name, y in outputs.items()}
    table = str(rows).splitlines()
    assert len(table) == 1 + len({(row.group, row.tokens) for row in rows})
    assert "new parameters" in table[0] and "down_blocks.0" in table[1]


def test_a_mounted_unet_that_was_saved_is_read_again_as_such(unet, run, train, tmp_path) -> None:
    adapter = MixerAdapter.build(unet, "linfusion", select="mid_block")
    train(adapter)
    config = dict(unet.config)
    with adapter.mounted(), torch.no_grad():
        mounted = run(unet)
        unet.save_pretrained(tmp_path / "mounted")
    assert {k: v for k, v in unet.config.items() if k[0] != "_"} == {k: v for k, v in config.items() if k[0] != "_"}
    again = MixerAdapter.from_mounted(tmp_path / "mounted")
    assert again.is_mounted and [s.name for s in again.sites] == [s.name for s in adapter.sites]
    with torch.no_grad():
        assert torch.equal(run(again.model), mounted)
    unet.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="saved without mixers"):
        MixerAdapter.from_mounted(tmp_path / "plain")


@torch.no_grad()
@pytest.mark.parametrize("train_projections", [True, False])
@pytest.mark.parametrize("limits", [(0, 0), (4, 4), (0, 4), (10**6, 10**6)])
def test_a_mounted_unet_is_read_again_as_it_was_or_refused(unet, run, train_projections, limits, tmp_path) -> None:
    groups = ("down_blocks.*", "mid_block")
    for limit, group in zip(limits, groups, strict=True):
        adapter = MixerAdapter.build(
            unet, "linfusion", group, min_tokens=limit, train_projections=train_projections
        ).mount()
        for parameter in adapter.student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    expected = run(unet)
    unet.save_pretrained(tmp_path)
    if limits[0] != limits[1]:
        with pytest.raises(ValueError, match="min_tokens 0 and 4, of more than one adapter"):
            MixerAdapter.from_mounted(tmp_path)
    elif limits[0] and train_projections:
        with pytest.raises(ValueError, match="the teacher's projections, which a saved model lacks"):
            MixerAdapter.from_mounted(tmp_path)
    else:
        assert torch.equal(run(MixerAdapter.from_mounted(tmp_path).model), expected)


@pytest.mark.parametrize("entries", [["x"], {"mid_block": 3}, {"mid_block": {"mixer": "linfusion", "config": {}}}])
def test_a_saved_unet_with_damaged_mixers_is_one_sentence(entries, unet, tmp_path) -> None:
    with MixerAdapter.build(unet, "linear_attention", select="mid_block").mounted():
        unet.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, CONFIG_KEY: entries}))
    with pytest.raises(ValueError, match=r"entries of .* are missing or of the wrong kind"):
        MixerAdapter.from_mounted(tmp_path)


@torch.no_grad()
def test_capture_outputs_mounted_or_not(unet, run) -> None:
    adapter = MixerAdapter.build(unet, "linear_attention")
    names = [site.name for site in adapter.sites]
    with capture_outputs(unet, names) as teacher:
        run(unet)
    with adapter.mounted(), capture_outputs(unet, names) as student:
        run(unet)
    assert teacher.keys() == student.keys() == set(names)
    assert all(teacher[name].shape == student[name].shape for name in names)
    assert not torch.equal(teacher[names[0]], student[names[0]])
    assert all(not module._forward_hooks for module in unet.modules())
    with pytest.raises(ValueError, match="no layer 'nowhere'"), capture_outputs(unet, ["nowhere"]):
        pass
