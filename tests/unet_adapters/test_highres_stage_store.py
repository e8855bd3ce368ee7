"""The key of finished stages: it changes with everything that changes the image, and with nothing else."""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import ControlNetModel
from diffusers.hooks import (
    LayerSkipConfig,
    PyramidAttentionBroadcastConfig,
    apply_layer_skip,
    apply_pyramid_attention_broadcast,
)
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from safetensors import SafetensorError
from torch import nn

from tests.unet_adapters import pipelines
from unet_adapters import MixerAdapter
from unet_adapters.highres import ControlNetCondition, GenerationRequest, MemoryPlan, Tiling
from unet_adapters.highres.fingerprint import describe, fingerprint
from unet_adapters.highres.pipeline import encode_prompts
from unet_adapters.highres.stage_store import StageStore, stage_key
from unet_adapters.highres.stages import ProgressiveStage


class Inputs:
    """Everything that a key depends on."""

    def __init__(self, pipe: Any = None, plan: MemoryPlan | None = None) -> None:
        self.pipe = pipe or pipelines.make()
        self.request = GenerationRequest("abc", size=(32, 32))
        self.plan = plan or MemoryPlan((), (), Tiling())
        self.image: Image.Image | None = Image.new("RGB", (8, 4), "red")
        self.strength: float | None = 0.5
        self.control: ControlNetCondition | None = None

    def key(self) -> str:
        conditions = encode_prompts(self.pipe, self.request.prompt, self.request.negative_prompt, 3.0)
        return stage_key(self.pipe, self.request, self.plan, conditions, self.image, self.strength, self.control)


Change = Callable[[Inputs], Any]


def mount(name: str = "linear_attention", **options: Any) -> Change:
    def change(inputs: Inputs) -> None:
        pipelines.seeded(lambda: MixerAdapter.build(inputs.pipe, name, **options).mount())

    return change


def lora(scale: float = 1.0, seed: int = 20, then: str | None = None) -> Change:
    def change(inputs: Inputs) -> None:
        inputs.pipe.load_lora_weights(pipelines.lora_weights(inputs.pipe.unet, seed), adapter_name="style")
        inputs.pipe.set_adapters("style", scale)
        if then is not None:
            getattr(inputs.pipe, then)()

    return change


def ip_adapter(scale: float) -> Change:
    def change(inputs: Inputs) -> None:
        pipelines.load_ip_adapter(inputs.pipe)
        inputs.pipe.set_ip_adapter_scale(scale)

    return change


def controlnet(scale: float = 1.0, shift: float = 0.0, level: float = 0.5) -> Change:
    def change(inputs: Inputs) -> None:
        network = pipelines.seeded(
            lambda: ControlNetModel.from_unet(inputs.pipe.unet, conditioning_embedding_out_channels=(4, 8))
        )
        network.controlnet_mid_block.bias.data += shift
        inputs.control = ControlNetCondition(network, torch.full((1, 3, 8, 8), level), scale)

    return change


def one_weight(component: str, index: int = -1, position: int = -1) -> Change:
    def change(inputs: Inputs) -> None:
        parameter = list(getattr(inputs.pipe, component).parameters())[index]
        parameter.data.flatten()[position] += 0.25

    return change


def embedding_of_a_word(inputs: Inputs) -> None:
    inputs.pipe.text_encoder.get_input_embeddings().weight.data[0:26] += 0.5  # the letters of the prompt


def scheduler(name: str, **options: Any) -> Change:
    def change(inputs: Inputs) -> None:
        inputs.pipe.scheduler = getattr(diffusers, name).from_config(inputs.pipe.scheduler.config, **options)

    return change


def flow(shift: float | None = None) -> Change:
    def change(inputs: Inputs) -> None:
        inputs.pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        if shift is not None:
            inputs.pipe.scheduler.set_shift(shift)

    return change


