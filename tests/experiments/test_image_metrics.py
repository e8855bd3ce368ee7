"""Metrics of images: distances against their formulas, feature networks present and missing, COCO from a folder."""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from experiments.config import EvaluationConfig, GeneratedImagesConfig, Grid
from experiments.data import DataError, SceneSet
from experiments.distill import open_context
from experiments.evaluate.samples import save_samples
from experiments.metrics.cmmd import ClipMeanDiscrepancy
from experiments.metrics.frechet_distance import FrechetDistance
from experiments.metrics.inputs.coco import CocoCaptions
from experiments.metrics.inputs.feature_networks import INCEPTION, Clip, open_network
from experiments.metrics.inputs.generated_images import extract_features
from experiments.metrics.inputs.set_distances import DistanceMetric
from experiments.metrics.inputs.student import EvaluatedStudent
from experiments.metrics.inputs.true_images import open_true_images
from experiments.metrics.kernel_distance import KernelDistance
from experiments.metrics.precision_recall import coverage
from experiments.metrics.teacher_similarity import TeacherSimilarity
from experiments.metrics.text_image_score import TextImageScore
from experiments.teacher.load import EMBEDDED
from tests.experiments.students import student
from unet_adapters import MixerAdapter

CAPTIONS = ["a red apple, teal background", "a cat face, purple background", "a sailboat, white background"]


def gaussian(count: int, dim: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64) @ mix + mix[0]


