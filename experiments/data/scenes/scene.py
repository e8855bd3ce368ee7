"""A scene as data, and its rendering: one SVG document for all drawings, so that edges are antialiased at any size."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from experiments.data.example import Size, extent
from experiments.data.scenes.catalogue import Drawing


@dataclass(frozen=True)
class Placement:
    """One copy of a drawing in a box with its top left corner at (x, y), in units of the canvas; y points down.

    Attributes:
        side: of the box.
        flip: `"x"` mirrors left and right, `"y"` top and bottom, `""` neither.
    """

    drawing: Drawing
    x: float
    y: float
    side: float
    flip: str = ""


@dataclass(frozen=True)
class Scene:
    """What an image shows.

    Attributes:
        caption: what the text says; a hidden kind names no drawing or color of an object.
        background: as "#rrggbb".
        placements: the objects.
        canvas: (width, height) in units; one unit is 64 px at the training scale.
    """

    caption: str
    background: str
    placements: tuple[Placement, ...]
    canvas: tuple[float, float] = (1.0, 1.0)

    @property
    def drawings(self) -> tuple[Drawing, ...]:
        """The distinct drawings, in the order of their first copies."""
        return tuple(dict.fromkeys(placement.drawing for placement in self.placements))


def compose_svg(scene: Scene, size: Size) -> str:
    """Return the scene as an SVG document of `size` px; where the shape differs, the background fills the sides."""
    height, width = extent(size)
    across, down = scene.canvas
    scale = min(width / across, height / down)
    left = (width - across * scale) / 2
    top = (height - down * scale) / 2
    numbers = {drawing: number for number, drawing in enumerate(scene.drawings)}
    definitions = "".join(f'<g id="d{number}">{drawing.content}</g>' for drawing, number in numbers.items())
    copies = "".join(
        f'<use xlink:href="#d{numbers[item.drawing]}" transform="{_transform(item, scale, left, top)}"/>'
        for item in scene.placements
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"><defs>{definitions}</defs>'
        f'<rect width="{width}" height="{height}" fill="{scene.background}"/>{copies}</svg>'
    )


def render_scene(scene: Scene, size: Size) -> np.ndarray:
    """Draw a scene as uint8 pixels (h, w, 3)."""
    import resvg

    tree = resvg.usvg.Tree.from_str(compose_svg(scene, size), resvg.usvg.Options.default())
    png = resvg.render(tree, (1, 0, 0, 0, 1, 0))  # the identity, row by row
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def _transform(item: Placement, scale: float, left: float, top: float) -> str:
    """The matrix that maps the unit box of a drawing to its place in pixels."""
    side = item.side * scale
    x = left + item.x * scale
    y = top + item.y * scale
    a, e = (-side, x + side) if item.flip == "x" else (side, x)
    d, f = (-side, y + side) if item.flip == "y" else (side, y)
    return f"matrix({a:.4f} 0 0 {d:.4f} {e:.4f} {f:.4f})"
