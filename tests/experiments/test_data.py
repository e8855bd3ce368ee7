"""The data sets: one scene at every size, a fixed split, and folders that say what is wrong with them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from experiments.data import DataError, EmojiSet, ImageFolder, batch, open_dataset
from experiments.data.emoji import BACKGROUNDS, catalogue, render

CAT = (200, 40, 40)
DOG = (40, 40, 200)


def save(path: Path, color: tuple[int, int, int] = CAT, size: tuple[int, int] = (48, 48)) -> None:
    Image.new("RGB", size, color).save(path)


def rgb(name: str) -> list[int]:
    return list(bytes.fromhex(BACKGROUNDS[name][1:]))


def background_of(caption: str) -> str:
    return caption.rsplit(", ", 1)[1].removesuffix(" background")


# --- the embedded emoji ---------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 17, 400, 1200])
def test_one_item_is_the_same_scene_at_every_size(index: int) -> None:
    data = EmojiSet()
    small, middle, large = (data.example(index, size, variation=3) for size in (64, 128, 256))
    assert small.caption == middle.caption == large.caption
    assert small.key == middle.key == large.key
    for finer, factor in ((middle, 2), (large, 4)):
        shrunk = F.avg_pool2d(finer.image[None], factor)[0]
        assert (shrunk - small.image).abs().mean() < 0.03, "not the same scene"


def test_images_are_float32_in_the_range_of_the_teacher() -> None:
    image = EmojiSet().example(5, 64).image
    assert image.shape == (3, 64, 64) and image.dtype == torch.float32
    assert image.min() >= -1 and image.max() <= 1


@pytest.mark.parametrize("index", range(0, 300, 25))
def test_the_caption_names_the_background(index: int) -> None:
    example = EmojiSet().example(index, 64, variation=index)
    background = background_of(example.caption)
    pixels = ((example.image + 1) * 127.5).round().to(torch.int64).permute(1, 2, 0)
    corners = [pixels[y, x].tolist() for y in (0, -1) for x in (0, -1)]
    # A square drawing scaled into the corner may cover one of them; its box never covers all four.
    assert rgb(background) in corners, f"{example.caption}: corners are {corners}"


def test_a_variation_is_a_pure_function_of_its_numbers() -> None:
    first = EmojiSet()
    second = EmojiSet()
    for variation in range(4):
        a = first.example(7, 32, variation)
        b = second.example(7, 32, variation)
        assert a.caption == b.caption and torch.equal(a.image, b.image)
    scenes = [first.example(7, 32, variation) for variation in range(12)]
    assert len({background_of(s.caption) for s in scenes}) > 1
    assert any(not torch.equal(scenes[0].image, s.image) for s in scenes[1:])


def test_variation_does_not_depend_on_the_global_random_state() -> None:
    data = EmojiSet()
    a = data.example(7, 32, 1)
    np.random.seed(99)
    torch.manual_seed(99)
    assert torch.equal(a.image, data.example(7, 32, 1).image)


def test_the_split_is_disjoint_and_covers_all() -> None:
    train, held_out = ({e.path.stem for e in EmojiSet(split).emoji} for split in ("train", "held_out"))
    assert not train & held_out
    assert train | held_out == {e.path.stem for e in EmojiSet(split=None).emoji}
    assert len(train) + len(held_out) == len(catalogue()) == 1918
    assert 0.07 < len(held_out) / 1918 < 0.13


def test_the_split_is_the_same_for_ever() -> None:
    keys = [e.path.stem for e in EmojiSet("held_out").emoji]
    assert keys[:5] == ["1f197", "1f199", "1f1e7-1f1ee", "1f1e7-1f1f8", "1f1e7-1f1fc"]


def test_an_unknown_split_is_named() -> None:
    with pytest.raises(DataError, match="'test'"):
        open_dataset("emoji", split="test")


def test_batch_stacks_images_and_captions() -> None:
    images, captions = batch(EmojiSet(), [1, 2], 32, [0, 5])
    assert images.shape == (2, 3, 32, 32) and len(captions) == 2
    with pytest.raises(ValueError):
        batch(EmojiSet(), [1, 2], 32, [0])


@pytest.mark.parametrize(("width", "height"), [(36, 25), (25, 36), (36, 36)])
def test_a_drawing_that_is_not_square_is_not_cropped(width: int, height: int) -> None:
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">'
        f'<rect width="{width}" height="{height}" fill="#ff0000"/></svg>'
    )
    red = (render(svg, 144, "#000000", scale=0.75) == [255, 0, 0]).all(-1)
    rows = np.flatnonzero(red.any(1))
    columns = np.flatnonzero(red.any(0))
    unit = 144 * 0.75 / 36  # pixels per unit of the drawing
    assert columns[-1] - columns[0] + 1 == pytest.approx(width * unit, abs=2)
    assert rows[-1] - rows[0] + 1 == pytest.approx(height * unit, abs=2)


def test_an_svg_without_a_view_box_is_refused() -> None:
    with pytest.raises(ValueError, match="viewBox"):
        render("<svg><rect/></svg>", 32, "#000000")


# --- folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize("captions", ["text files", "metadata"])
def test_files_of_the_same_name_in_several_folders_are_several_items(captions: str, tmp_path: Path) -> None:
    lines = []
    for folder, color in (("cats", CAT), ("dogs", DOG)):
        (tmp_path / folder).mkdir()
        save(tmp_path / folder / "0001.png", color)
        (tmp_path / folder / "0002.gif").write_bytes(b"not read")
        (tmp_path / folder / "0003.png").write_bytes(b"damaged")
        if captions == "text files":
            for number in ("0001", "0003"):
                (tmp_path / folder / f"{number}.txt").write_text(folder)
        lines += [json.dumps({"file_name": f"{folder}/{number}.png", "text": folder}) for number in ("0001", "0003")]
    if captions == "metadata":
        (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    data = ImageFolder(tmp_path)
    assert [data.key(i) for i in range(len(data))] == ["cats/0001.png", "dogs/0001.png"]
    assert data.example(1, 16).key == "dogs/0001.png" and data.digest(0) != data.digest(1)
    assert len(data.skipped) == (4 if captions == "text files" else 2), data.skipped


def test_names_of_files_need_not_be_text(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    for suffix, content in ((b".png", (tmp_path / "a.png").read_bytes()), (b".txt", b"a cat")):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff" + suffix)).write_bytes(content)
    data = ImageFolder(tmp_path, split="train")
    assert [data.key(i) for i in range(len(data))] == ["\\xff.png"] and data.digest(0)
    assert data.example(0, 16).caption == "a cat" and set(data.skipped) == {"a.png"}


def test_a_caption_that_is_no_valid_text_is_left_out(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    lines = [json.dumps({"file_name": "a.png", "text": text}) for text in ("half \ud800", "whole")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    data = ImageFolder(tmp_path)
    assert len(data) == 1 and data.example(0, 16).caption == "whole"
    assert "no valid Unicode" in data.skipped["metadata.jsonl, line 1"]


@pytest.mark.parametrize("source", ["", " ", "hub:", "hub: ", "a\0b"])
def test_data_without_a_name_is_not_the_working_directory(source: str) -> None:
    with pytest.raises(DataError, match=r"Cannot open .* as data: give 'scenes'"):
        open_dataset(source)


def test_a_folder_with_text_files(tmp_path: Path) -> None:
    for name, color in (("cat", CAT), ("dog", DOG)):
        save(tmp_path / f"{name}.png", color)
        (tmp_path / f"{name}.txt").write_text(f"a {name}\n")
    data = ImageFolder(tmp_path)
    assert len(data) == 2 and not data.skipped
    example = data.example(0, 16)
    assert (example.caption, example.key, tuple(example.image.shape)) == ("a cat", "cat.png", (3, 16, 16))
    assert torch.allclose(example.image[:, 8, 8], torch.tensor(CAT) / 127.5 - 1, atol=1e-5)


def test_a_folder_with_metadata(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    save(tmp_path / "images" / "a.png")
    save(tmp_path / "b.jpg", DOG)
    records = [{"file_name": "images/a.png", "text": "first"}, {"file_name": "b.jpg", "text": "second", "extra": 1}]
    (tmp_path / "metadata.jsonl").write_text("\n\n".join(map(json.dumps, records)) + "\n")
    data = ImageFolder(tmp_path)
    assert [data.example(i, 16).caption for i in range(len(data))] == ["first", "second"]


def test_odd_variations_are_mirrored_and_wide_images_lose_their_sides(tmp_path: Path) -> None:
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :8] = 255
    pixels[:, 8:16] = 128  # white side to be cut off, then gray: the left half of the square
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    (tmp_path / "wide.txt").write_text("wide")
    data = ImageFolder(tmp_path)
    plain = data.example(0, 16, 0).image
    mirrored = data.example(0, 16, 1).image
    assert torch.equal(plain.flip(-1), mirrored)
    assert plain[0, 8, 2] == pytest.approx(128 / 127.5 - 1, abs=1e-4) and plain[0, 8, 13] == -1


def test_images_that_cannot_be_used_are_skipped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path / "good.png")
    save(tmp_path / "silent.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    for name in ("good", "broken"):
        (tmp_path / f"{name}.txt").write_text(name)
    with caplog.at_level("WARNING"):
        data = ImageFolder(tmp_path)
    assert len(data) == 1 and data.example(0, 16).caption == "good"
    assert set(data.skipped) == {"broken.png", "silent.png"}
    assert "broken.png" in caplog.text and "2 skipped" in caplog.text


def test_a_folder_without_images_says_what_it_expects(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"No usable image.*metadata\.jsonl"):
        ImageFolder(tmp_path)


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a folder"):
        open_dataset(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    "line",
    [
        "{not json",
        '{"file_name": "a.png"}',
        '{"file_name": "a.png", "text": null}',
        '{"file_name": "a.png", "text": 3}',
        '{"text": "a"}',
        '["a.png", "text"]',
        "3",
        "\udcff",
    ],
)
def test_a_bad_line_of_metadata_is_skipped_and_named(
    tmp_path: Path, line: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path / "a.png")
    good = json.dumps({"file_name": "a.png", "text": "fine"})
    (tmp_path / "metadata.jsonl").write_text(f"{line}\n{good}\n", errors="surrogateescape")
    data = ImageFolder(tmp_path)
    assert [caption for _, caption in data.items] == ["fine"] and len(data.skipped) == 1
    assert "metadata.jsonl, line 1" in caplog.text and "1 images used, 1 skipped" in caplog.text


def test_a_caption_in_another_encoding_is_skipped_and_named(tmp_path: Path) -> None:
    for name, text in (("good", b"caf\xc3\xa9"), ("latin", b"caf\xe9")):
        save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_bytes(text)
    data = ImageFolder(tmp_path)
    assert len(data) == 1 and "latin.txt cannot be read" in data.skipped["latin.png"]


def test_a_folder_is_split_by_file_name(tmp_path: Path) -> None:
    for i in range(40):
        save(tmp_path / f"{i:02}.png", size=(4, 4))
        (tmp_path / f"{i:02}.txt").write_text(str(i))
    train, held_out = ({p.name for p, _ in ImageFolder(tmp_path, split).items} for split in ("train", "held_out"))
    assert train and held_out and not train & held_out and len(train | held_out) == 40
