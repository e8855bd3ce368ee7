"""Saving and copying a mounted model: what works, and what raises in place of a silent softmax."""

from __future__ import annotations

import pytest
import torch
from diffusers import ControlNetModel, DiffusionPipeline, UNet2DConditionModel, UNetMotionModel
from diffusers.training_utils import EMAModel
from peft import LoraConfig

from tests.unet_adapters.comparisons import close, mounted_layers
from tests.unet_adapters.pipelines import MIXERS, column_scan, component, linfusion, make, run
from unet_adapters import MixerAdapter

every_mixer = pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)

COPIES = {
    "ControlNetModel.from_unet": lambda unet: ControlNetModel.from_unet(unet),
    "UNetMotionModel.from_unet2d": lambda unet: UNetMotionModel.from_unet2d(unet, component("motion")),
}


@every_mixer
@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
def test_strict_copies_of_a_mounted_unet_fail_aloud(mixer, copy) -> None:
    pipe = make()
    adapter = mixer(pipe).mount()
    mounted = run(pipe)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*attn1\._extra_state"):
        copy(pipe.unet)
    with adapter.unmounted():
        copy(pipe.unet)
    assert torch.equal(run(pipe), mounted)


def test_ema_of_a_mounted_unet_and_of_the_student(tmp_path) -> None:
    pipe = make()
    adapter = linfusion(pipe).mount()
    mounted = run(pipe)
    settings = {"model_cls": UNet2DConditionModel, "model_config": pipe.unet.config}
    with pytest.raises(RuntimeError, match="shape"):
        EMAModel(pipe.unet.parameters(), **settings).save_pretrained(tmp_path)
    with adapter.unmounted():
        EMAModel(pipe.unet.parameters(), **settings).save_pretrained(tmp_path)
    average = EMAModel(adapter.student.parameters())  # what one wants: the teacher does not change
    adapter.student.apply(lambda module: [parameter.data.zero_() for parameter in module.parameters()])
    average.copy_to(adapter.student.parameters())
    assert torch.equal(run(pipe), mounted)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["text-to-image", "AnimateDiff", "ControlNet"])
@every_mixer
def test_a_mounted_model_that_was_saved(name, mixer, tmp_path) -> None:
    """Our loader mounts it again; diffusers' makes it softmax attention, with a warning only."""
    pipe = make(name)
    base = run(pipe, name)
    part = "controlnet" if name == "ControlNet" else "unet"
    model = getattr(pipe, part)
    mixer(model).mount()
    mounted = run(pipe, name)
    model.save_pretrained(tmp_path)
    again = MixerAdapter.from_mounted(tmp_path)
    assert type(again.model) is type(model)
    setattr(pipe, part, again.model)
    assert torch.equal(run(pipe, name), mounted)
    setattr(pipe, part, type(model).from_pretrained(tmp_path))
    plain = run(pipe, name)
    assert not mounted_layers(getattr(pipe, part)) and not close(plain, mounted, 1e-3)
    assert close(plain, base) == (mixer is column_scan)  # the student's projections are in the file


def test_a_saved_pipeline_takes_the_unet_of_our_loader(tmp_path) -> None:
    pipe = make()
    linfusion(pipe).mount()
    mounted = run(pipe)
    pipe.save_pretrained(tmp_path)
    adapter = MixerAdapter.from_mounted(tmp_path / "unet")
    again = DiffusionPipeline.from_pretrained(tmp_path, unet=adapter.model, safety_checker=None)
    assert torch.equal(run(again), mounted)


def test_a_lora_on_a_mixer_is_not_saved(tmp_path) -> None:
    adapter = MixerAdapter.build(component("unet"), "linfusion").mount()
    adapter.model.add_adapter(LoraConfig(r=2, target_modules="all-linear"), "style")
    with pytest.raises(RuntimeError, match=r"cannot save: a LoRA is on .*mixer"):
        adapter.save_pretrained(tmp_path)
    adapter.model.delete_adapters("style")
    adapter.model.unload_lora()
    adapter.save_pretrained(tmp_path)
