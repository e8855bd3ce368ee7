"""The samples, for the page's viewer: small enough to travel in it."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from experiments.report.records import Run

QUALITY = 85


def samples(run: Run) -> dict[str, Any] | None:
    """sizes, prompts, rows (the teacher, then each variant's first finished seed), and the label of the one to show.

    A row has a label and pictures by size, as data URIs.

    None where the teacher has no picture. Pictures are WebP at quality 85: a tenth of the PNGs, which stay as they are.
    """
    rows = [("teacher", run.directory / "teacher")]
    for variant in run.variants:
        folders = [c.directory for c in run.done(variant.name) if (c.directory / "samples").is_dir()]
        rows += [(variant.label, folder) for folder in folders[:1]]
    count = len(run.prompts)
    found: list[dict[str, Any]] = [
        {"label": label, "pictures": _pictures(folder, run.sample_sizes, count)} for label, folder in rows
    ]
    sizes = [size for size in run.sample_sizes if any(found[0]["pictures"][size])]
    if not sizes or len(found) < 2:
        return None
    shown = run.reference.label if run.reference else found[1]["label"]
    return {"sizes": sizes, "prompts": run.prompts, "rows": found, "shown": shown}


def _pictures(folder: Path, sizes: list[int], count: int) -> dict[int, list[str]]:
    return {size: [_uri(folder / "samples" / str(size) / f"{k}.png") for k in range(count)] for size in sizes}


def _uri(path: Path) -> str:
    """A data URI; empty where there is no picture."""
    try:
        with Image.open(path) as image:
            return webp(image.convert("RGB"))
    except (OSError, UnidentifiedImageError):
        return ""


def webp(image: Image.Image, lossless: bool = False) -> str:
    """A data URI of a picture as WebP."""
    out = io.BytesIO()
    image.save(out, "WEBP", quality=QUALITY, lossless=lossless)
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode("ascii")
