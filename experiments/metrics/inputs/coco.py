"""COCO's captioned images from a local folder, in the layout in which they are published."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from experiments.data import DataError, Example, Size
from experiments.data.example import BadRecord, RandomAccess, content_digest
from experiments.data.image import crop_and_resize, read_image

PREFERRED = "captions_val2014.json"


class CocoCaptions(RandomAccess):
    """One caption per image of `annotations/captions_<set>.json`; the images are in `<set>/` or `images/<set>/`.

    A hash of the image's id selects one of its captions. Images are cropped to their center and resized (Lanczos) to
    the size that is requested. Opening reads the captions alone.

    Args:
        path: the folder that has `annotations/`, or a caption file in it.

    Raises:
        DataError: there is no such caption file, it is malformed, or an image is missing or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        captions = _caption_file(Path(path))
        self.name = f"coco, {captions.stem.removeprefix('captions_')}"
        self._folder = _image_folder(captions)
        try:
            content = json.loads(captions.read_text(encoding="utf-8-sig"))
            texts: dict[int, list[tuple[int, str]]] = {}
            for note in content["annotations"]:
                texts.setdefault(note["image_id"], []).append((note["id"], " ".join(note["caption"].split())))
            images = sorted((image["id"], image["file_name"]) for image in content["images"] if image["id"] in texts)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(
                f"Cannot read {captions} as COCO's captions ({type(error).__name__}: {error}): expected "
                '{"images": [{"id", "file_name"}, …], "annotations": [{"id", "image_id", "caption"}, …]}.'
            ) from error
        self.items = [(file, *_select(sorted(texts[number]), number)) for number, file in images]
        if not self.items:
            raise DataError(f"{captions} has no image with a caption.")

    def __len__(self) -> int:
        return len(self.items)

    def key(self, index: int) -> str:
        """Return the file's name and the caption's id."""
        file, number, _ = self.items[index]
        return f"{file}#{number}"

    def digest(self, index: int) -> str:
        """Return a hash of the file and its caption."""
        file, _, caption = self.items[index]
        path = self._folder / file
        try:
            return content_digest(self.key(index), caption, path.read_bytes())
        except OSError as error:
            raise DataError(f"Cannot read {path}, which the captions name: {error}.") from error

    def example(self, index: int, size: Size, variation: int = 0) -> Example:
        """Return image `index` at a size; odd variations are mirrored."""
        file, _, caption = self.items[index]
        path = self._folder / file
        try:
            return Example(crop_and_resize(read_image(path), size, variation), caption, self.key(index))
        except BadRecord as error:
            raise DataError(f"Cannot read {path}, which the captions name: {error}.") from error


def _caption_file(path: Path) -> Path:
    if path.suffix == ".json" and path.is_file():
        return path
    files = sorted(path.glob("annotations/captions_*.json"))
    preferred = next((p for p in files if p.name == PREFERRED), files[0] if len(files) == 1 else None)
    if preferred is None:
        present = ", ".join(p.name for p in files) or "no annotations/captions_*.json"
        raise DataError(
            f"Cannot open {path} as COCO: it has {present}. Expected annotations/{PREFERRED} beside the folder of "
            "images, or name one caption file: coco:FOLDER/annotations/captions_….json."
        )
    return preferred


def _image_folder(captions: Path) -> Path:
    root = captions.parent.parent
    name = captions.stem.removeprefix("captions_")
    folders = [root / name, root / "images" / name]
    folder = next((folder for folder in folders if folder.is_dir()), None)
    if folder is None:
        raise DataError(f"There are no images for {captions}: expected the folder {' or '.join(map(str, folders))}.")
    return folder


def _select(texts: list[Any], image_id: int) -> Any:
    """Select one of an image's captions by a hash of its id, so that the selection depends on nothing else."""
    return texts[int.from_bytes(hashlib.sha256(str(image_id).encode()).digest()[:4], "big") % len(texts)]
