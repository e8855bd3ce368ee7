"""Image files: every mode, depth and orientation is read as the same upright 8-bit RGB, from every kind of source."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from experiments.data import BadRecord, ImageFolder, TableImages, image, open_dataset, read_image
from experiments.data.example import parse_caption
from experiments.data.hub import is_table
from experiments.metrics.inputs.coco import CocoCaptions

EXIF_ORIENTATION = 0x0112


def encoded(original: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    original.save(file, kind, **options)
    return file.getvalue()


def ramp(dtype: str = "uint16") -> np.ndarray:
    """All gray values from 0 to 65,535, in 256 rows."""
    return np.arange(65536, dtype=dtype).reshape(256, 256)


def rgb16_png(values: np.ndarray) -> bytes:
    """A 16-bit RGB PNG, which Pillow can read but not write."""
    import struct
    import zlib

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def half_transparent(mode: str) -> Image.Image:
    """A black image whose left half is opaque and whose right half is transparent."""
    alpha = Image.new("L", (4, 2), 255)
    alpha.paste(0, (2, 0, 4, 2))
    black = Image.new("RGBA", (4, 2), (0, 0, 0, 255))
    black.putalpha(alpha)
    if mode == "P":
        palette = Image.new("P", (4, 2), 0)
        palette.putpalette([0, 0, 0, 10, 200, 10])
        palette.paste(1, (2, 0, 4, 2))
        return palette
    return black.convert(mode)


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_a_ramp_of_16_bits_has_the_mean_of_8_bits(mode: str) -> None:
    values = {"I;16": ramp(), "I": ramp("int32"), "F": (ramp() / 65535).astype(np.float32)}[mode]
    source = Image.fromarray(values)
    assert source.mode == mode
    kind = "PNG" if mode == "I;16" else "TIFF"
    pixels = np.asarray(read_image(io.BytesIO(encoded(source, kind))))
    assert pixels.shape == (256, 256, 3) and pixels.dtype == np.uint8
    assert pixels.mean() == pytest.approx(127.5, abs=1) and pixels.min() == 0 and pixels.max() == 255
    assert (np.diff(pixels[..., 0].reshape(-1).astype(int)) >= 0).all()


def test_a_ramp_of_16_bit_rgb_has_the_mean_of_8_bits() -> None:
    pixels = np.asarray(read_image(io.BytesIO(rgb16_png(np.stack([ramp()] * 3, -1)))))
    assert pixels.mean() == pytest.approx(127.5, abs=1) and pixels.max() == 255


@given(st.lists(st.integers(0, 255), min_size=3, max_size=3), st.sampled_from(["RGB", "P", "CMYK", "YCbCr", "RGBA"]))
def test_a_color_is_the_same_in_every_mode(color: list[int], mode: str) -> None:
    source = Image.new("RGB", (3, 2), tuple(color)).convert(mode, palette=Image.Palette.ADAPTIVE)
    kind = "TIFF" if mode in ("CMYK", "YCbCr") else "PNG"
    pixels = np.asarray(read_image(io.BytesIO(encoded(source, kind))), dtype=int)
    assert np.abs(pixels - color).max() <= (3 if mode == "YCbCr" else 0)  # YCbCr is rounded to 8 bits


@given(st.integers(0, 255), st.sampled_from(["L", "LA", "1"]))
def test_gray_is_the_same_in_every_mode(gray: int, mode: str) -> None:
    gray = 255 * (gray > 127) if mode == "1" else gray
    pixels = np.asarray(read_image(io.BytesIO(encoded(Image.new("L", (3, 2), gray).convert(mode)))))
    assert (pixels == gray).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_show_white(mode: str) -> None:
    options = {"transparency": 1} if mode == "P" else {}
    pixels = np.asarray(read_image(io.BytesIO(encoded(half_transparent(mode), **options))))
    assert (pixels[:, :2] == 0).all() and (pixels[:, 2:] == image.BACKGROUND).all()


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_transparent_color_shows_white(mode: str) -> None:
    source = Image.new("RGB", (4, 2), (9, 9, 9)).convert(mode)
    source.paste(source.point(lambda _: 0), (0, 0))
    source.paste(9 if mode == "L" else (9, 9, 9), (2, 0, 4, 2))
    options = {"transparency": 9 if mode == "L" else (9, 9, 9)}
    pixels = np.asarray(read_image(io.BytesIO(encoded(source, **options))))
    assert (pixels[:, :2] == 0).all() and (pixels[:, 2:] == 255).all()


def test_half_transparent_pixels_are_mixed_with_white() -> None:
    pixels = np.asarray(read_image(io.BytesIO(encoded(Image.new("RGBA", (1, 1), (200, 0, 100, 51))))))
    assert np.abs(pixels[0, 0].astype(int) - [244, 204, 224]).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_images_are_turned_upright(kind: str, orientation: int) -> None:
    upright = Image.new("RGB", (32, 16), (0, 0, 0))
    upright.paste((255, 0, 0), (0, 0, 16, 8))
    upright.paste((0, 0, 255), (16, 8, 32, 16))
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    pixels = np.asarray(read_image(io.BytesIO(encoded(stored, kind, exif=exif))), dtype=int)
    assert pixels.shape == (16, 32, 3)
    assert np.abs(pixels[2:6, 4:12] - [255, 0, 0]).max() < 16 and np.abs(pixels[10:14, 20:28] - [0, 0, 255]).max() < 16


@pytest.mark.parametrize("values", [np.full((2, 2), 70000, np.int32), np.full((2, 2), 7.0, np.float32)])
def test_gray_values_of_unknown_range_are_refused(values: np.ndarray) -> None:
    with pytest.raises(BadRecord, match="expected from 0 to"):
        read_image(io.BytesIO(encoded(Image.fromarray(values), "TIFF")))


def test_images_beyond_pillow_s_limit_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    Image.new("L", (8, 8), 3).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").size == (8, 8)
    assert Image.MAX_IMAGE_PIXELS == 10
    monkeypatch.setattr(image, "MAX_PIXELS", 63)
    with pytest.raises(BadRecord, match="8 × 8 pixels, more than 63"):
        read_image(tmp_path / "a.png")


def test_what_is_no_image_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    for name in ("a.png", "missing.png"):
        with pytest.raises(BadRecord, match=rf"{name} cannot be read as an image"):
            read_image(tmp_path / name)


# --- every source reads them alike ----------------------------------------------------------------


def from_folder(folder: Path, content: bytes) -> np.ndarray:
    (folder / "a.png").write_bytes(content)
    (folder / "a.txt").write_bytes("\ufeffa ramp\n".encode())
    data = ImageFolder(folder)
    assert data.example(0, 256).caption == "a ramp"
    return data.example(0, 256).image.numpy()


def from_metadata(folder: Path, content: bytes) -> np.ndarray:
    (folder / "a.png").write_bytes(content)
    line = json.dumps({"file_name": "a.png", "text": "a ramp"})
    (folder / "metadata.jsonl").write_bytes(f"\ufeff{line}\n".encode())
    data = ImageFolder(folder)
    assert data.example(0, 256).caption == "a ramp"
    return data.example(0, 256).image.numpy()


def from_parquet(folder: Path, content: bytes) -> np.ndarray:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    table = pa.table({"image": [{"bytes": content, "path": None}], "text": ["\ufeffa ramp"]})
    pq.write_table(table, folder / "a.parquet")
    data = TableImages(str(folder / "a.parquet"))
    assert data.example(0, 256).caption == "a ramp"
    return data.example(0, 256).image.numpy()


def from_tar(folder: Path, content: bytes) -> np.ndarray:
    with tarfile.open(folder / "a.tar", "w") as archive:
        for name, data in (("a.png", content), ("a.txt", "\ufeffa ramp".encode())):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    images = TableImages(f"{folder}/a.tar#image=png&text=txt")
    assert images.example(0, 256).caption == "a ramp"
    return images.example(0, 256).image.numpy()


def from_coco(folder: Path, content: bytes) -> np.ndarray:
    (folder / "val2017").mkdir()
    (folder / "annotations").mkdir()
    (folder / "val2017" / "a.png").write_bytes(content)
    captions = {
        "images": [{"id": 1, "file_name": "a.png"}],
        "annotations": [{"id": 1, "image_id": 1, "caption": "a ramp"}],
    }
    (folder / "annotations" / "captions_val2017.json").write_text(json.dumps(captions))
    return CocoCaptions(folder).example(0, 256).image.numpy()


SOURCES: dict[str, Callable[[Path, bytes], np.ndarray]] = {
    "folder": from_folder,
    "metadata": from_metadata,
    "parquet": from_parquet,
    "tar": from_tar,
    "coco": from_coco,
}


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_reads_16_bits_turns_upright_and_drops_a_byte_order_mark(source: str, tmp_path: Path) -> None:
    if source in ("parquet", "tar"):
        pytest.importorskip("datasets", reason="the extra `data` is not installed")
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 3  # upside down
    stored = Image.fromarray(np.ascontiguousarray(ramp()[::-1, ::-1]))
    pixels = (SOURCES[source](tmp_path, encoded(stored, exif=exif)) + 1) * 127.5
    assert pixels.mean() == pytest.approx(127.5, abs=1)
    assert pixels[:, 0].max() < 2 and pixels[:, -1].min() > 253


@pytest.mark.parametrize("text", ["\ufeffa cat", " a cat\n", "\ufeff a cat", "a cat"])
def test_a_byte_order_mark_is_no_part_of_a_caption(text: str) -> None:
    assert parse_caption(text) == "a cat"
    with pytest.raises(BadRecord, match="no caption"):
        parse_caption("\ufeff")


# --- what a folder leaves out ---------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".gif", ".tiff", ".avif", ".GIF", ".tar", ".parquet"])
def test_files_that_are_not_read_are_counted_and_named(
    suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "good.png").write_bytes(encoded(Image.new("L", (8, 8))))
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / f"other{suffix}").write_bytes(b"anything")
    (tmp_path / "notes.md").write_text("no image")
    assert not is_table(str(tmp_path)), "a stray table beside captioned images does not make a table of the folder"
    data = open_dataset(str(tmp_path))
    assert len(data) == 1 and isinstance(data, ImageFolder)
    assert set(data.skipped) == {f"other{suffix}"}
    assert f"other{suffix}" in caplog.text and "1 images used, 1 skipped" in caplog.text


def test_a_folder_of_tables_with_a_stray_image_is_a_table(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_bytes(b"")
    (tmp_path / "preview.png").write_bytes(encoded(Image.new("L", (8, 8))))
    assert is_table(str(tmp_path))
