"""diffusers' layer skipping without attention scores, as perturbed-attention guidance uses it, on mounted models."""

from __future__ import annotations

import pytest
import torch
from diffusers.hooks import HookRegistry, LayerSkipConfig, apply_layer_skip

from tests.unet_adapters.comparisons import close
from tests.unet_adapters.host_models import make_model, run
from unet_adapters import MixerAdapter

STACKS = {
    "UNet": "mid_block.attentions.0.transformer_blocks",
    "PixArt": "transformer_blocks",
}
CONFIG = {"indices": [0], "skip_attention": False, "skip_ff": False, "skip_attention_scores": True}


@torch.no_grad()
@pytest.mark.parametrize("mount_first", [True, False])
@pytest.mark.parametrize("kind", STACKS)
def test_attention_without_scores_is_the_identity_also_with_a_mixer(kind: str, mount_first: bool) -> None:
    """The student's projections are the teacher's here, so that both compute the same identity attention."""
    model = make_model(kind)
    adapter = MixerAdapter.build(model, "linear_attention", f"{STACKS[kind]}.0.*")
    base = run(model)
    with adapter.mounted():
        mixed = run(model)
    config = LayerSkipConfig(fqn=STACKS[kind], **CONFIG)
    if mount_first:
        adapter.mount()
    apply_layer_skip(model, config)
    with adapter.unmounted():
        perturbed = run(model)
    with adapter.mounted():
        assert close(run(model), perturbed)
    assert not close(perturbed, base, 1e-4) and not close(perturbed, mixed, 1e-4)
    HookRegistry.check_if_exists_or_initialize(model).remove_hook("layer_skip_hook")
    with adapter.mounted():
        assert torch.equal(run(model), mixed)


@pytest.mark.parametrize("kind", ["Flux", "HunyuanDiT", "SD3", "SD3.5 medium", "SD3.5 large"])
def test_diffusers_itself_refuses_it_for_other_transformers_mounted_or_not(kind: str) -> None:
    """If it learns them, their dispatchers must learn it too."""
    model = make_model(kind)
    config = LayerSkipConfig(fqn="blocks" if kind == "HunyuanDiT" else "transformer_blocks", **CONFIG)
    for mounted in (False, True):
        if mounted:
            MixerAdapter.build(model, "linear_attention").mount()
        with pytest.raises((ValueError, AttributeError), match=r"not registered|is_cross_attention"):
            apply_layer_skip(model, config)
