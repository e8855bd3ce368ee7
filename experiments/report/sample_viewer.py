"""The samples for the page's viewer, small enough to be embedded in it."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from experiments.report.run_files import RunRecord

QUALITY = 85


def collect_samples(run: RunRecord) -> dict[str, Any] | None:
    """Return sizes, prompts, rows (the teacher, then each variant's first finished seed), and the row to start with.

    A row has a label and images by size, as data URIs in WebP at quality 85, a tenth of the PNGs. None if the teacher
    has no image.
    """
    rows = [("teacher", run.directory / "teacher")]
    for variant in run.variants:
        folders = [cell.directory for cell in run.done(variant.name) if (cell.directory / "samples").is_dir()]
        rows += [(variant.label, folder) for folder in folders[:1]]
    prompts = list(run.description.prompts)
    sample_sizes = sorted(run.description.sample_sizes)
    samples: list[dict[str, Any]] = [
        {"label": label, "images": _images_by_size(folder, sample_sizes, len(prompts))} for label, folder in rows
    ]
    sizes = [size for size in sample_sizes if any(samples[0]["images"][size])]
    if not sizes or len(samples) < 2:
        return None
    start = run.reference.label if run.reference else samples[1]["label"]
    return {"sizes": sizes, "prompts": prompts, "rows": samples, "start": start}


def encode_webp(image: Image.Image, lossless: bool = False) -> str:
    """Return a data URI of an image as WebP."""
    out = io.BytesIO()
    image.save(out, "WEBP", quality=QUALITY, lossless=lossless)
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode("ascii")


def _images_by_size(folder: Path, sizes: list[int], count: int) -> dict[int, list[str]]:
    return {size: [_data_uri(folder / "samples" / str(size) / f"{k}.png") for k in range(count)] for size in sizes}


def _data_uri(path: Path) -> str:
    """A data URI; empty if the image cannot be read."""
    try:
        with Image.open(path) as image:
            return encode_webp(image.convert("RGB"))
    except (OSError, UnidentifiedImageError):
        return ""