def frechet(x: Tensor, y: Tensor) -> float:
    """The formula with symmetric roots, which torchmetrics does not take."""

    def root(matrix: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        return (vectors * values.clamp_min(0).sqrt()) @ vectors.T

    a = x.T.cov()
    b = y.T.cov()
    middle = root(root(a) @ b @ root(a))
    return float((x.mean(0) - y.mean(0)).square().sum() + (a + b - 2 * middle).trace())


def kernel(x: Tensor, y: Tensor) -> float:
    """The unbiased estimate of the squared mean discrepancy, pair by pair."""

    def k(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def others(a: Tensor) -> Tensor:
        return (k(a, a).sum() - k(a, a).trace()) / (len(a) * (len(a) - 1))

    return float(others(x) + others(y) - 2 * k(x, y).mean())


@settings(max_examples=10)
@given(st.integers(2, 40), st.integers(2, 6), st.integers(0, 100))
def test_distances_are_their_formulas(count: int, dim: int, seed: int) -> None:
    x = gaussian(count, dim, seed)
    y = gaussian(count, dim, seed + 1000)
    assert FrechetDistance().distance(x, y) == pytest.approx(frechet(x, y), rel=1e-6, abs=1e-4)
    assert KernelDistance().distance(x, y) == pytest.approx(kernel(x, y), rel=1e-6, abs=1e-9)
    assert ClipMeanDiscrepancy().distance(x, y) == pytest.approx(cmmd(x, y), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("metric", [FrechetDistance(), KernelDistance(), ClipMeanDiscrepancy()], ids=lambda m: m.name)
def test_a_set_is_close_to_itself_and_noise_increases_the_distance(metric: DistanceMetric) -> None:
    x = gaussian(200, 8, 0)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    values = [metric.distance(x, x + share * noise) for share in (0.0, 1.0, 4.0, 16.0)]
    assert metric.name == "kernel_distance" or values[0] == pytest.approx(0, abs=1e-5), "the kernel's is unbiased"
    assert values == sorted(values) and values[1] < values[3]


def test_subsets_of_many_images_are_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.metrics.kernel_distance.SUBSET", 50)
    x = gaussian(60, 2, 0)
    y = gaussian(51, 2, 0)
    state = torch.random.get_rng_state()
    assert KernelDistance().distance(x, y) == KernelDistance().distance(x, y)
    assert torch.random.get_rng_state().equal(state), "no other random numbers change"


def test_precision_and_recall_are_coverages() -> None:
    x = gaussian(100, 4, 0)
    assert coverage(x, x, 3) == 1.0
    assert coverage(x, x + 1000, 3) == 0.0
    narrow = x.mean(0) + 0.01 * (x - x.mean(0))
    assert coverage(x, narrow, 3) > 0.9 > 0.1 > coverage(narrow, x, 3), "all inside, and little is covered"


def cmmd(x: Tensor, y: Tensor) -> float:
    """1000 · the biased squared mean discrepancy under exp(−|a − b|² / 200), pair by pair."""
    x, y = (set_ / set_.norm(dim=1, keepdim=True) for set_ in (x, y))

    def k(a: Tensor, b: Tensor) -> float:
        return sum(float(torch.exp(-(p - q).square().sum() / 200)) for p in a for q in b) / (len(a) * len(b))

    return 1000 * (k(x, x) + k(y, y) - 2 * k(x, y))


def scenes(size: int = 64) -> Tensor:
    """True images of `CAPTIONS`."""
    dataset = SceneSet("train", kinds=("single",))
    images = [dataset.example(index, size, variation).image for index, variation in find_scenes()]
    return torch.stack([((image + 1) * 127.5).round().to(torch.uint8) for image in images])


@cache
def find_scenes() -> list[tuple[int, int]]:
    """Index and variation of a scene for each of `CAPTIONS`."""
    dataset = SceneSet("train", kinds=("single",))
    pairs = {dataset.scene(i, v).caption: (i, v) for i in range(len(dataset)) for v in range(20)}
    return [pairs[caption] for caption in CAPTIONS]


def test_the_embedded_clip_scores_captions_and_sees_every_size_alike() -> None:
    network = open_network("embedded")
    right = extract_features([(scenes(), CAPTIONS)], [network])[0]
    wrong = extract_features([(scenes(), CAPTIONS[::-1])], [network])[0]
    assert right.features.shape == (3, network.num_features) and right.features.dtype == torch.float64
    assert right.caption_scores is not None and wrong.caption_scores is not None
    assert right.caption_scores.mean() > wrong.caption_scores.mean() + 10
    large = extract_features([(scenes(256), CAPTIONS)], [network])[0]
    assert torch.cosine_similarity(large.features, right.features).min() > 0.97
    parts = extract_features([(scenes()[:1], CAPTIONS[:1]), (scenes()[1:], CAPTIONS[1:])], [network])[0]
    torch.testing.assert_close(parts.features, right.features, rtol=1e-4, atol=1e-5)
    assert parts.caption_scores is not None
    torch.testing.assert_close(parts.caption_scores, right.caption_scores, rtol=1e-4, atol=1e-3)


def test_caption_scores_are_cosines_in_percent() -> None:
    network = open_network("embedded")
    assert isinstance(network, Clip)
    (result,) = extract_features([(scenes(), CAPTIONS)], [network])
    image = torch.nn.functional.normalize(network(scenes()))
    text = torch.nn.functional.normalize(network.embed_captions(CAPTIONS))
    torch.testing.assert_close(result.caption_scores, 100 * (image * text).sum(1))


def test_a_wide_image_is_cropped_to_its_center() -> None:
    network = open_network("embedded")
    square = scenes()
    wide = torch.cat([torch.zeros_like(square), square, torch.zeros_like(square)], dim=-1)
    assert network(wide).equal(network(square))


def clip_folder(folder: Path) -> Path:
    """The embedded CLIP as a CLIP of one's own."""
    shutil.copytree(EMBEDDED / "evaluator", folder)
    for file in (EMBEDDED / "tokenizer").iterdir():
        shutil.copy(file, folder / file.name)
    settings = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def test_a_clip_from_a_folder_is_the_same_network(tmp_path: Path) -> None:
    network = open_network(f"clip:{clip_folder(tmp_path / 'clip')}")
    embedded = open_network("embedded")
    features, expected = (extract_features([(scenes(), CAPTIONS)], [n])[0].features for n in (network, embedded))
    assert features.equal(expected)
    assert network.fingerprint == embedded.fingerprint


def test_dino_from_a_folder(tmp_path: Path) -> None:
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(tmp_path)
    settings = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "crop_size": {"height": 28, "width": 28}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    network = open_network(f"dino:{tmp_path}")
    (result,) = extract_features([(scenes(), CAPTIONS)], [network])
    assert result.features.shape == (3, 16) and result.caption_scores is None


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("vgg", "No feature network 'vgg': expected embedded"),
        ("clip:", "No feature network 'clip:'"),
        ("clip:nobody/nothing", r"Cannot open the features 'clip:nobody/nothing'.*hf download nobody/nothing"),
        ("dino:nobody/nothing", r"Cannot open the features 'dino:nobody/nothing'.*hf download nobody/nothing"),
        ("inception:no/file.pth", r"there is no file no/file\.pth"),
    ],
)
def test_a_missing_network_is_one_sentence(source: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=message):
        open_network(source)


def test_inception_is_searched_in_the_folder_of_torch_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ValueError, match=rf"no file {tmp_path}/checkpoints/{INCEPTION}\. Download https"):
        open_network("inception")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / INCEPTION).write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"torch-fidelity: pip install|Cannot read Inception's weights"):
        open_network("inception")


