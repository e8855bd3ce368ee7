"""Tables of captioned images from disk: every format has the same images, unusable rows are reported; and sizes."""

from __future__ import annotations

import io
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from experiments.data import BadRecord, DataError, EmojiSet, ImageFolder, TableImages, open_dataset, open_records
from experiments.data.image import crop_and_resize
from experiments.distill.cache_builder import build_cache
from experiments.teacher.teacher import Teacher
from tests.unet_adapters import pipelines

datasets = pytest.importorskip("datasets", reason="the extra `data` is not installed")

GOOD = 12


@pytest.fixture(autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's copies go to a folder of the test, and nothing to the network."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def png(number: int) -> bytes:
    """An image that encodes its number, and left and right; not square."""
    pixels = np.full((20, 32, 3), 7 * number, np.uint8)
    pixels[:, 16:, 0] = 255
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


# Four broken rows among the good ones: pixels, caption, and a caption of the wrong kind in formats that have kinds.
ROWS: list[tuple[bytes | None, str | None]] = [(png(n), f"image {n}") for n in range(GOOD)]
ROWS[3:3] = [(b"no image", "broken"), (png(1)[:60], "cut"), (png(1), None), (None, "nothing"), (png(1), "  ")]


def parquet(folder: Path, rows: list[tuple[Any, Any]] = ROWS, name: str = "a.parquet") -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = [None if image is None else {"bytes": image, "path": None} for image, _ in rows]
    table = pa.table({"image": images, "text": [caption for _, caption in rows], "more": list(range(len(rows)))})
    pq.write_table(table, folder / name, row_group_size=4)
    return str(folder / name)


def arrow(folder: Path) -> str:
    saved(folder / "saved")
    (file,) = (folder / "saved").glob("*.arrow")
    return str(file.rename(folder / "a.arrow"))


def tars(folder: Path, first: int = 0) -> str:
    for name, rows in (("a.tar", ROWS[first:9]), ("b.tar", ROWS[9:])):
        with tarfile.open(folder / name, "w") as archive:
            for number, fields in enumerate(rows):
                for kind, data in zip(("png", "txt"), fields, strict=True):
                    if data is not None:
                        entry = tarfile.TarInfo(f"{name[0]}{number:03}.{kind}")
                        content = data if isinstance(data, bytes) else data.encode()
                        entry.size = len(content)
                        archive.addfile(entry, io.BytesIO(content))
    return f"{folder}/*.tar#image=png&text=txt"


def saved(folder: Path) -> str:
    columns = {"image": [image for image, _ in ROWS], "caption": [caption for _, caption in ROWS]}
    features = datasets.Features({"image": datasets.Image(decode=False), "caption": datasets.Value("string")})
    values = [None if image is None else {"bytes": image, "path": None} for image in columns["image"]]
    datasets.Dataset.from_dict({**columns, "image": values}, features=features).save_to_disk(str(folder))
    return str(folder)


def split_parquet(folder: Path) -> str:
    parquet(folder, ROWS[:8], "a.parquet")
    parquet(folder, ROWS[8:], "b.parquet")
    return str(folder)


FORMATS: dict[str, Callable[[Path], str]] = {
    "parquet": parquet,
    "folder": split_parquet,
    "arrow": arrow,
    "tar": tars,
    "saved": saved,
}


@pytest.mark.parametrize("kind", FORMATS)
def test_a_stream_is_every_row_in_order_and_bad_ones_say_why(kind: str, tmp_path: Path) -> None:
    source = FORMATS[kind](tmp_path)
    for _ in range(2):  # opened again, read again: the same
        captions = []
        reasons = []
        for split in ("train", "held_out"):
            for record in open_records(source, split=split).records():
                try:
                    example = record.example(8)
                except BadRecord as error:
                    reasons.append(str(error))
                    continue
                captions.append(example.caption)
                number = int(example.caption.split()[1])
                assert example.image[1, 4, 4] == pytest.approx(7 * number / 127.5 - 1)
        assert sorted(captions, key=lambda c: int(c.split()[1])) == [f"image {n}" for n in range(GOOD)]
        assert sorted(reasons)[2:] == ["no caption", "no caption", "no image"]
        assert all(reason.startswith("its image cannot be read") for reason in sorted(reasons)[:2])


@pytest.mark.parametrize("kind", FORMATS)
def test_in_any_order_it_is_the_same_rows(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = FORMATS[kind](tmp_path)
    with caplog.at_level("WARNING"):
        data = TableImages(source)
        good = [e for e in (data.example(i, (10, 16)) for i in range(len(data)))]
    assert len(data) == GOOD + 3, "what opening cannot see stays in, and is replaced"
    assert {e.caption for e in good} == {f"image {n}" for n in range(GOOD)}
    assert good[3].caption == good[6].caption == "image 3", "by the next good row"
    assert data.skipped["no caption"] == 2 and data.skipped["no image"] >= 1
    assert "Skipped row" in caplog.text and f"{GOOD + 3} used, 2 skipped (2 × no caption)" in caplog.text
    first = data.example(2, (10, 16))
    mirrored = data.example(2, (10, 16), variation=1)
    assert torch.equal(first.image.flip(-1), mirrored.image)
    assert first.image.shape == (3, 10, 16) and first.image[0, 5, 2] < first.image[0, 5, 13] == 1
    streamed = [r for s in ("train", "held_out") for r in open_records(source, split=s).records()]
    again = next(r for r in streamed if r.key == data.key(2)).example((10, 16))
    assert torch.equal(again.image, first.image) and again.caption == first.caption


@pytest.mark.parametrize("kind", FORMATS)
def test_the_split_is_by_content_and_disjoint(kind: str, tmp_path: Path) -> None:
    source = FORMATS[kind](tmp_path)
    parts = {s: [r.key for r in open_records(source, split=s).records()] for s in ("train", "held_out")}
    assert len(parts["train"]) + len(parts["held_out"]) == len(ROWS)
    assert not set(parts["train"]) & set(parts["held_out"])
    whole = open_dataset(source, split="train")
    assert {whole.key(i) for i in range(len(whole))} <= set(parts["train"])
    for opened in (open_records, open_dataset):
        with pytest.raises(DataError, match="'test'"):
            opened(source, split="test")


def test_records_of_a_set_with_a_length_are_shuffled_by_the_seed() -> None:
    data = EmojiSet()
    first, again, other = ([r.key for r in data.records(seed)] for seed in (0, 0, 1))
    assert first == again != other and sorted(first) == sorted(other)
    record = next(data.records(0))
    assert torch.equal(record.example(16, 3).image, data.example(first_index(data, record.key), 16, 3).image)


def first_index(data: EmojiSet, key: str) -> int:
    return next(i for i in range(len(data)) if data.key(i) == key)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_cache_is_built_from_a_stream_and_resumes_in_the_middle(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    source = FORMATS[kind](tmp_path / "data")
    teacher = Teacher(pipelines.make())
    options: dict[str, Any] = {"sizes": [8, (8, 12)], "images": 100, "shard": 4, "variations": 2, "batch_size": 3}
    build_cache(teacher, open_records(source), tmp_path / "undisturbed", **options)

    calls = iter(range(9))
    encode = teacher.encode_images
    with monkeypatch.context() as patch, pytest.raises(StopIteration):
        patch.setattr(teacher, "encode_images", lambda images: (next(calls), encode(images))[1])
        build_cache(teacher, open_records(source), tmp_path / "cache", **options)
    assert (tmp_path / "cache" / "text-00001.safetensors").is_file(), "killed in the third shard"
    cache = build_cache(teacher, open_records(source), tmp_path / "cache", **options)
    for path in (tmp_path / "undisturbed").iterdir():
        assert path.read_bytes() == (tmp_path / "cache" / path.name).read_bytes()

    records = list(open_records(source).records())
    assert len(cache) + sum(cache.skipped.values()) == 2 * len(records)
    assert len(cache) > 15 and cache.skipped["no caption"] >= 2
    direct = teacher.encode(records[0].example((8, 12), 1).image[None], [records[0].example(8).caption])
    for name, value in cache.batch([1], (8, 12)).items():
        torch.testing.assert_close(value, direct[name])


# --- columns, options, errors ---------------------------------------------------------------------


def test_columns_are_named_in_the_source(tmp_path: Path) -> None:
    source = parquet(tmp_path)
    keyed = [r.key for r in open_records(f"{source}#key=more").records()]
    assert keyed and set(keyed) <= {str(n) for n in range(len(ROWS))}
    with pytest.raises(DataError, match=r"expected a column foto, got image, text, more\. Name the columns"):
        open_dataset(f"{source}#image=foto")


def test_a_caption_that_is_no_text_is_skipped(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No usable row"):
        TableImages(f"{parquet(tmp_path)}#text=more")
    reasons = []
    for record in open_records(f"{parquet(tmp_path)}#text=more").records():
        with pytest.raises(BadRecord) as error:
            record.example(8)
        reasons.append(str(error.value))
    assert set(reasons) == {"its caption is no text (int)"}


def test_an_incomplete_record_at_a_tar_s_start_needs_names(tmp_path: Path) -> None:
    source = tars(tmp_path, first=2)
    with pytest.raises(DataError, match=r"Cannot open .*a\.tar as data: .+ Name the columns: SOURCE#image="):
        open_records(source.partition("#")[0])
    assert len(list(open_records(source).records())) > 8
    assert open_records(tars(tmp_path).partition("#")[0]).name == "*.tar, train", "guessed, of whole ones"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nothing/*.parquet", "0 kinds"),
        ("{folder}#color=red", "expected options among image, text, key, got 'color'"),
        ("{folder}#split=test", "got 'split'"),
        ("hub:nobody/nothing-at-all", "Cannot open hub:nobody/nothing-at-all as data: "),
        ("{folder}/bad.parquet", "Cannot open .*bad.parquet as data: "),
        ("{folder}/empty.tar", "Cannot open .*empty.tar as data: "),
        ("nowhere", "not a folder"),
    ],
)
def test_what_cannot_be_opened_is_one_sentence(source: str, message: str, tmp_path: Path) -> None:
    parquet(tmp_path)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "empty.tar").write_bytes(b"")
    for opened in (open_records, open_dataset):
        with pytest.raises(DataError, match=message) as error:
            opened(source.format(folder=tmp_path / "a.parquet" if "#" in source else tmp_path))
        assert "\n" not in str(error.value)


def test_a_file_damaged_further_on_is_one_sentence(tmp_path: Path) -> None:
    good = parquet(tmp_path)
    content = bytearray(Path(good).read_bytes())
    content[200:400] = bytes(200)
    Path(good).write_bytes(content)
    with pytest.raises(DataError, match=r"Cannot (read|open)"):
        list(open_records(good).records())


def test_the_hub_is_asked_for_what_the_source_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = parquet(tmp_path)
    calls = []

    def load(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return real("parquet", data_files=[table], split="train", streaming=kwargs["streaming"])

    real = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", load)
    opened = open_records("hub:owner/name#config=small&split=validation&revision=abc")
    assert opened.name == "hub:owner/name, train" and list(opened.records())
    more = {"name": "small", "split": "validation", "revision": "abc"}
    assert calls == [(("owner/name",), {**more, "streaming": True})]


def test_without_the_library_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = parquet(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'linear-token-mixers\[data\]'"):
        open_dataset(source)


# --- sizes ----------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 24), st.integers(1, 24))
def test_a_resized_image_has_the_requested_size_and_its_own_colors(height: int, width: int, h: int, w: int) -> None:
    image = crop_and_resize(Image.new("RGB", (width, height), (200, 40, 10)), (h, w))
    assert image.shape == (3, h, w)
    torch.testing.assert_close(image, (torch.tensor([200.0, 40, 10]) / 127.5 - 1).view(3, 1, 1).expand(3, h, w))


def test_the_center_of_the_requested_shape_is_kept() -> None:
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[10:30] = 255
    image = crop_and_resize(Image.fromarray(pixels), (10, 20))  # 20 × 40 of it
    assert (image == 1).all()


def test_emoji_that_are_not_square_have_the_square_in_the_middle() -> None:
    data = EmojiSet()
    square, wide, tall = (data.example(40, size, 2).image for size in (32, (32, 80), (80, 32)))
    assert torch.equal(wide[:, :, 24:56], square) and torch.equal(tall[:, 24:56], square)
    assert torch.equal(wide[:, :, :24].amax((1, 2)), wide[:, :, 56:].amin((1, 2))), "one color to both sides"


def test_images_of_a_folder_are_turned_upright(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    (tmp_path / "a.txt").write_text("a")
    image = ImageFolder(tmp_path).example(0, 8).image
    assert (image[:, 4:] == 1).all() and (image[:, :4] == -1).all()
