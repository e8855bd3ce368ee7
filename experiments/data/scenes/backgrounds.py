"""Which backgrounds a drawing stands out from, and which one of them is held out."""

from __future__ import annotations

import zlib
from functools import cache

import numpy as np

from experiments.data.emoji import BACKGROUNDS
from experiments.data.scenes.catalogue import Drawing, rgb
from experiments.data.scenes.scene import Placement, Scene, render_scene


def contrasts(color: str, background: str) -> bool:
    """Whether a color stands out from a background, both as "#rrggbb" (distance of at least 110 in RGB)."""
    return bool(np.linalg.norm(rgb(color) - rgb(background)) >= 110)


@cache
def contrasting_backgrounds(drawing: Drawing) -> tuple[str, ...]:
    """Return the names of the backgrounds that a drawing stands out from: most of its pixels differ by 90 in RGB."""
    on = [
        render_scene(Scene("", color, (Placement(drawing, 0.0, 0.0, 1.0),)), 32).astype(float).reshape(-1, 3)
        for color in ("#000000", "#ffffff")
    ]
    opaque = np.abs(on[1] - on[0]).max(axis=1) < 40
    pixels = on[0][opaque]
    visible = {name: (np.linalg.norm(pixels - rgb(color), axis=1) >= 90).mean() for name, color in BACKGROUNDS.items()}
    return tuple(name for name, share in visible.items() if share >= 0.7) or (max(visible, key=lambda n: visible[n]),)


def held_out_background(drawing: Drawing) -> str:
    """Return the one background that a training drawing has in the held-out split only."""
    choices = contrasting_backgrounds(drawing)
    return choices[zlib.crc32(drawing.key.encode()) % len(choices)]
