"""Scenes: pure functions, the same at every size, with captions that say what they should and no more."""

import hashlib
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from experiments.data import DataError, SceneSet, open_dataset
from experiments.data.emoji import BACKGROUNDS
from experiments.data.example import Size
from experiments.data.scenes import KINDS, Scene, layout
from experiments.data.scenes.backgrounds import held_out_background
from experiments.data.scenes.catalogue import (
    SHAPE_COLORS,
    SHAPES,
    drawings_of_split,
    held_out_color,
    load_drawings,
    pair_in_split,
)
from experiments.data.scenes.words import count_phrase, pluralize

SOME = range(0, len(SceneSet()), 19)


def background_of(scene: Scene) -> str:
    return scene.caption.rsplit(", ", 1)[1].removesuffix(" background")


def test_an_item_is_a_pure_function_of_index_size_and_variation() -> None:
    first = SceneSet()
    second = open_dataset("scenes")
    for index in (0, 5, 700):
        a = first.example(index, 64, 3)
        b = second.example(index, 64, 3)
        assert torch.equal(a.image, b.image)
        assert (a.caption, a.key) == (b.caption, b.key)
        assert a.image.shape == (3, 64, 64)
        assert a.image.abs().max() <= 1
    assert any(not torch.equal(first.example(i, 64, 0).image, first.example(i, 64, 1).image) for i in range(3))


def test_keys_are_unique_and_indices_are_checked() -> None:
    data = SceneSet()
    assert len({data.key(index) for index in range(len(data))}) == len(data)
    with pytest.raises(IndexError, match=str(len(data) - 1)):
        data.example(len(data), 64)


@pytest.mark.parametrize("factor", [2, 4])
def test_a_larger_image_shows_the_same_scene(factor: int) -> None:
    data = SceneSet()
    for index in SOME:
        small, large = (data.example(index, 64 * n).image for n in (1, factor))
        reduced = F.interpolate(large[None], (64, 64), mode="area")[0]
        assert (reduced - small).abs().mean() < 0.03, data.key(index)
        assert data.scene(index) == data.scene(index, size=64 * factor)


@pytest.mark.parametrize("factor", [2, 4])
def test_more_has_more_objects_at_the_training_scale(factor: int) -> None:
    data = SceneSet(growth="more")
    small = SceneSet()
    for index in range(len(KINDS) * 2):
        large = data.scene(index, 1, 64 * factor)
        base = small.scene(index, 1)
        assert len(large.placements) > len(base.placements) * factor
        sides = [p.side for p in large.placements]
        assert max(sides) < 1 and min(sides) > 0.15
        assert large.canvas == (factor, factor)


@pytest.mark.parametrize("size", [8, 24, 40, (64, 80), (40, 200), (16, 64)])
def test_objects_have_a_size_and_stay_inside_at_any_size(size: Size) -> None:
    for data in (SceneSet(growth="more"), SceneSet("held_out", growth="more")):
        for index in range(0, len(data), 13):
            scene = data.scene(index, 1, size)
            width, height = scene.canvas
            for placement in scene.placements:
                assert placement.side > 0
                assert 0 <= placement.x <= placement.x + placement.side <= width
                assert 0 <= placement.y <= placement.y + placement.side <= height


def test_a_wide_image_has_the_scene_in_its_middle() -> None:
    data = SceneSet()
    for index in SOME:
        square = data.example(index, 64).image
        wide = data.example(index, (64, 96)).image
        assert wide.shape == (3, 64, 96)
        assert (square - wide[:, :, 16:80]).abs().mean() < 1e-3  # edges are rounded where they are


def test_copies_of_a_drawing_have_equal_pixels_on_one_grid() -> None:
    """Boxes lie on a grid of 8 px at the training scale, on lattices too, and have two sides."""
    sides: set[float] = set()
    for kind in ("single", "copies", "pattern", "alternating", "mirrored"):
        data = SceneSet(kinds=(kind,))
        for index in range(0, len(data), 5):
            placements = data.scene(index, 8).placements
            image = data.example(index, 64, 8).image
            corners = [(8 * p.x, 8 * p.y) for p in placements]
            assert all(x == int(x) and y == int(y) for x, y in corners), "on the grid"
            sides |= {p.side for p in placements}
            length = round(64 * placements[0].side)
            parts = {}
            for placement, (x, y) in zip(placements, corners, strict=True):
                part = image[:, 8 * int(y) :, 8 * int(x) :][:, :length, :length]
                first = parts.setdefault((placement.drawing.key, placement.flip), part)
                assert (first - part).abs().mean() < 2e-3
    assert sides == {3 / 8, 6 / 8}


