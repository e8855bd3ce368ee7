"""The data set of scenes: a pure function of (index, size, variation)."""

from __future__ import annotations

from functools import cache
from typing import Literal

import numpy as np

from experiments.data.example import DataError, Example, RandomAccess, Size, extent, in_split, to_tensor
from experiments.data.scenes.catalogue import Drawing, drawings_of_split
from experiments.data.scenes.kinds import KINDS, Novelty, SceneContext, SceneKind
from experiments.data.scenes.scene import Scene, render_scene

TRAINING_SIZE = 64
"""Pixels per unit of a canvas at the training scale."""

Growth = Literal["larger", "more"]


class SceneSet(RandomAccess):
    """Captioned scenes of curated Twemoji drawings and plain shapes, at any size.

    Items are all pairs of a kind and a leading drawing, each kind as often as its share says. In more than half of
    them, objects share a variable that the caption does not name; see `experiments.data.scenes.kinds`.

    `variation` decides everything else: background, counts, positions, sizes, the second drawing. One
    (index, variation) with `growth="larger"` is the same scene at every size; with `growth="more"`, a larger image has
    more objects at the training scale of 64 px per unit; one below 32 px shows half a unit, scaled down.

    Rendering takes about 2 ms at 64 px on one core.

    Args:
        split: `"train"`; or `"held_out"`: drawings that training never shows, and combinations of training drawings
            (with a background, with each other; shapes with colors) that training never shows. Scenes that show
            neither, such as shapes of one color of any hue, are left out.
        growth: what a larger image has more of, pixels or objects.
        kinds: names of scene kinds to restrict the set to; None for all.
        others: whether other drawings, which the teacher never sees, lead scenes as well; for its judge.

    Raises:
        DataError: the split or a kind is unknown, or the split has no scenes of the kinds.
    """

    def __init__(
        self,
        split: str = "train",
        growth: Growth = "larger",
        kinds: tuple[str, ...] | None = None,
        *,
        others: bool = False,
    ) -> None:
        unknown = sorted(set(kinds or ()) - set(KINDS))
        if unknown or growth not in ("larger", "more"):
            raise DataError(
                f"SceneSet: expected kinds from {', '.join(KINDS)} and growth 'larger' or 'more', "
                f"got kinds={kinds!r}, growth={growth!r}."
            )
        details = [split, *([growth] if growth != "larger" else []), *(kinds or ()), *(["others"] if others else [])]
        self.name = ", ".join(["scenes", *details])
        self.split = split
        self.growth = growth
        self._items = [
            (kind, copy, drawing)
            for drawing in _leading_drawings(split, others)
            for kind in KINDS.values()
            for copy in range(kind.share)
            if (kinds is None or kind.name in kinds) and (split == "train" or _novelty(drawing) in kind.held_out)
        ]
        if not self._items:
            raise DataError(f"SceneSet: the split {split!r} has no scenes of the kinds {', '.join(kinds or ())}.")

    def __len__(self) -> int:
        return len(self._items)

    def key(self, index: int) -> str:
        """The kind, its copy, and the leading drawing's code points."""
        kind, copy, drawing = self._item(index)
        return f"{kind.name}-{copy}-{drawing.key}"

    def kind(self, index: int) -> SceneKind:
        """The kind of an item."""
        return self._item(index)[0]

    def scene(self, index: int, variation: int = 0, size: Size = TRAINING_SIZE) -> Scene:
        """The scene of an item as data; its canvas depends on `size` only if `growth` is "more"."""
        kind, copy, drawing = self._item(index)
        name = f"{kind.name}-{copy}-{drawing.key}".encode()
        context = SceneContext(
            rng=np.random.default_rng([int.from_bytes(name, "big"), variation]),
            drawing=drawing,
            split="train" if _novelty(drawing) == "drawing" else self.split,
            canvas=self._canvas(size),
        )
        return kind.draw(context)

    def example(self, index: int, size: Size, variation: int = 0) -> Example:
        """Render item `index` at `size` px; see the class for what `variation` decides."""
        scene = self.scene(index, variation, size)
        return Example(to_tensor(render_scene(scene, size)), scene.caption, self.key(index))

    def _item(self, index: int) -> tuple[SceneKind, int, Drawing]:
        if not 0 <= index < len(self):
            raise IndexError(f"SceneSet: index {index} is not in 0 … {len(self) - 1}.")
        return self._items[index]

    def _canvas(self, size: Size) -> tuple[float, float]:
        if self.growth == "larger":
            return 1.0, 1.0
        height, width = extent(size)
        scale = min(TRAINING_SIZE, 2 * min(height, width))  # half a unit or more, also in a tiny image
        return width / scale, height / scale


@cache
def _novelty(drawing: Drawing) -> Novelty:
    """What a held-out scene that this drawing leads shows: the drawing itself, or a combination with it."""
    return "combination" if in_split(drawing.key, "train") else "drawing"


@cache
def _leading_drawings(split: str, others: bool) -> tuple[Drawing, ...]:
    """Of training, the training drawings; of the other split, held-out drawings and as many training drawings."""
    drawings = drawings_of_split(split, others)
    if split == "train":
        return drawings
    training = drawings_of_split("train")
    step = len(training) / len(drawings)
    return (*drawings, *(training[int(number * step)] for number in range(len(drawings))))
