"""Output gains: a student that is off by a factor starts at the teacher, and softmax gets exactly its own scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from experiments.config import DistillationConfig, FitConfig, LossTerm, MixerSpec
from experiments.distill import DistillationLoss, build_student, run_stages
from experiments.distill.output_gains import apply_output_gains, fit_output_gains
from experiments.distill.student import OUTPUT_GAINS
from experiments.teacher.teacher import Batch
from tests.experiments.students import batch_of, open_teacher
from unet_adapters import MixerAdapter

FIT = FitConfig(steps=2, batch_size=2, learning_rate=1e-3)
factors = st.floats(1e-5, 1e5).flatmap(lambda size: st.sampled_from([size, -size]))


def local_error(teacher: Any, adapter: MixerAdapter, batch: Batch) -> float:
    loss = DistillationLoss(teacher, adapter, {"local": LossTerm()})
    with torch.no_grad():
        value = float(loss(batch)["loss"])
    adapter.unmount()
    return value


def scale_heads(adapter: MixerAdapter, factor: float) -> None:
    """Multiply the outputs of head number n of every site by (n + 1) · factor."""
    for mixer in adapter.mixers.values():
        heads = torch.arange(1, mixer.heads + 1)[:, None] * factor

        def mix(streams: Any, original: Any = mixer.mix, heads: Tensor = heads) -> Tensor:
            return (original(streams) * heads).float()

        mixer.mix = mix  # type: ignore[method-assign]


@settings(max_examples=8)
@given(factor=factors)
def test_a_student_that_is_a_multiple_of_the_teacher_starts_with_error_0(factor: float) -> None:
    teacher = open_teacher()
    batch = batch_of(teacher)
    adapter = MixerAdapter.build(teacher.pipe, "softmax", output_gain=True)
    scale_heads(adapter, factor)
    gains = fit_output_gains(teacher, adapter, [batch])
    for site in adapter.sites:
        expected = 1 / (torch.arange(1, site.heads + 1) * factor)
        torch.testing.assert_close(gains[site.name], expected.float(), rtol=1e-5, atol=0)
    apply_output_gains(adapter, gains)
    assert local_error(teacher, adapter, batch) < 1e-9


def test_the_gain_of_softmax_is_1() -> None:
    teacher = open_teacher()
    adapter = MixerAdapter.build(teacher.pipe, "softmax", output_gain=True)
    for gain in fit_output_gains(teacher, adapter, [batch_of(teacher)]).values():
        torch.testing.assert_close(gain, torch.ones_like(gain), rtol=1e-6, atol=0)


@pytest.mark.parametrize("mixer", ["linear_attention", "gla", "mamba2"])
def test_the_gain_is_the_best_one(mixer: str) -> None:
    teacher = open_teacher()
    batch = batch_of(teacher)
    adapter = MixerAdapter.build(teacher.pipe, mixer, output_gain=True)
    gains = fit_output_gains(teacher, adapter, [batch])
    assert all((adapter.mixers[name].output_gain == 1).all() for name in gains), "fitting changes nothing"
    before = local_error(teacher, adapter, batch)
    apply_output_gains(adapter, gains)
    best = local_error(teacher, adapter, batch)
    assert best <= before
    double = {name: 2 * gain for name, gain in gains.items()}
    apply_output_gains(adapter, double)
    again = fit_output_gains(teacher, adapter, [batch])
    for name, gain in gains.items():
        torch.testing.assert_close(again[name], gain), "whatever the gains were"
    assert local_error(teacher, adapter, batch) > best


def test_gains_are_saved_with_the_adapter_and_are_not_trained(tmp_path: Path) -> None:
    teacher = open_teacher()
    adapter = MixerAdapter.build(teacher.pipe, "gla", output_gain=True)
    apply_output_gains(adapter, fit_output_gains(teacher, adapter, [batch_of(teacher)]))
    assert not any("output_gain" in name for name in adapter.parameters_by_name())
    adapter.save_pretrained(tmp_path)
    again = MixerAdapter.from_pretrained(tmp_path, teacher.pipe)
    for name, mixer in adapter.mixers.items():
        assert torch.equal(mixer.output_gain, again.mixers[name].output_gain)
        assert not (mixer.output_gain == 1).all()


def test_a_distillation_calibrates_once_and_reads_its_gains_back(tmp_path: Path) -> None:
    teacher = open_teacher()
    config = DistillationConfig(fit=FIT, calibrate_outputs=True, image_size=8)

    def draw(*_: object) -> Batch:
        return batch_of(teacher)

    def train() -> MixerAdapter:
        adapter = build_student(teacher, "gla", MixerSpec(), config, 0)
        run_stages(teacher, adapter, config, draw, tmp_path, lambda *_: None)
        return adapter

    first = train()
    assert (tmp_path / OUTPUT_GAINS).is_file()
    second = train()
    for name, mixer in first.mixers.items():
        assert torch.equal(mixer.output_gain, second.mixers[name].output_gain)
        assert not (mixer.output_gain == 1).all()
    plain = build_student(teacher, "gla", MixerSpec(), DistillationConfig(fit=FIT), 0)
    assert all(mixer.output_gain is None for mixer in plain.mixers.values())


def test_heads_without_an_output_keep_the_gain_1() -> None:
    teacher = open_teacher()
    adapter = MixerAdapter.build(teacher.pipe, "softmax", output_gain=True)
    scale_heads(adapter, 0.0)
    assert all((gain == 1).all() for gain in fit_output_gains(teacher, adapter, [batch_of(teacher)]).values())


def test_random_projections_cannot_be_calibrated() -> None:
    with pytest.raises(ValueError, match="start='random' draws heads"):
        DistillationConfig(fit=FIT, start="random", calibrate_outputs=True)


def test_gains_are_part_of_a_file_in_the_linfusion_format(tmp_path: Path) -> None:
    """The format has no gains: they are multiplied into to_out, which computes the same."""
    teacher = open_teacher()
    batch = batch_of(teacher)
    adapter = MixerAdapter.build(teacher.pipe, "linfusion", output_gain=True)
    gains = fit_output_gains(teacher, adapter, [batch])
    apply_output_gains(adapter, {name: gain * torch.linspace(1, 2, len(gain)) for name, gain in gains.items()})
    adapter.save_linfusion(tmp_path)
    again = MixerAdapter.from_linfusion(tmp_path, teacher.pipe)
    assert all(mixer.output_gain is None for mixer in again.mixers.values())
    timesteps = torch.tensor([500])
    with adapter.mounted():
        expected = teacher.predict(batch["latents"], timesteps, batch)
    with again.mounted():
        torch.testing.assert_close(teacher.predict(batch["latents"], timesteps, batch), expected)
    assert not torch.allclose(teacher.predict(batch["latents"], timesteps, batch), expected)