def test_other_drawings_lead_scenes_for_the_judge_only() -> None:
    own = {drawing.key for drawing in load_drawings()}
    plain = SceneSet(kinds=("single",))
    others = SceneSet(kinds=("single",), others=True)
    assert {plain.scene(index).drawings[0].key for index in range(len(plain))} < own
    leading = {others.scene(index).drawings[0].key for index in range(len(others))}
    assert len(leading - own) > 60 and leading & own
    assert others.name != plain.name


def test_most_scenes_hide_a_variable_and_their_captions_do_not_name_it() -> None:
    data = SceneSet()
    hidden = [index for index in range(len(data)) if data.kind(index).hidden]
    assert len(hidden) >= len(data) / 2
    names = {drawing.name for drawing in load_drawings()}
    for index in hidden[::7]:
        scene = data.scene(index, 2)
        text = scene.caption.rsplit(", ", 1)[0]
        words = set(text.split())
        assert not any(name in text or pluralize(name) in text for name in names if name not in ("star", "ring")), text
        assert not words & (set(SHAPES) | set(SHAPE_COLORS)), text


def test_named_scenes_name_every_object() -> None:
    data = SceneSet()
    for index in range(0, len(data), 5):
        if data.kind(index).hidden or data.kind(index).name == "shapes":
            continue
        scene = data.scene(index, 4)
        for drawing in scene.drawings:
            assert drawing.name in scene.caption or pluralize(drawing.name) in scene.caption


def test_counts_in_captions_are_those_of_the_scene() -> None:
    numbers = {"two": 2, "three": 3, "four": 4}
    for kind in ("copies", "counted", "one_color"):
        data = SceneSet(kinds=(kind,))
        for index in range(0, len(data), 3):
            scene = data.scene(index, 6)
            assert len(scene.placements) == numbers[scene.caption.split()[0]]
    mixed = SceneSet(kinds=("mixed",)).scene(0, 1)
    assert len(mixed.placements) == sum(numbers.get(w, int(w in ("a", "an"))) for w in mixed.caption.split())


def test_objects_stay_inside_and_apart() -> None:
    for data, size in ((SceneSet(), 64), (SceneSet(growth="more"), 128)):
        for index in SOME:
            scene = data.scene(index, 8, size)
            boxes = [(p.x, p.y, p.side) for p in scene.placements]
            for number, (x, y, side) in enumerate(boxes):
                assert x >= 0 and y >= 0 and x + side <= scene.canvas[0] and y + side <= scene.canvas[1]
                for other_x, other_y, other_side in boxes[:number]:
                    assert max(abs(x - other_x), abs(y - other_y)) >= min(side, other_side) - 1e-9


def test_mirrored_scenes_are_symmetric() -> None:
    data = SceneSet(kinds=("mirrored",))
    for index in range(12):
        example = data.example(index, 128, 3)
        axis = 2 if "left" in example.caption else 1
        assert (example.image - example.image.flip(axis)).abs().mean() < 0.02, example.caption


def test_held_out_drawings_and_combinations_are_never_in_training() -> None:
    train = SceneSet("train")
    held_out = SceneSet("held_out")
    train_keys = {drawing.key for drawing in drawings_of_split("train")}
    unseen = {drawing.key for drawing in drawings_of_split("held_out")}
    assert not train_keys & unseen and len(unseen) >= 6
    for index in range(0, len(train), 3):
        scene = train.scene(index, 5)
        drawings = [drawing for drawing in scene.drawings if drawing.key in train_keys | unseen]
        assert not unseen & {drawing.key for drawing in drawings}
        for drawing in drawings:
            assert held_out_background(drawing) != background_of(scene)
        if len(drawings) == 2:
            assert pair_in_split(*drawings, "train")
    combinations = drawings_held = 0
    for index in range(len(held_out)):
        scene = held_out.scene(index, 5)
        leading = scene.drawings[0]
        if leading.key in unseen:
            drawings_held += 1
        elif leading.key in train_keys:
            combinations += 1
            assert held_out_background(leading) == background_of(scene)
    assert combinations > 100 and drawings_held > 100


