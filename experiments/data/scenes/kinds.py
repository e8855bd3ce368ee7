"""The kinds of scenes, one function each, in a registry.

A *hidden* kind has a variable that its caption does not name but several distant objects share (which drawing is
repeated, which color, which axis of symmetry), so a denoiser must compare tokens across the image to infer it. A
*named* kind says everything, so captions matter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

from numpy.random import Generator

from experiments.data.emoji import BACKGROUNDS
from experiments.data.scenes import layout
from experiments.data.scenes.backgrounds import contrasting_backgrounds, contrasts, held_out_background
from experiments.data.scenes.catalogue import (
    SHAPE_COLORS,
    SHAPES,
    Drawing,
    drawings_of_split,
    held_out_color,
    pair_in_split,
    shape_drawing,
)
from experiments.data.scenes.scene import Placement, Scene
from experiments.data.scenes.words import count_phrase, count_word

T = TypeVar("T")


@dataclass(frozen=True)
class SceneContext:
    """What a kind draws a scene from.

    Attributes:
        rng: decides everything that is random.
        drawing: the leading drawing.
        split: of the combinations to use.
        canvas: (width, height) in units; counts grow with its area.
        fixed_count: the number of objects on one unit, or None for a random one.
    """

    rng: Generator
    drawing: Drawing
    split: str
    canvas: layout.Canvas
    fixed_count: int | None = None

    def count(self, low: int, high: int) -> int:
        """A random count from `low` to `high` per unit of area, for the whole canvas."""
        random_count = int(self.rng.integers(low, high + 1))
        return max(1, round((self.fixed_count or random_count) * self.canvas[0] * self.canvas[1]))

    def background(self, second: Drawing | None = None) -> str:
        """The name of a background that the drawings stand out from, in combinations of this split."""
        if self.split == "held_out":
            return held_out_background(self.drawing)
        drawings = [self.drawing, *([second] if second else [])]
        common = [
            name
            for name in contrasting_backgrounds(self.drawing)
            if all(name in contrasting_backgrounds(item) and name != held_out_background(item) for item in drawings)
        ]
        others = [name for name in BACKGROUNDS if all(name != held_out_background(item) for item in drawings)]
        return self._choose(common or others)

    def second_drawing(self) -> Drawing:
        """Another drawing: of the training drawings, in a pair of this split with the leading one."""
        others = [other for other in drawings_of_split("train") if other.key != self.drawing.key]
        return self._choose([other for other in others if pair_in_split(self.drawing, other, self.split)])

    def _choose(self, choices: list[T]) -> T:
        return choices[int(self.rng.integers(len(choices)))]

    def choose(self, *choices: T) -> T:
        """One of the choices."""
        return self._choose(list(choices))

    def scene(self, what: str, background: str, placements: list[Placement]) -> Scene:
        """The finished scene, captioned "<what>, <background> background"."""
        caption = f"{what}, {background} background"
        return Scene(caption, BACKGROUNDS[background], tuple(placements), self.canvas)


SceneFunction = Callable[[SceneContext], Scene]
Novelty = Literal["drawing", "combination"]
"""A leading drawing that training never shows, or a combination of what training shows."""


@dataclass(frozen=True)
class SceneKind:
    """A kind of scene.

    Attributes:
        name: of the function that draws it.
        draw: makes a scene from a context.
        hidden: whether objects share a variable that the caption does not name.
        share: of the data set, relative to the other kinds.
        held_out: what its scenes can show that training never does; it is left out of a held-out set otherwise.
    """

    name: str
    draw: SceneFunction
    hidden: bool
    share: int
    held_out: frozenset[Novelty]


KINDS: dict[str, SceneKind] = {}


def register_kind(
    *, hidden: bool, share: int, held_out: tuple[Novelty, ...] = ("drawing", "combination")
) -> Callable[[SceneFunction], SceneFunction]:
    """Add a function to the registry of scene kinds, under its own name, with the attributes of `SceneKind`."""

    def register(function: SceneFunction) -> SceneFunction:
        KINDS[function.__name__] = SceneKind(function.__name__, function, hidden, share, frozenset(held_out))
        return function

    return register


@register_kind(hidden=False, share=3)
def single(context: SceneContext) -> Scene:
    """One named drawing: "a red apple, teal background"."""
    count = context.count(1, 1)
    placements = _copies(context.drawing, layout.scatter(context.rng, count, context.canvas))
    return context.scene(count_phrase(count, context.drawing.name), context.background(), placements)


@register_kind(hidden=False, share=2)
def counted(context: SceneContext) -> Scene:
    """Copies of one named drawing: "three red apples, teal background"."""
    count = context.count(2, 4)
    placements = _copies(context.drawing, layout.scatter(context.rng, count, context.canvas))
    return context.scene(count_phrase(count, context.drawing.name), context.background(), placements)


@register_kind(hidden=False, share=2)
def relation(context: SceneContext) -> Scene:
    """Two named drawings and how they stand: "a key to the left of a red apple, white background"."""
    first = context.drawing
    second = context.second_drawing()
    side, words = context.choose(("left", "to the left of"), ("above", "above"))
    count = context.count(2, 2)
    here, there = layout.split_sides(context.rng, count, context.canvas, side)
    what = f"{count_phrase(len(here), first.name)} {words} {count_phrase(len(there), second.name)}"
    return context.scene(what, context.background(second), [*_copies(first, here), *_copies(second, there)])


@register_kind(hidden=False, share=1)
def mixed(context: SceneContext) -> Scene:
    """Several of one named drawing and one of another: "two red apples and a key, teal background"."""
    first = context.drawing
    second = context.second_drawing()
    count = context.count(3, 4)
    few = max(1, count // 4)
    boxes = layout.scatter(context.rng, count, context.canvas)
    what = f"{count_phrase(count - few, first.name)} and {count_phrase(few, second.name)}"
    placements = [*_copies(first, boxes[few:]), *_copies(second, boxes[:few])]
    return context.scene(what, context.background(second), placements)


@register_kind(hidden=False, share=1, held_out=("combination",))
def shapes(context: SceneContext) -> Scene:
    """Plain shapes with named colors: "two red circles and a blue star, white background"."""
    background = context.choose(*BACKGROUNDS)
    count = context.count(1, 4)
    first = _named_shape(context, background)
    second = _named_shape(context, background)
    few = 0 if count == 1 or first == second else max(1, count // 3)
    boxes = layout.scatter(context.rng, count, context.canvas)
    phrases = [
        count_phrase(number, f"{color} {shape}")
        for number, (shape, color) in ((count - few, first), (few, second))
        if number
    ]
    kinds = [first] * (count - few) + [second] * few
    placements = [
        Placement(shape_drawing(shape, SHAPE_COLORS[color]), *box)
        for (shape, color), box in zip(kinds, boxes, strict=True)
    ]
    return context.scene(" and ".join(phrases), background, placements)


@register_kind(hidden=True, share=4)
def copies(context: SceneContext) -> Scene:
    """Copies of one unnamed drawing at random places: "three of the same, teal background"."""
    count = context.count(2, 4)
    placements = _copies(context.drawing, layout.scatter(context.rng, count, context.canvas))
    return context.scene(f"{count_word(count)} of the same", context.background(), placements)


@register_kind(hidden=True, share=2)
def mirrored(context: SceneContext) -> Scene:
    """An unnamed drawing and its mirror image across an axis: "mirrored left and right, teal background"."""
    axis, words = context.choose(("x", "left and right"), ("y", "top and bottom"))
    flipped = bool(context.rng.integers(2))
    pairs = layout.mirror_pairs(context.rng, context.count(1, 1), context.canvas, axis)
    originals = _copies(context.drawing, [pair[flipped] for pair in pairs])
    images = _copies(context.drawing, [pair[not flipped] for pair in pairs], flip=axis)
    return context.scene(f"mirrored {words}", context.background(), [*originals, *images])


@register_kind(hidden=True, share=2)
def pattern(context: SceneContext) -> Scene:
    """One unnamed drawing on a lattice: "a repeated pattern, teal background"."""
    boxes = [box for _, _, box in layout.lattice(context.rng, context.canvas)]
    return context.scene("a repeated pattern", context.background(), _copies(context.drawing, boxes))


@register_kind(hidden=True, share=2)
def alternating(context: SceneContext) -> Scene:
    """Two unnamed drawings that alternate on a lattice by rows, by columns or as on a checkerboard."""
    pair = (context.drawing, context.second_drawing())
    by_row, by_column, words = context.choose((1, 0, "rows"), (0, 1, "columns"), (1, 1, "checkerboard"))
    placements = [
        Placement(pair[(by_row * row + by_column * column) % 2], *box)
        for row, column, box in layout.lattice(context.rng, context.canvas)
    ]
    what = "a checkerboard of two" if words == "checkerboard" else f"alternating {words}"
    return context.scene(what, context.background(pair[1]), placements)


@register_kind(hidden=True, share=2, held_out=())  # training has every color and every set of shapes
def one_color(context: SceneContext) -> Scene:
    """Different plain shapes of one unnamed color of any hue: "four shapes of one color, white background"."""
    background = context.choose(*BACKGROUNDS)
    color = ""
    while not color or not contrasts(color, BACKGROUNDS[background]):
        color = "#" + "".join(f"{int(value):02x}" for value in context.rng.integers(0, 256, size=3))
    count = context.count(3, 4)
    names = context.rng.permutation(list(SHAPES)).tolist() * (1 + count // len(SHAPES))
    boxes = layout.scatter(context.rng, count, context.canvas)
    placements = [Placement(shape_drawing(name, color), *box) for name, box in zip(names, boxes, strict=False)]
    return context.scene(f"{count_word(count)} shapes of one color", background, placements)


def _copies(drawing: Drawing, boxes: list[layout.Box], flip: str = "") -> list[Placement]:
    return [Placement(drawing, *box, flip) for box in boxes]


def _named_shape(context: SceneContext, background: str) -> tuple[str, str]:
    """A shape and a color that may be combined in the context's split and stand out from the background."""
    choices = [
        (shape, color)
        for shape in SHAPES
        for color, value in SHAPE_COLORS.items()
        if (color == held_out_color(shape)) == (context.split == "held_out")
        and contrasts(value, BACKGROUNDS[background])
    ]
    return context.choose(*choices)
