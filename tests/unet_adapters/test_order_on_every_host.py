"""Every kind of host under mounting, LoRA, gradient checkpointing and copying: their order does not matter."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor

from tests.unet_adapters.comparisons import close
from tests.unet_adapters.host_models import MODELS, SIZES, disturb, make_model, run
from unet_adapters import MixerAdapter

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


class World:
    """A model, an adapter, and what is in force."""

    def __init__(self, kind: str) -> None:
        self.model = make_model(kind)
        torch.manual_seed(4)
        self.adapter = disturb(MixerAdapter.build(self.model, "retnet", normalize=True, scan="column"))
        self.mounted = False
        self.lora = False
        self.checkpointing = False

    def do(self, operation: str) -> None:
        getattr(self, f"do_{operation}")()

    def do_mount(self) -> None:
        self.adapter.mount()
        self.mounted = True

    def do_unmount(self) -> None:
        self.adapter.unmount()
        self.mounted = False

    def do_load_lora(self) -> None:
        if not self.lora:
            torch.manual_seed(5)
            config = LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False)
            self.wrapped = get_peft_model(self.model, config)
            self.lora = True

    def do_unload_lora(self) -> None:
        if self.lora:
            self.wrapped.unload()
            self.lora = False

    def do_checkpoint(self) -> None:
        if not self.model._supports_gradient_checkpointing:
            return
        self.checkpointing = not self.checkpointing
        change = self.model.enable_gradient_checkpointing if self.checkpointing else None
        (change or self.model.disable_gradient_checkpointing)()

    def do_copy(self) -> None:
        if not self.lora:  # peft's wrapper would keep the original
            self.model, self.adapter = deepcopy((self.model, self.adapter))

    def do_call(self) -> None:
        run(self.model, SIZES[1])

    def output(self) -> Tensor:
        with torch.no_grad():
            return run(self.model)


OPERATIONS = ["mount", "unmount", "load_lora", "unload_lora", "checkpoint", "copy", "call"]


@given(kind=st.sampled_from(list(MODELS)), operations=st.lists(st.sampled_from(OPERATIONS), min_size=3, max_size=8))
def test_the_order_of_operations_does_not_matter(kind, operations) -> None:
    world = World(kind)
    for operation in operations:
        world.do(operation)
    reference = World(kind)
    stock = reference.output()
    for in_force, operation in ((world.lora, "load_lora"), (world.mounted, "mount")):
        if in_force:
            reference.do(operation)
    assert close(world.output(), reference.output())
    for operation in ("unload_lora", "unmount"):
        world.do(operation)
    assert torch.equal(world.output(), stock)


@torch.no_grad()
@pytest.mark.parametrize("kind", MODELS)
def test_lora_before_and_after_mounting_is_the_same(kind) -> None:
    model = make_model(kind)
    adapter = MixerAdapter.build(model, "linfusion")
    base = run(model)
    plain = run(adapter.mount().model)
    torch.manual_seed(5)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    after = run(model)
    assert not close(after, plain, 1e-5)
    adapter.unmount()
    assert not close(run(model), base, 1e-5)
    with adapter.mounted():
        assert torch.equal(run(model), after)
        wrapped.unload()
        assert torch.equal(run(model), plain)
    assert torch.equal(run(model), base)
