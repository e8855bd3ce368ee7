"""Metrics of pictures: distances against formulas by hand, the networks at hand and not, COCO from a folder."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from experiments.config import EvaluationConfig, Grid, ImageMetricsConfig
from experiments.data import DataError
from experiments.distill import open_context
from experiments.evaluate.coco import CocoCaptions
from experiments.evaluate.features import INCEPTION, open_network
from experiments.evaluate.metrics import distances, image_metrics, judge
from experiments.evaluate.pictures import save_samples
from experiments.evaluate.reference import open_reference
from experiments.teacher.load import EMBEDDED
from tests.experiments.students import student
from unet_adapters import MixerAdapter

CAPTIONS = ["red apple, teal background", "cat face, purple background", "blue heart, white background"]


def gaussian(count: int, dim: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64) @ mix + mix[0]


def frechet(x: Tensor, y: Tensor) -> float:
    """The formula with symmetric roots, which torchmetrics does not take."""

    def root(matrix: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        return (vectors * values.clamp_min(0).sqrt()) @ vectors.T

    a, b = x.T.cov(), y.T.cov()
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
    x, y = gaussian(count, dim, seed), gaussian(count, dim, seed + 1000)
    found = distances(x, y)
    assert found["frechet_distance"] == pytest.approx(frechet(x, y), rel=1e-6, abs=1e-4)
    assert found["kernel_distance"] == pytest.approx(kernel(x, y), rel=1e-6, abs=1e-9)


def test_a_set_is_near_itself_and_noise_takes_it_away() -> None:
    x = gaussian(200, 8, 0)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    found = [distances(x, x + share * noise) for share in (0.0, 1.0, 4.0, 16.0)]
    assert found[0]["frechet_distance"] == pytest.approx(0, abs=1e-5)
    for metric in ("frechet_distance", "kernel_distance"):
        values = [row[metric] for row in found]
        assert values == sorted(values) and values[1] < values[3], metric


def test_subsets_of_many_pictures_are_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.evaluate.metrics.SUBSET", 50)
    x, y = gaussian(60, 2, 0), gaussian(51, 2, 0)
    state = torch.random.get_rng_state()
    assert distances(x, y) == distances(x, y)
    assert torch.random.get_rng_state().equal(state), "nobody else's numbers are drawn"


def emoji(size: int = 64) -> Tensor:
    from experiments.data import EmojiSet

    found = EmojiSet("train")
    names = {e.name: k for k, e in enumerate(found.emoji)}
    drawn = [found.example(names[c.split(",")[0]], size, 0) for c in ("red apple,", "cat face,", "blue heart,")]
    return torch.stack([((d.image + 1) * 127.5).round().to(torch.uint8) for d in drawn])


def test_the_embedded_clip_scores_captions_and_sees_every_size_alike() -> None:
    network = open_network("embedded")
    right = judge([(emoji(), CAPTIONS)], [network])[0]
    wrong = judge([(emoji(), CAPTIONS[::-1])], [network])[0]
    assert right.features.shape == (3, network.num_features) and right.features.dtype == torch.float64
    assert right.score is not None and wrong.score is not None and right.score > wrong.score + 10
    large = judge([(emoji(256), CAPTIONS)], [network])[0]
    assert torch.cosine_similarity(large.features, right.features).min() > 0.97
    parts = judge([(emoji()[:1], CAPTIONS[:1]), (emoji()[1:], CAPTIONS[1:])], [network])[0]
    torch.testing.assert_close(parts.features, right.features, rtol=1e-4, atol=1e-5)
    assert parts.score == pytest.approx(right.score, rel=1e-5)


def test_a_wide_picture_is_cropped_to_its_center() -> None:
    network, square = open_network("embedded"), emoji()
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
    mine, ours = open_network(f"clip:{clip_folder(tmp_path / 'clip')}"), open_network("embedded")
    found, wanted = (judge([(emoji(), CAPTIONS)], [network])[0] for network in (mine, ours))
    assert found.features.equal(wanted.features) and found.score == wanted.score
    assert mine.fingerprint == ours.fingerprint


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("vgg", "No feature network 'vgg': expected embedded"),
        ("clip:", "No feature network 'clip:'"),
        ("clip:nobody/nothing", r"Cannot open the features 'clip:nobody/nothing'.*hf download nobody/nothing"),
        ("inception:no/file.pth", r"there is no file no/file\.pth"),
    ],
)
def test_what_is_not_at_hand_is_told(source: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=told):
        open_network(source)


def test_inception_is_looked_for_in_torch_s_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ValueError, match=rf"no file {tmp_path}/checkpoints/{INCEPTION}\. Download https"):
        open_network("inception")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / INCEPTION).write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"torch-fidelity: pip install|Cannot read Inception's weights"):
        open_network("inception")


def coco(folder: Path, count: int = 5) -> Path:
    """A folder in COCO's layout: `count` pictures with two captions each, and one with none."""
    draw = np.random.default_rng(0)
    (folder / "annotations").mkdir(parents=True)
    (folder / "val2014").mkdir()
    pictures = [{"id": 10 * k, "file_name": f"COCO_val2014_{10 * k:012}.jpg"} for k in range(count + 1)]
    for picture in pictures:
        pixels = draw.integers(0, 255, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "val2014" / str(picture["file_name"]))
    notes = [
        {"id": 100 * k + n, "image_id": 10 * k, "caption": f" picture {k},\n caption {n} "}
        for k in range(count)
        for n in range(2)
    ]
    content = {"images": pictures, "annotations": notes}
    (folder / "annotations" / "captions_val2014.json").write_text(json.dumps(content))
    return folder


