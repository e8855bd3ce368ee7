"""Mixers that scan an image get its size with each call; hybrids are softmax attention below `min_tokens`."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from unet_adapters import MixerAdapter, capture_outputs

TWO_D = {"causality": "causal", "scan": "column"}


def noise(height: int, width: int, seed: int = 0) -> tuple[torch.Tensor, int, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 4, height, width, generator=generator), 7, torch.randn(2, 3, 12, generator=generator)


def test_a_column_scan_is_a_raster_scan_of_the_image_turned(unet) -> None:
    """The grid is right at every call, whatever the size; each site sees (height, width) of its own level."""
    column = MixerAdapter.build(unet, "linear_attention", train_projections=False, **TWO_D)
    raster = MixerAdapter.build(unet, "linear_attention", train_projections=False, causality="causal")
    for height, width in ((8, 10), (12, 6), (8, 10)):
        with torch.no_grad():
            for site in column.sites:
                with capture_inputs(unet, site.name) as inputs, column.mounted():
                    unet(*noise(height, width))
                x = inputs[0]
                grid = (height, width) if x.shape[1] == height * width else (height // 2, width // 2)
                attn = unet.get_submodule(site.name)
                transposed = x.unflatten(1, grid).transpose(1, 2).flatten(1, 2)
                expected = raster.mixers[site.name](transposed, projections=attn)
                got = column.mixers[site.name](x, grid=grid, projections=attn)
                back = expected.unflatten(1, grid[::-1]).transpose(1, 2).flatten(1, 2)
                torch.testing.assert_close(got, back)
                with capture_outputs(unet, [site.name]) as out, column.mounted():
                    unet(*noise(height, width))
                torch.testing.assert_close(out[site.name], got)


def capture_inputs(unet, name):
    from contextlib import contextmanager

    @contextmanager
    def hooked():
        inputs = []
        attn = unet.get_submodule(name)
        handle = attn.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
        try:
            yield inputs
        finally:
            handle.remove()

    return hooked()


def test_two_sizes_before_one_backward_under_gradient_checkpointing(unet) -> None:
    """The recomputation gets the grid of its own forward, not of the last one."""
    adapter = MixerAdapter.build(unet, "linear_attention", **TWO_D).mount()
    gradients = {}
    for checkpointing in (False, True):
        if checkpointing:
            unet.enable_gradient_checkpointing()
        unet.train()
        loss = sum(unet(*noise(*size)).sample.square().mean() for size in ((8, 10), (10, 8)))
        gradients[checkpointing] = torch.autograd.grad(loss, list(adapter.student.parameters()))
    for plain, again in zip(gradients[False], gradients[True], strict=True):
        assert torch.equal(plain, again)


def test_hooks_go_with_unmounting_and_copies_keep_theirs(unet, run) -> None:
    base = run(unet)
    adapter = MixerAdapter.build(unet, "linear_attention", **TWO_D).mount()
    mounted = run(unet)
    copied = deepcopy(unet)
    adapter.unmount()
    assert torch.equal(run(unet), base)
    assert not any(module._forward_pre_hooks for module in unet.modules())
    assert torch.equal(run(copied), mounted)


def test_nobody_else_sees_the_grid(unet, caplog) -> None:
    """No warning of a stock processor about an argument it does not know, hybrids included."""
    for select in ("all", "every:2"):
        with MixerAdapter.build(unet, "linear_attention", select=select, **TWO_D).mounted(), torch.no_grad():
            unet(*noise(8, 8), cross_attention_kwargs={})
    assert "mixer_grid" not in caplog.text


@pytest.mark.parametrize("train_projections", [True, False])
def test_softmax_below_min_tokens(unet, train, train_projections) -> None:
    """Below it the teacher bit-identically, whatever was trained; from it on the mixer; nothing is remembered."""
    adapter = MixerAdapter.build(unet, "linfusion", min_tokens=20, train_projections=train_projections)
    with torch.no_grad():
        base = {size: unet(*noise(*size)).sample for size in ((4, 4), (8, 10))}
    train(adapter)
    plain = MixerAdapter.build(unet, "linfusion", train_projections=train_projections)
    plain.student.load_state_dict(adapter.student.state_dict())
    with torch.no_grad():
        with plain.mounted():
            mixed = {size: unet(*noise(*size)).sample for size in base}
        with adapter.mounted():
            for size in ((8, 10), (4, 4), (8, 10)):
                y = unet(*noise(*size)).sample
                if size == (4, 4):
                    assert torch.equal(y, base[size])
                else:
                    torch.testing.assert_close(y, mixed[size])
    assert not torch.allclose(mixed[4, 4], base[4, 4], atol=1e-5)


def test_min_tokens_survives_saving_and_is_checked(unet, tmp_path) -> None:
    MixerAdapter.build(unet, "linfusion", min_tokens=50).save_pretrained(tmp_path)
    assert MixerAdapter.from_pretrained(tmp_path, unet).min_tokens == 50
    with pytest.raises(ValueError, match="min_tokens=-1"):
        MixerAdapter.build(unet, "linfusion", min_tokens=-1)