def test_every_held_out_scene_shows_what_training_never_does() -> None:
    """A drawing, a drawing on a background, a pair of drawings, or a shape in a color; whatever the kind."""
    held_out = SceneSet("held_out")
    unseen = {drawing.key for drawing in drawings_of_split("held_out")}
    train_keys = {drawing.key for drawing in drawings_of_split("train")}
    for index in range(len(held_out)):
        scene = held_out.scene(index, 5)
        drawings = [drawing for drawing in scene.drawings if drawing.key in train_keys | unseen]
        named = re.findall(rf"({'|'.join(SHAPE_COLORS)}) ({'|'.join(SHAPES)})", scene.caption)
        assert (
            any(drawing.key in unseen or held_out_background(drawing) == background_of(scene) for drawing in drawings)
            or (len(drawings) == 2 and pair_in_split(*drawings, "held_out"))
            or (named and not drawings and all(held_out_color(shape) == color for color, shape in named))
        ), scene.caption
    with pytest.raises(DataError, match="'held_out' has no scenes of the kinds one_color"):
        SceneSet("held_out", kinds=("one_color",))


def test_training_scenes_are_those_that_the_teacher_was_trained_on() -> None:
    """All of them, in their order, by a digest of what they show; a change of it needs another teacher."""
    digest = hashlib.sha256()
    for data, size in ((SceneSet(), 64), (SceneSet(growth="more"), 128)):
        for index in range(len(data)):
            for variation in (0, 1_000_003):
                scene = data.scene(index, variation, size)
                boxes = [(p.drawing.key, p.x, p.y, p.side, p.flip) for p in scene.placements]
                digest.update(repr((data.key(index), scene.caption, scene.background, scene.canvas, boxes)).encode())
    assert digest.hexdigest() == "35ee0652ff34e83efbe62b9f02fad29c90a56abf7c657c965d37c97d31c8976a"


def test_shapes_with_held_out_colors_are_only_in_the_held_out_split() -> None:
    outcomes: set[bool] = set()
    for split in ("train", "held_out"):
        data = SceneSet(split, kinds=("shapes",))
        for index in range(0, len(data), 2):
            for color, shape in re.findall(
                rf"({'|'.join(SHAPE_COLORS)}) ({'|'.join(SHAPES)})", data.scene(index, 3).caption
            ):
                if split == "train":
                    assert held_out_color(shape) != color
                else:
                    outcomes.add(held_out_color(shape) == color)
    assert True in outcomes


def test_drawings_stand_out_from_their_backgrounds() -> None:
    data = SceneSet(kinds=("single",))
    for index in range(0, len(data), 9):
        example = data.example(index, 64, 11)
        color = BACKGROUNDS[example.caption.rsplit(", ", 1)[1].removesuffix(" background")]
        plain = torch.tensor([int(color[i : i + 2], 16) / 127.5 - 1 for i in (1, 3, 5)])
        differs = (example.image - plain[:, None, None]).norm(dim=0) > 0.4
        assert differs.float().mean() > 0.05, example.caption


def test_english() -> None:
    assert pluralize("red apple") == "red apples"
    assert [pluralize(n) for n in ("cherry", "fox", "wolf", "monkey face", "fish", "torch", "tomato")] == [
        "cherries", "foxes", "wolves", "monkey faces", "fish", "torches", "tomatoes",
    ]  # fmt: skip
    assert count_phrase(1, "owl") == "an owl"
    assert count_phrase(1, "unicorn") == "a unicorn"
    assert count_phrase(3, "key") == "three keys"
    assert count_phrase(12, "key") == "many keys"


def test_unknown_settings_are_named() -> None:
    with pytest.raises(DataError, match="copies"):
        SceneSet(kinds=("no_such_kind",))
    with pytest.raises(DataError, match="no_split"):
        SceneSet("no_split")


def test_rendering_is_antialiased() -> None:
    """An edge has pixels between the two colors."""
    scene = SceneSet(kinds=("one_color",)).example(3, 64, 1).image
    assert len(np.unique(scene.numpy().reshape(3, -1), axis=1).T) > 4


def test_too_many_objects_are_refused() -> None:
    with pytest.raises(ValueError, match="Cannot place 17 objects on 8 × 8 cells"):
        layout.scatter(np.random.default_rng(0), 17, (1.0, 1.0))
