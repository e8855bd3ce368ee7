"""The metric `preference` with modules that have imscore's interface; refusals say what to do."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from experiments.config import EvaluationConfig, GeneratedImagesConfig
from experiments.distill import open_context
from experiments.metrics.inputs.judges import JUDGES, open_judge
from experiments.metrics.inputs.student import EvaluatedStudent
from experiments.metrics.preference import Preference, PreferenceOptions, PreferenceRow
from unet_adapters import MixerAdapter


class BrightnessJudge(nn.Module):
    """Scores images by their mean, as imscore's own dummy does; some of its judges return (b,), others (b, 1)."""

    sources: ClassVar[list[str]] = []

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    @classmethod
    def from_pretrained(cls, source: str) -> BrightnessJudge:
        cls.sources.append(source)
        return cls()

    def score(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        assert pixels.dtype == torch.float32 and pixels.min() >= 0 and pixels.max() <= 1
        assert len(prompts) == len(pixels)
        return (self.weight * pixels.mean((1, 2, 3)))[:, None]


@pytest.fixture
def imscore(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[BrightnessJudge]]:
    """Modules named as imscore's, each with the class that `JUDGES` names."""
    BrightnessJudge.sources.clear()
    for module_name, class_name, _ in JUDGES.values():
        module = ModuleType(module_name)
        setattr(module, class_name, BrightnessJudge)
        monkeypatch.setitem(sys.modules, module_name, module)
    open_judge.cache_clear()
    yield BrightnessJudge
    open_judge.cache_clear()


@pytest.mark.parametrize("name", JUDGES)
def test_scores_are_one_number_for_each_image(name: str, imscore: type[BrightnessJudge]) -> None:
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 8, 8)
    scores = open_judge(name).score(images, ["a", "b", "c"])
    assert scores.dtype == torch.float64 and scores.tolist() == pytest.approx([0, 0.2, 1])
    open_judge(f"{name}:some/folder")
    assert imscore.sources == [JUDGES[name][2], "some/folder"]


@pytest.mark.usefixtures("imscore")
def test_the_teacher_itself_is_preferred_to_nothing(tiny_teacher: Path) -> None:
    context = open_context(str(tiny_teacher), "emoji", 64, 2)
    generated = GeneratedImagesConfig(images=3, batch_size=2)
    plan = EvaluationConfig(sizes=(64,), shapes=(), sample_steps=1, generated=generated, metrics={"preference": {}})
    rows = {}
    for mixer in ("softmax", "uniform"):
        student = EvaluatedStudent(context, MixerAdapter.build(context.pipe, mixer), plan, "emoji")
        (rows[mixer],) = Preference().measure(student)
    softmax = rows["softmax"]
    assert isinstance(softmax, PreferenceRow)
    assert (softmax.difference, softmax.low, softmax.high, softmax.images) == (0, 0, 0, 3)
    uniform = rows["uniform"]
    assert isinstance(uniform, PreferenceRow)
    assert uniform.teacher == softmax.teacher
    assert uniform.low <= uniform.difference <= uniform.high
    assert uniform.difference == pytest.approx(uniform.student - uniform.teacher)


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    open_judge.cache_clear()
    monkeypatch.setitem(sys.modules, "imscore", None)  # as if it were not installed
    with pytest.raises(ModuleNotFoundError, match=r"linear-token-mixers\[judges\]"):
        open_judge("hpsv2")


def test_unknown_and_failing_judges_are_one_sentence(
    imscore: type[BrightnessJudge], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="hpsv2"):
        PreferenceOptions(judges=("hpsv1",))
    with pytest.raises(ValueError, match="hpsv2"):
        open_judge("hpsv1")
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    with monkeypatch.context() as patch:
        patch.setattr(imscore, "score", lambda self, pixels, prompts: pixels)
        with pytest.raises(ValueError, match="one score for each image"):
            open_judge("pickscore").score(images, ["a", "b"])
    with monkeypatch.context() as patch:
        patch.setattr(imscore, "score", lambda self, pixels, prompts: pixels.pooler_output)
        with pytest.raises(ValueError, match=r"Cannot use the judge 'pickscore'.*a version of transformers"):
            open_judge("pickscore").score(images, ["a", "b"])
    open_judge.cache_clear()
    monkeypatch.setattr(imscore, "from_pretrained", classmethod(lambda cls, source: Path(source).read_bytes()))
    with pytest.raises(ValueError, match="Cannot use the judge 'hpsv2:nowhere'"):
        open_judge("hpsv2:nowhere")