def other_noise_levels(inputs: Inputs) -> None:
    inputs.pipe.scheduler.alphas_cumprod = inputs.pipe.scheduler.alphas_cumprod**2


def layer_skip(**options: Any) -> Change:
    config = LayerSkipConfig(indices=[0], fqn="mid_block.attentions.0.transformer_blocks", **options)
    return lambda inputs: apply_layer_skip(inputs.pipe.unet, config)


def broadcast(steps: int) -> Change:
    def change(inputs: Inputs) -> None:
        config = PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=steps, current_timestep_callback=lambda: 500
        )
        apply_pyramid_attention_broadcast(inputs.pipe.unet, config)

    return change


def set_attribute(path: str, value: Any) -> Change:
    def change(inputs: Inputs) -> None:
        *parents, name = path.split(".")
        target: Any = inputs
        for parent in parents:
            target = getattr(target, parent)
        setattr(target, name, value)

    return change


def request(**options: Any) -> Change:
    return lambda inputs: setattr(inputs, "request", dataclasses.replace(inputs.request, **options))


def other_activation(inputs: Inputs) -> None:
    inputs.pipe.unet.mid_block.resnets[0].nonlinearity = nn.ReLU()


def freeu(inputs: Inputs) -> None:
    inputs.pipe.enable_freeu(s1=0.5, s2=0.3, b1=1.4, b2=1.6)


CHANGES: dict[str, Change] = {
    "nothing": lambda inputs: None,
    "mixer": mount(),
    "causality": mount(causality="causal"),
    "normalization": mount(normalize=False),
    "feature map": mount(feature_map="relu"),
    "min_tokens": mount(min_tokens=16),
    "some sites": mount(select="*up*"),
    "other mixer": mount("linfusion"),
    "LoRA": lora(),
    "LoRA of other weights": lora(seed=80),
    "LoRA at a smaller scale": lora(0.1),
    "LoRA disabled": lora(then="disable_lora"),
    "LoRA fused": lora(then="fuse_lora"),
    "IP-Adapter": ip_adapter(1.0),
    "IP-Adapter at a smaller scale": ip_adapter(0.5),
    "FreeU": freeu,
    "activation": other_activation,
    "processor": lambda inputs: inputs.pipe.unet.set_attn_processor(AttnProcessor()),
    "first weight of the UNet": one_weight("unet", 0, 0),
    "a weight in the middle of the UNet": one_weight("unet", 20, 7),
    "last weight of the UNet": one_weight("unet"),
    "weight of the autoencoder": one_weight("vae"),
    "weight of the text encoder": one_weight("text_encoder"),
    "textual inversion": embedding_of_a_word,
    "scaling of latents": lambda inputs: inputs.pipe.vae.register_to_config(scaling_factor=0.5),
    "precision": lambda inputs: inputs.pipe.unet.double(),
    "scheduler": scheduler("EulerDiscreteScheduler"),
    "scheduler's config": scheduler("DDIMScheduler", timestep_spacing="trailing"),
    "flow": flow(),
    "shift of a flow": flow(2.0),
    "noise levels": other_noise_levels,
    "layer skip": layer_skip(),
    "layer skip with dropout": layer_skip(dropout=0.5),
    "layer skip of the feed-forward": layer_skip(skip_attention=False),
    "perturbed attention": layer_skip(skip_attention=False, skip_ff=False, skip_attention_scores=True),
    "attention broadcast": broadcast(2),
    "attention broadcast over more steps": broadcast(3),
    "prompt": request(prompt="abd"),
    "negative prompt": request(negative_prompt="de"),
    "size": request(size=(32, 48)),
    "mode": request(mode="direct"),
    "base size": request(base_size=16),
    "strengths": request(strengths=(0.5,)),
    "steps": request(steps=7),
    "guidance": request(guidance=3.0),
    "seed": request(seed=1),
    "upscale": request(upscale="latents"),
    "skip residual": request(skip_residual=3.0),
    "dilation": request(dilation=2),
    "tiling": set_attribute("plan", MemoryPlan((), (), Tiling(tile=32))),
    "image": set_attribute("image", Image.new("RGB", (8, 4), "blue")),
    "shape of the image": set_attribute("image", Image.new("RGB", (4, 8), "red")),
    "no image": set_attribute("image", None),
    "strength": set_attribute("strength", 0.4),
    "ControlNet": controlnet(),
    "weight of the ControlNet": controlnet(shift=1.0),
    "scale of the ControlNet": controlnet(scale=0.5),
    "image of the ControlNet": controlnet(level=0.25),
}


