"""COCO's captioned pictures from a local folder, in the layout they are published in."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from experiments.data import DataError, Example, Size
from experiments.data.example import BadRecord, RandomAccess
from experiments.data.image import crop_and_resize, read_image

PREFERRED = "captions_val2014.json"


class CocoCaptions(RandomAccess):
    """One caption a picture of `annotations/captions_<set>.json`; the pictures are in `<set>/` or `images/<set>/`.

    Which of a picture's captions it is, is drawn once by its id. A picture is cropped to its center and resized
    (Lanczos) to the size that is asked for. Opening reads the captions alone.

    Args:
        path: the folder that has `annotations/`, or a file of captions in it.

    Raises:
        DataError: no such file of captions, a malformed one, or a picture that is missing or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        captions = _captions(Path(path))
        self.name = f"coco, {captions.stem.removeprefix('captions_')}"
        self._folder = _pictures(captions)
        try:
            content = json.loads(captions.read_text(encoding="utf-8-sig"))
            texts: dict[int, list[tuple[int, str]]] = {}
            for note in content["annotations"]:
                texts.setdefault(note["image_id"], []).append((note["id"], " ".join(note["caption"].split())))
            pictures = sorted((p["id"], p["file_name"]) for p in content["images"] if p["id"] in texts)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"Cannot read {captions} as COCO's captions ({type(error).__name__}: {error}): expected "
                '{"images": [{"id", "file_name"}, …], "annotations": [{"id", "image_id", "caption"}, …]}.'
            ) from error
        self.items = [(file, *_one_of(sorted(texts[number]), number)) for number, file in pictures]
        if not self.items:
            raise DataError(f"{captions} has no picture with a caption.")

    def __len__(self) -> int:
        return len(self.items)

    def key(self, index: int) -> str:
        """The file's name and the caption's id."""
        file, number, _ = self.items[index]
        return f"{file}#{number}"

    def example(self, index: int, size: Size, variation: int = 0) -> Example:
        """Picture `index` at a size; odd variations are mirrored."""
        file, _, caption = self.items[index]
        path = self._folder / file
        try:
            return Example(crop_and_resize(read_image(path), size, variation), caption, self.key(index))
        except BadRecord as error:
            raise DataError(f"Cannot read {path}, which the captions name: {error}.") from error


def _captions(path: Path) -> Path:
    if path.suffix == ".json" and path.is_file():
        return path
    found = sorted(path.glob("annotations/captions_*.json"))
    chosen = next((p for p in found if p.name == PREFERRED), found[0] if len(found) == 1 else None)
    if chosen is None:
        there = ", ".join(p.name for p in found) or "no annotations/captions_*.json"
        raise DataError(
            f"Cannot open {path} as COCO: it has {there}. Expected annotations/{PREFERRED} beside the pictures' "
            "folder, or name one file of captions: coco:FOLDER/annotations/captions_….json."
        )
    return chosen


def _pictures(captions: Path) -> Path:
    root, part = captions.parent.parent, captions.stem.removeprefix("captions_")
    places = [root / part, root / "images" / part]
    found = next((place for place in places if place.is_dir()), None)
    if found is None:
        raise DataError(f"There are no pictures for {captions}: expected the folder {' or '.join(map(str, places))}.")
    return found


def _one_of(texts: list[Any], picture: int) -> Any:
    """One of a picture's captions, by a hash of its id, so that no list's length or order decides for others."""
    return texts[int.from_bytes(hashlib.sha256(str(picture).encode()).digest()[:4], "big") % len(texts)]