def test_coco_from_a_folder(tmp_path: Path) -> None:
    data = CocoCaptions(coco(tmp_path))
    assert len(data) == 5 and data.name == "coco, val2014"
    example = data.example(3, 32)
    assert example.image.shape == (3, 32, 32) and example.caption in {"picture 3, caption 0", "picture 3, caption 1"}
    assert len({data.key(k) for k in range(5)}) == 5
    again = CocoCaptions(tmp_path / "annotations" / "captions_val2014.json")
    assert again.items == data.items, "captions are drawn once and for all"
    plan = EvaluationConfig(metrics=ImageMetricsConfig(images=3, data=f"coco:{tmp_path}"))
    first, second = open_reference("emoji", plan), open_reference("emoji", plan.model_copy(update={"seed": 1}))
    assert len(first) == len(set(first.indices)) == 3 and first.digest != second.digest
    shapes = [(tuple(p.shape), p.dtype, len(c)) for p, c in first.batches(16, 2)]
    assert shapes == [((2, 3, 16, 16), torch.uint8, 2), ((1, 3, 16, 16), torch.uint8, 1)]


def test_coco_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no annotations/captions_\*.json"):
        CocoCaptions(tmp_path)
    file = coco(tmp_path) / "annotations" / "captions_val2014.json"
    next((tmp_path / "val2014").iterdir()).unlink()
    data = CocoCaptions(tmp_path)
    with pytest.raises(DataError, match="which the captions name"):
        [data.example(k, 8) for k in range(len(data))]
    shutil.rmtree(tmp_path / "val2014")
    with pytest.raises(DataError, match="There are no pictures for"):
        CocoCaptions(tmp_path)
    (tmp_path / "val2014").mkdir()
    file.write_text('{"images": []}')
    with pytest.raises(DataError, match="as COCO's captions"):
        CocoCaptions(tmp_path)


def test_a_sweep_on_coco_measures_student_teacher_and_truth(grid: Grid, tmp_path: Path) -> None:
    setting = open_context(grid.teacher, grid.data, 64, grid.distillation.images)
    metrics = ImageMetricsConfig(images=4, batch_size=3, resize=32, data=f"coco:{coco(tmp_path / 'coco')}")
    plan = grid.evaluation.model_copy(update={"metrics": metrics, "guidances": (1.0,)})
    exact = image_metrics(setting, MixerAdapter.build(setting.pipe, "softmax"), plan, grid.data)
    kinds = ["frechet_distance", "kernel_distance", "text_image_score"]
    assert [(row["guidance"], row["metric"]) for row in exact] == [(g, k) for g in (3.0, 1.0) for k in kinds]
    assert all(row["student"] == row["teacher"] for row in exact), "the teacher's own pictures, drawn again"
    assert all(row["images"] == 4 and row["features"] == "embedded CLIP" for row in exact)
    assert [row["truth"] is None for row in exact] == [True, True, False] * 2
    other = image_metrics(setting, student(setting.teacher), plan, grid.data)
    assert [row["teacher"] for row in other] == [row["teacher"] for row in exact]
    assert [row["student"] for row in other] != [row["student"] for row in exact]
    save_samples(setting.pipe, plan, tmp_path / "samples")
    made = {path.relative_to(tmp_path / "samples").as_posix() for path in (tmp_path / "samples").rglob("*.png")}
    assert made == {"64/0.png", "guidance-1/64/0.png"}