def keys() -> dict[str, str]:
    result = {}
    for name, change in CHANGES.items():
        inputs = Inputs()
        change(inputs)
        result[name] = inputs.key()
    return result


def test_every_change_changes_the_key_and_repeating_it_does_not() -> None:
    first = keys()
    by_key: dict[str, list[str]] = {}
    for name, key in first.items():
        by_key.setdefault(key, []).append(name)
    assert [names for names in by_key.values() if len(names) > 1] == []
    assert keys() == first


def test_every_field_of_a_request_is_changed_above() -> None:
    inputs = Inputs()
    changed = set()
    for change in CHANGES.values():
        other = Inputs(pipe=inputs.pipe)
        if "request" in getattr(change, "__qualname__", ""):
            change(other)
        before = dataclasses.asdict(inputs.request)
        changed |= {name for name, value in dataclasses.asdict(other.request).items() if value != before[name]}
    assert changed == {field.name for field in dataclasses.fields(GenerationRequest)}


def test_savings_do_not_change_the_key() -> None:
    inputs = Inputs()
    saving = Inputs(pipe=inputs.pipe, plan=MemoryPlan((), ("guidance", "feed_forward"), Tiling(), 64))
    assert saving.key() == inputs.key()


@pytest.mark.parametrize("mixer", [None, "linfusion", "mila", "mamba2"])
def test_a_key_does_not_depend_on_calls_or_addresses(mixer: str | None) -> None:
    inputs = Inputs()
    if mixer is not None:
        mount(mixer)(inputs)
    before = inputs.key()
    pipelines.run(inputs.pipe)
    assert inputs.key() == before
    assert not [line for line in describe(inputs.pipe.unet, inputs.pipe.vae) if " at 0x" in line]


@pytest.mark.parametrize("change", ["layer skip", "perturbed attention", "attention broadcast"])
def test_a_key_does_not_depend_on_calls_under_hooks(change: str) -> None:
    inputs = Inputs()
    CHANGES[change](inputs)
    before = inputs.key()
    pipelines.run(inputs.pipe)
    assert inputs.key() == before


def test_another_version_of_the_library_has_other_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = Inputs()
    before = inputs.key()
    monkeypatch.setattr("unet_adapters.highres.stage_store.library_version", lambda: "another")
    assert inputs.key() != before


def test_offloaded_weights_are_part_of_the_fingerprint() -> None:
    networks = [pipelines.component("unet") for _ in range(2)]
    networks[1].conv_out.bias.data += 1
    for network in networks:
        from accelerate import cpu_offload

        cpu_offload(network, execution_device="cpu")
    assert fingerprint(networks[0]) != fingerprint(networks[1])


def test_a_full_disk_is_an_os_error_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(tensors: Any, path: Path, **_: Any) -> None:
        path.write_bytes(b"half")
        raise SafetensorError(f"Error while serializing: I/O error: {errno.ENOSPC}")

    monkeypatch.setattr("unet_adapters.files.save_file", fail)
    store = StageStore(tmp_path, "key")
    with pytest.raises(OSError, match=r"Cannot write .*I/O error"):
        store.save(ProgressiveStage((32, 32), 1.0), torch.zeros(1))
    assert not list(tmp_path.iterdir())
