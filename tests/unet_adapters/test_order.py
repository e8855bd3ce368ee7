"""Order independence: whatever is done to a pipeline, its output depends on the final state alone."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from pathlib import Path
from re import DOTALL, MULTILINE, findall
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from tests.unet_adapters.comparisons import assert_same_model, fingerprint
from tests.unet_adapters.pipelines import MIXERS, image_prompt, load_ip_adapter, load_lora, make, run

# What can be in force, the first value being the stock one. An operation puts one of the values in force.
VALUES: dict[str, tuple[Any, ...]] = {
    "mounted": (False, True),
    "lora": (None, 1.0, 0.5),
    "fused": (False, True),
    "processors": ("sdpa", "default", "sliced"),
    "ip_adapter": (None, 1.0, 0.5),
    "freeu": (False, True),
    "layout": (torch.contiguous_format, torch.channels_last),
    "checkpointing": (False, True),
    "pag": (0.0, 3.0),
}
STOCK = {name: values[0] for name, values in VALUES.items()}
OPERATIONS = [(name, value) for name, values in VALUES.items() for value in values]
OPERATIONS += [("mounted", True), ("mounted", False), ("lora", 1.0), ("copy", None), ("call", None)]


class World:
    """A pipeline, an adapter, and the model of what is in force."""

    def __init__(self, mixer: str) -> None:
        self.pipe = make("PAG")  # with pag_scale=0 it is text-to-image
        self.adapter = MIXERS[mixer](self.pipe)
        self.state = dict(STOCK)
        self.rounded = False

    def do(self, name: str, value: Any) -> None:
        """One operation; those that stock diffusers cannot do in this state are left out."""
        if name == "copy":
            self.pipe.unet, self.adapter = deepcopy((self.pipe.unet, self.adapter))
        elif name == "call":
            self.run(height=24, width=8)
        elif name == "mounted" and self.state["fused"] and value != self.state["mounted"]:
            with pytest.raises(RuntimeError, match="a LoRA is fused"):
                self.adapter.mount() if value else self.adapter.unmount()
        elif self.can(name, value):
            getattr(self, name)(value)
            self.state[name] = value

    def can(self, name: str, value: Any) -> bool:
        now = self.state
        if name in ("lora", "fused"):  # a fused LoRA is not rescaled or unloaded, and without one none is fused
            return not now["fused"] if name == "lora" else (value != now["fused"] and now["lora"] is not None)
        if name == "ip_adapter":  # diffusers makes processors again without arguments, which slicing's need
            return now["processors"] != "sliced" and (value is not None or now["ip_adapter"] is not None)
        return name != "processors" or now["ip_adapter"] is None  # other processors would replace its own

    def mounted(self, value: bool) -> None:
        self.adapter.mount() if value else self.adapter.unmount()

    def lora(self, value: float | None) -> None:
        if value is None:
            self.pipe.unload_lora_weights()
            return
        if self.state["lora"] is None:
            load_lora(self.pipe)
        self.pipe.set_adapters("style", value)

    def fused(self, value: bool) -> None:
        self.pipe.fuse_lora() if value else self.pipe.unfuse_lora()
        self.rounded = True

    def ip_adapter(self, value: float | None) -> None:
        if value is None:
            self.pipe.unload_ip_adapter()
            return
        if self.state["ip_adapter"] is None:
            load_ip_adapter(self.pipe)
        self.pipe.set_ip_adapter_scale(value)

    def processors(self, value: str) -> None:
        if value == "sdpa":
            self.pipe.unet.set_attn_processor(AttnProcessor2_0())
        elif value == "default":
            self.pipe.unet.set_default_attn_processor()
        else:
            self.pipe.enable_attention_slicing("max")

    def freeu(self, value: bool) -> None:
        self.pipe.enable_freeu(s1=0.5, s2=0.3, b1=1.4, b2=1.6) if value else self.pipe.disable_freeu()

    def layout(self, value: torch.memory_format) -> None:
        self.pipe.unet.to(memory_format=value)

    def checkpointing(self, value: bool) -> None:
        unet = self.pipe.unet
        unet.enable_gradient_checkpointing() if value else unet.disable_gradient_checkpointing()

    def pag(self, value: float) -> None:
        """An argument of the call."""

    def run(self, **extras: Any) -> Tensor:
        image = image_prompt() if self.state["ip_adapter"] is not None else {}
        return run(self.pipe, "PAG", pag_scale=self.state["pag"], **image, **extras)

    def undo(self, order: list[str]) -> None:
        """Back to stock: one after the other, each as soon as it can be undone."""
        while self.state != STOCK:
            before = dict(self.state)
            for name in order:
                if self.state[name] != STOCK[name]:
                    self.do(name, STOCK[name])
            assert self.state != before


@cache
def expected(mixer: str, *values: Any) -> Tensor:
    """What a fresh pipeline makes in this state, reached in the order of `VALUES`."""
    world = World(mixer)
    for name, value in zip(VALUES, values, strict=True):
        if value != STOCK[name]:
            world.do(name, value)
    assert tuple(world.state.values()) == values
    return world.run()


@cache
def stock() -> tuple[dict[str, Any], Tensor]:
    pipe = make("PAG")
    return fingerprint(pipe.unet), run(pipe, "PAG", pag_scale=0.0)


@given(
    mixer=st.sampled_from(list(MIXERS)),
    operations=st.lists(st.sampled_from(OPERATIONS), min_size=2, max_size=8),
    order=st.permutations(list(VALUES)),
)
@example("linfusion", [("ip_adapter", 1.0), ("mounted", True)], list(VALUES))
@example("column scan", [("mounted", True), ("copy", None), ("call", None), ("pag", 3.0)], list(VALUES))
@example("linfusion", [("lora", 1.0), ("mounted", True), ("fused", True), ("mounted", False)], list(VALUES))
@example("column scan", [("processors", "default"), ("ip_adapter", 0.5), ("mounted", True)], list(VALUES)[::-1])
def test_the_order_of_operations_does_not_matter(mixer, operations, order) -> None:
    world = World(mixer)
    for name, value in operations:
        world.do(name, value)
    assert world.adapter.is_mounted == world.state["mounted"]
    torch.testing.assert_close(world.run(), expected(mixer, *world.state.values()), rtol=0, atol=1e-4)

    world.undo(order)
    then, base = stock()
    now = fingerprint(world.pipe.unet)
    output = world.run()
    if world.rounded:  # as stock: unfusing takes the LoRA off the weights again, up to rounding
        torch.testing.assert_close(output, base, rtol=0, atol=1e-4)
        torch.testing.assert_close(now["weights"], then["weights"], rtol=0, atol=1e-5)
        now["weights"] = then["weights"]
    else:
        assert torch.equal(output, base)
    assert_same_model(now, then)


@pytest.mark.slow  # the teacher that ships
def test_the_page_runs(tmp_path, monkeypatch) -> None:
    page = Path(__file__).parents[2] / "docs" / "howto" / "works_with.md"
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for code in findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), MULTILINE | DOTALL):
        exec(compile(code, str(page), "exec"), names)
    assert not names["adapter"].is_mounted