def coco(folder: Path, count: int = 5) -> Path:
    """A folder in COCO's layout: `count` images with two captions each, and one with none."""
    random = np.random.default_rng(0)
    (folder / "annotations").mkdir(parents=True)
    (folder / "val2014").mkdir()
    images = [{"id": 10 * k, "file_name": f"COCO_val2014_{10 * k:012}.jpg"} for k in range(count + 1)]
    for image in images:
        pixels = random.integers(0, 255, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "val2014" / str(image["file_name"]))
    notes = [
        {"id": 100 * k + n, "image_id": 10 * k, "caption": f" image {k},\n caption {n} "}
        for k in range(count)
        for n in range(2)
    ]
    content = {"images": images, "annotations": notes}
    (folder / "annotations" / "captions_val2014.json").write_text(json.dumps(content))
    return folder


def test_coco_from_a_folder(tmp_path: Path) -> None:
    data = CocoCaptions(coco(tmp_path))
    assert len(data) == 5 and data.name == "coco, val2014"
    example = data.example(3, 32)
    assert example.image.shape == (3, 32, 32) and example.caption in {"image 3, caption 0", "image 3, caption 1"}
    assert len({data.key(k) for k in range(5)}) == 5
    again = CocoCaptions(tmp_path / "annotations" / "captions_val2014.json")
    assert again.items == data.items, "each image always has the same caption"
    plan = EvaluationConfig(generated=GeneratedImagesConfig(images=3, data=f"coco:{tmp_path}"))
    first = open_true_images("emoji", plan)
    second = open_true_images("emoji", plan.model_copy(update={"seed": 1}))
    assert len(first) == len(set(first.indices)) == 3 and first.digest != second.digest
    shapes = [(tuple(p.shape), p.dtype, len(c)) for p, c in first.batches(16, 2)]
    assert shapes == [((2, 3, 16, 16), torch.uint8, 2), ((1, 3, 16, 16), torch.uint8, 1)]


def test_unreadable_coco_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no annotations/captions_\*.json"):
        CocoCaptions(tmp_path)
    file = coco(tmp_path) / "annotations" / "captions_val2014.json"
    next((tmp_path / "val2014").iterdir()).unlink()
    data = CocoCaptions(tmp_path)
    with pytest.raises(DataError, match="which the captions name"):
        [data.example(k, 8) for k in range(len(data))]
    shutil.rmtree(tmp_path / "val2014")
    with pytest.raises(DataError, match="There are no images for"):
        CocoCaptions(tmp_path)
    (tmp_path / "val2014").mkdir()
    file.write_text('{"images": []}')
    with pytest.raises(DataError, match="as COCO's captions"):
        CocoCaptions(tmp_path)


def test_a_sweep_on_coco_measures_student_teacher_and_true_images(grid: Grid, tmp_path: Path) -> None:
    context = open_context(grid.teacher, grid.data, 64, grid.distillation.images)
    generated = GeneratedImagesConfig(images=4, batch_size=3, resize=32, data=f"coco:{coco(tmp_path / 'coco')}")
    plan = grid.evaluation.model_copy(update={"generated": generated, "guidances": (1.0,)})
    metrics = [FrechetDistance(), KernelDistance(), TextImageScore(), TeacherSimilarity()]

    def measure(adapter: MixerAdapter) -> dict[str, list[Any]]:
        subject = EvaluatedStudent(context, adapter, plan, grid.data)
        return {metric.name: metric.measure(subject) for metric in metrics}

    exact = measure(MixerAdapter.build(context.pipe, "softmax"))
    for name in ("frechet_distance", "kernel_distance", "text_image_score"):
        assert [row.guidance for row in exact[name]] == [3.0, 1.0]
        assert all(row.student == pytest.approx(row.teacher) for row in exact[name]), (
            "the teacher's own images, generated again"
        )
        assert all(row.images == 4 and row.features == "embedded CLIP" for row in exact[name])
    assert all(row.similarity == pytest.approx(1.0) for row in exact["teacher_similarity"])
    assert all(row.student_to_teacher == pytest.approx(0, abs=1e-5) for row in exact["frechet_distance"])
    other = measure(student(context.teacher))
    for name in ("frechet_distance", "text_image_score"):
        assert [row.teacher for row in other[name]] == [row.teacher for row in exact[name]]
        assert [row.student for row in other[name]] != [row.student for row in exact[name]]
    save_samples(context.pipe, plan, tmp_path / "samples")
    written = {path.relative_to(tmp_path / "samples").as_posix() for path in (tmp_path / "samples").rglob("*.png")}
    assert written == {"64/0.png", "guidance-1/64/0.png"}
