"""Images in the folder layouts that external benchmarks of text-to-image models expect; they judge, this generates.

    geneval   <out>/00000/metadata.jsonl, <out>/00000/samples/0000.png …   (2310.11513; four samples for each prompt)
    dpg       <out>/<prompt id>.png, a 2 × 2 grid of four samples          (DPG-Bench, 2403.05135)

Prompts come from the benchmark's own files, which are not part of this project. `export.json` says what the images of a
folder were made from; images of another model or other settings are never mixed with them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn

from experiments.config import EvaluationConfig
from experiments.core.files import read_identity, write_json, write_text
from experiments.core.progress import ProgressCallback
from experiments.metrics.inputs.generated_images import generate_images
from mixers.files import atomic_path
from mixers.suggest import unknown_name
from unet_adapters.highres.fingerprint import config_values, fingerprint

FILE = "export.json"
SAMPLES = 4
"""Images of each prompt, as both benchmarks define it."""


@dataclass(frozen=True)
class BenchmarkPrompt:
    """A prompt of a benchmark.

    Attributes:
        id: names its files.
        text: the prompt.
        metadata: the benchmark's own record of it, written back unchanged.
    """

    id: str
    text: str
    metadata: dict[str, Any]


def export_images(
    pipe: Any,
    layout: str,
    prompts: Path,
    size: int,
    plan: EvaluationConfig,
    directory: Path,
    progress: ProgressCallback,
) -> int:
    """Generate four images for every prompt with the UNet as it is mounted now, and write them in a layout.

    An interrupted export continues after the last complete prompt.

    Args:
        pipe: the teacher's pipeline.
        layout: "geneval" or "dpg".
        prompts: geneval's `evaluation_metadata.jsonl`, or DPG's folder of .txt files.
        size: side of the images in pixels.
        plan: sampling steps, guidance and seed; image k of a prompt starts from noise of seed + k.
        directory: receives the images.
        progress: called as (phase, done, total).

    Returns:
        The number of prompts.

    Raises:
        ValueError: there is no such layout, the prompts are not what it expects, or the directory holds images of
            another export.
        OSError: the disk is full.
    """
    if layout not in _LAYOUTS:
        raise ValueError(unknown_name("layout", layout, _LAYOUTS))
    read, write, name_last_file = _LAYOUTS[layout]
    items = read(prompts)
    complete = (directory / name_last_file(prompt) for prompt in items)
    _require_same_export(directory, _describe_export(pipe, layout, items, size, plan), complete)
    for number, prompt in enumerate(items):
        progress("export", number, len(items))
        if (directory / name_last_file(prompt)).is_file():
            continue
        images = generate_images(pipe, [prompt.text] * SAMPLES, (size, size), plan, plan.guidance, plan.seed)
        write(directory, prompt, images)
    progress("export", len(items), len(items))
    return len(items)


def _describe_export(
    pipe: Any, layout: str, prompts: list[BenchmarkPrompt], size: int, plan: EvaluationConfig
) -> dict[str, Any]:
    """Return everything that the images depend on; networks and prompts as hashes."""
    networks = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    scheduler = (type(pipe.scheduler).__qualname__, config_values(pipe.scheduler.config))
    return {
        "layout": layout,
        "size": size,
        "steps": plan.sample_steps,
        "guidance": plan.guidance,
        "seed": plan.seed,
        "model": fingerprint(networks, scheduler),
        "prompts": fingerprint([(prompt.id, prompt.text) for prompt in prompts]),
    }


def _require_same_export(directory: Path, description: dict[str, Any], complete: Iterable[Path]) -> None:
    """Record what the images of a folder are made from, or check that it is the same as before."""
    existing = read_identity(directory / FILE, complete)
    changed = [name for name, value in description.items() if existing and existing.get(name) != value]
    if changed:
        raise ValueError(
            f"{directory} holds images of another export: {', '.join(changed)} differ, see {FILE} there. Give another "
            "folder with --out."
        )
    write_json(directory / FILE, description)


def _save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG atomically: a file that is there is complete."""
    with atomic_path(path) as partial:
        image.save(partial, format="PNG")


def _read_geneval(path: Path) -> list[BenchmarkPrompt]:
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        return [BenchmarkPrompt(f"{k:05d}", str(record["prompt"]), record) for k, record in enumerate(records)]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"Cannot read {path} as geneval's prompts ({type(error).__name__}: {error}): expected a file with one JSON "
            'object per line, {"prompt": …}, as evaluation_metadata.jsonl.'
        ) from error


def _read_dpg(path: Path) -> list[BenchmarkPrompt]:
    files = sorted(path.glob("*.txt"))
    if not files:
        raise ValueError(f"Cannot read {path} as DPG's prompts: expected a folder of .txt files, one for each prompt.")
    return [BenchmarkPrompt(file.stem, file.read_text(encoding="utf-8-sig").strip(), {}) for file in files]


def _write_geneval(directory: Path, prompt: BenchmarkPrompt, images: list[Image.Image]) -> None:
    folder = directory / prompt.id
    write_text(folder / "metadata.jsonl", json.dumps(prompt.metadata, ensure_ascii=False) + "\n")
    for number, image in enumerate(images):
        _save_image(image, folder / "samples" / f"{number:04d}.png")


def _write_dpg(directory: Path, prompt: BenchmarkPrompt, images: list[Image.Image]) -> None:
    width, height = images[0].size
    grid = Image.new("RGB", (2 * width, 2 * height))
    for number, image in enumerate(images):
        grid.paste(image, (number % 2 * width, number // 2 * height))
    _save_image(grid, directory / f"{prompt.id}.png")


_Reader = Callable[[Path], list[BenchmarkPrompt]]
_Writer = Callable[[Path, BenchmarkPrompt, list[Image.Image]], None]
_LAYOUTS: dict[str, tuple[_Reader, _Writer, Callable[[BenchmarkPrompt], str]]] = {
    "geneval": (_read_geneval, _write_geneval, lambda prompt: f"{prompt.id}/samples/{SAMPLES - 1:04d}.png"),
    "dpg": (_read_dpg, _write_dpg, lambda prompt: f"{prompt.id}.png"),
}
"""Layout -> how prompts are read, how images are written, and the file that is written last."""
