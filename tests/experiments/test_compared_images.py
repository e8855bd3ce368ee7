"""What an evaluation compares: no image twice, none that a training draws, and all of them in the protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.config import EvaluationConfig, GeneratedImagesConfig, Grid
from experiments.data import DataError, SceneSet, batch, open_dataset
from experiments.data.example import EVALUATION_VARIATION, in_split
from experiments.distill import DistillationContext, open_context
from experiments.evaluate.protocol import protocol_of
from experiments.metrics.inputs.compared_images import compared_images
from experiments.metrics.inputs.predictions import noisy_images
from experiments.metrics.inputs.true_images import open_true_images

PLAN = EvaluationConfig(
    sizes=(16,), shapes=(), images=5, held_in_images=3, timesteps=(500,), generated=GeneratedImagesConfig(images=0)
)
NAMES = {split: [f"{n}.png" for n in range(99) if in_split(f"{n}.png", split)] for split in ("train", "held_out")}


@pytest.fixture
def context(grid: Grid) -> DistillationContext:
    return open_context(grid.teacher, grid.data, 64, grid.distillation.images)


def save_images(folder: Path, names: Sequence[str], seed: int = 0, caption: str = "noise") -> Path:
    """A folder of images of random pixels."""
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(seed)
    for name in names:
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / name)
        (folder / name).with_suffix(".txt").write_text(caption)
    return folder


def test_no_image_is_compared_twice(context: DistillationContext, tmp_path: Path) -> None:
    folder = save_images(tmp_path / "data", [*NAMES["held_out"][:3], *NAMES["train"][:2]])
    few = replace(context, held_out=open_dataset(str(folder), split="held_out"))
    for split, count in (("held_out", 3), ("held_in", 2)):
        images = compared_images(few, str(folder), split, PLAN)  # type: ignore[arg-type]
        assert len(set(images.indices)) == len(images.indices) == count
    assert len(noisy_images(few, str(folder), 16, 16, "held_out", PLAN, 0)) == 3
    for count in (1, 2, 63, 64, 199):
        plan = PLAN.model_copy(update={"images": count})
        images = compared_images(context, "scenes", "held_out", plan)
        assert len(set(images.indices)) == count and list(images.indices) == sorted(images.indices)


def test_held_in_images_are_among_those_that_training_encoded(context: DistillationContext) -> None:
    dataset = open_dataset("scenes", split="train")
    count = len(context.encoded)
    plan = PLAN.model_copy(update={"held_in_images": 2 * count})
    held_in = compared_images(context, "scenes", "held_in", plan)
    draws = torch.randint(0, len(dataset), (count,), generator=torch.Generator().manual_seed(0)).tolist()
    encoded = context.teacher.encode(*batch(dataset, draws, 64, range(count)))
    assert torch.allclose(encoded["latents"], context.latents, atol=1e-5), "the same draws as those of training"
    assert set(held_in.indices) == set(draws) and len(held_in) <= count


def test_no_training_draws_what_is_evaluated(monkeypatch: pytest.MonkeyPatch, context: DistillationContext) -> None:
    """Trainings number the images that they draw from 0: evaluations of the training split use other numbers."""
    requested = []
    example = SceneSet.example

    def record(self: SceneSet, index: int, size: int, variation: int = 0) -> object:
        requested.append((self.split, variation))
        return example(self, index, size, variation)

    monkeypatch.setattr(SceneSet, "example", record)
    noisy_images.cache_clear()
    noisy_images(context, "scenes", 16, 16, "held_in", PLAN, 0)
    list(
        open_true_images("scenes", PLAN.model_copy(update={"generated": GeneratedImagesConfig(images=2)})).batches(
            16, 2
        )
    )
    assert len(requested) == 5 and {split for split, _ in requested} == {"train"}
    assert all(variation >= EVALUATION_VARIATION > 10**9 and variation % 2 == 0 for _, variation in requested)
    assert len({variation for _, variation in requested}) == 2, (
        "true images are not those that predictions are compared on"
    )


def test_the_compared_images_and_captions_are_in_the_protocol(context: DistillationContext, tmp_path: Path) -> None:
    """By content: names and captions alone are those of other images, too."""
    names = [*NAMES["held_out"][:2], *NAMES["train"][:4]]
    hashes = set()
    for number, (seed, caption) in enumerate([(0, "noise"), (1, "noise"), (0, "other")]):
        folder = save_images(tmp_path / str(number), names, seed, caption)
        folder = folder.rename(tmp_path / "data") if number == 0 else folder
        source = str(folder)
        opened = replace(context, held_out=open_dataset(source, split="held_out"))
        for generated in (0, 3):
            plan = PLAN.model_copy(update={"generated": GeneratedImagesConfig(images=generated)})
            data = protocol_of(opened, plan, source).data
            hashes |= {(key, value) for key, value in data.items() if key.endswith("sha256")}
    assert len(hashes) == 9, "three sets of images, in three roles"


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_too_few_images_for_a_held_out_split_are_refused(
    split: str, context: DistillationContext, tmp_path: Path
) -> None:
    """Without a held-out image, training images would stand in for it; without one to train on, the reverse."""
    folder = str(save_images(tmp_path / "data", NAMES[split][:4]))
    overlapping = replace(context, held_out=open_dataset(folder, split="held_out"))
    for evaluate in (
        lambda: protocol_of(overlapping, PLAN, folder),
        lambda: noisy_images(overlapping, folder, 16, 16, "held_out", PLAN, 0),
        lambda: noisy_images(context, folder, 16, 16, "other", PLAN, 0),
    ):
        with pytest.raises(DataError, match=r"4 images are too few .* Add images"):
            evaluate()
