"""Processors of a mounted model: refused as a whole or set as a whole; stock ones by a table, not by their module."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from diffusers.models import attention_processor as stock
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from hypothesis import given
from hypothesis import strategies as st

from tests.unet_adapters.host_models import make_model
from unet_adapters import MixerAdapter
from unet_adapters.attention import MixerAttention


class StoreProcessor:
    """A processor of a user, which has a state."""

    def __init__(self) -> None:
        self.probabilities: list[torch.Tensor] = []

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        return AttnProcessor()(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


KINDS = (AttnProcessor, AttnProcessor2_0, StoreProcessor)


@given(kinds=st.lists(st.sampled_from(KINDS), min_size=12, max_size=12), select=st.sampled_from(["all", "up_blocks.*"]))
def test_processors_are_set_for_all_layers_or_for_none(tiny_unet, kinds, select) -> None:
    unet = deepcopy(tiny_unet)
    adapter = MixerAdapter.build(unet, "linear_attention", select).mount()
    before = unet.attn_processors
    processors = {name: kind() for name, kind in zip(before, kinds, strict=False)}
    mounted = {f"{site.name}.processor" for site in adapter.sites}
    if any(isinstance(processors[name], StoreProcessor) for name in mounted):
        with pytest.raises(ValueError, match="StoreProcessor works on softmax"):
            unet.set_attn_processor(dict(processors))
        assert unet.attn_processors == before
    else:
        unet.set_attn_processor(dict(processors))
        assert unet.attn_processors == processors


def test_one_foreign_processor_for_all_layers_changes_nothing(unet) -> None:
    MixerAdapter.build(unet, "linear_attention", "mid_block").mount()
    before = unet.attn_processors
    with pytest.raises(ValueError, match="StoreProcessor works on softmax"):
        unet.set_attn_processor(StoreProcessor())
    assert unet.attn_processors == before


@torch.no_grad()
def test_the_check_goes_with_the_last_adapter_and_into_copies(unet, run) -> None:
    down, rest = (MixerAdapter.build(unet, "linear_attention", select) for select in ("down_blocks.*", "up_blocks.*"))
    base = run(unet)
    down.mount()
    rest.mount()
    copied = deepcopy(unet)
    down.unmount()
    for model in (unet, copied):
        with pytest.raises(ValueError, match="StoreProcessor"):
            model.set_attn_processor(StoreProcessor())
    rest.unmount()
    assert "set_attn_processor" not in vars(unet)
    unet.set_attn_processor(StoreProcessor())
    torch.testing.assert_close(run(unet), base, rtol=1e-4, atol=1e-5)
    copied.set_attn_processor(AttnProcessor())
    assert all(type(processor) is AttnProcessor for processor in copied.attn_processors.values())
    assert all(type(processor) is StoreProcessor for processor in unet.attn_processors.values())


def backends_of(model: torch.nn.Module) -> set[object]:
    return {processor._attention_backend for processor in model.attn_processors.values()}


def test_an_attention_backend_reaches_the_processors_of_mounted_layers(monkeypatch) -> None:
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry._active_backend)
    model = make_model("Flux")
    adapter = MixerAdapter.build(model, "linear_attention", "transformer_blocks.*").mount()
    classes = [type(module) for module in model.modules()]
    model.set_attention_backend("_native_math")
    assert [type(module) for module in model.modules()] == classes
    assert backends_of(model) == {"_native_math"}
    with pytest.raises(ValueError, match="must be one of"):
        model.set_attention_backend("nothing")
    assert [type(module) for module in model.modules()] == classes
    adapter.unmount()
    assert backends_of(model) == {"_native_math"}
    adapter.mount()
    model.reset_attention_backend()
    adapter.unmount()
    assert backends_of(model) == {None}
    assert not {"set_attention_backend", "reset_attention_backend"} & set(vars(model))


def test_processors_with_weights_of_their_own_are_refused() -> None:
    """Where a class is defined says nothing about what it computes."""
    refused = [
        stock.CustomDiffusionAttnProcessor(hidden_size=8, cross_attention_dim=8),
        stock.IPAdapterAttnProcessor2_0(8, 8),
        stock.SD3IPAdapterJointAttnProcessor2_0(8, 8, 2),
    ]
    for processor in refused:
        with pytest.raises(ValueError, match=type(processor).__name__):
            MixerAttention.require_supported(processor)
