"""From 64 to 2048 pixels with the embedded model: does the image keep showing one object, and what does it cost?

    python -m experiments.studies.large_images RUNS PAGE --normalized ADAPTER --unnormalized ADAPTER [--size 2048]

Every image is made in its own process and kept in RUNS; existing images are not made again. PAGE receives the tables
and the figures.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.progress import track
from safetensors import safe_open

from experiments.core.files import read_json, sha256_of_file, write_json
from experiments.core.memory import keep_freed_memory
from experiments.highres.memory_monitor import MemoryMonitor
from experiments.highres.pipelines import mount, open_pipeline
from experiments.highres.throughput import measure_throughput
from experiments.studies.large_images.page import write_page
from experiments.teacher.load import EMBEDDED
from unet_adapters.highres import GenerationRequest, decode_tiled, generate, plan_memory
from unet_adapters.highres.stages import format_size

PROMPTS = ("a red apple, teal background", "three of the same, yellow background", "a cat face, purple background")
"""The index of a prompt is its seed. The first is made at the full size, all of them up to COMPARED_SIZE."""

COMPARED_SIZE = 512  # pixels: the largest size at which softmax attention and direct generation are compared
RECORD = "record.json"
STEPS = 20
GUIDANCE = 3.0


@dataclass(frozen=True)
class ImageCase:
    """One image to make.

    Attributes:
        name: of the attention: normalized, unnormalized or teacher.
        adapter: folder of the student; None: the teacher's softmax attention.
        mode: progressive or direct.
        size: side in pixels.
        prompt, seed: of the image.
    """

    name: str
    adapter: str | None
    mode: str
    size: int
    prompt: str
    seed: int

    @property
    def folder(self) -> str:
        """Name of the image's folder."""
        return f"{self.name}-{self.mode}-{self.size}-s{self.seed}"

    def provenance(self) -> dict[str, Any]:
        """Return what else the image depends on: the weights of the adapter and of the model, and the settings."""
        files = sorted(Path(self.adapter).glob("*")) if self.adapter else []
        weights = [*files, *sorted(EMBEDDED.rglob("*.safetensors"))]
        return {"files": [sha256_of_file(path) for path in weights], "steps": STEPS, "guidance": GUIDANCE}

    def is_complete(self, folder: Path) -> bool:
        """Return whether `folder` contains this image, made with the same files and settings."""
        record = read_json(folder / RECORD)
        expected = json.loads(json.dumps({**asdict(self), **self.provenance()}))
        return {key: record.get(key) for key in expected} == expected


def list_cases(normalized: str, unnormalized: str, size: int) -> list[ImageCase]:
    """Return the images to make, the fastest first.

    Args:
        normalized, unnormalized: folders of the students.
        size: side of the largest image in pixels.
    """
    adapters: dict[str, str | None] = {"normalized": normalized, "unnormalized": unnormalized, "teacher": None}
    largest = [(name, "progressive", size, 0) for name in ("normalized", "unnormalized")]
    return [
        ImageCase(name, adapters[name], mode, side, PROMPTS[seed], seed)
        for name, mode, side, seed in [*_compared_cases(), *largest]
    ]


def _compared_cases() -> Iterator[tuple[str, str, int, int]]:
    """Yield (name, mode, side, seed) of the images up to COMPARED_SIZE."""
    seeds = range(len(PROMPTS))
    for seed in seeds:
        yield "teacher", "progressive", COMPARED_SIZE, seed
    for seed in seeds[1:]:  # the first prompt's large images include this size
        yield "normalized", "progressive", COMPARED_SIZE, seed
        yield "unnormalized", "progressive", COMPARED_SIZE, seed
    for side in (256, COMPARED_SIZE):
        for seed in seeds:
            yield "normalized", "direct", side, seed
            yield "unnormalized", "direct", side, seed
            if side < COMPARED_SIZE or seed == 0:  # softmax attention takes minutes at the larger size
                yield "teacher", "direct", side, seed


def make_image(case: ImageCase, folder: Path) -> None:
    """Make one image, write every stage as an image, and record time and memory in `record.json`."""
    torch.set_num_threads(1)
    pipe = open_pipeline("embedded", torch.float32, "cpu")
    mount(pipe, case.adapter, None)
    size = (case.size, case.size)
    request = GenerationRequest(
        case.prompt,
        size=size,
        mode="direct" if case.mode == "direct" else "progressive",
        steps=STEPS,
        guidance=GUIDANCE,
        seed=case.seed,
    )
    plan = plan_memory(
        pipe, size, steps=STEPS, guidance=GUIDANCE, throughput=measure_throughput(pipe), direct=case.mode == "direct"
    )
    monitor = MemoryMonitor()
    stage_dir = folder / "latents"
    result = generate(pipe, **vars(request), plan=plan, stage_dir=stage_dir, progress=monitor)
    result.save(folder / f"{case.size}.png", adapter=case.adapter)
    for path in stage_dir.iterdir():
        side = int(path.stem.split("x")[-1])
        with safe_open(path, framework="pt") as file:
            pixels = decode_tiled(pipe.vae, file.get_tensor("latents"))
        Image.fromarray(pixels.numpy()).save(folder / f"{side}.png")
    stages = [
        {"side": estimate.stage.size[0], "estimated_seconds": estimate.seconds, **monitor.parts[part]}
        for estimate in plan.stages
        if (part := format_size(estimate.stage.size)) in monitor.parts
    ]
    write_json(folder / RECORD, {**asdict(case), **case.provenance(), "stages": stages})


def make_missing_images(cases: list[ImageCase], runs: Path) -> None:
    """Make every image that has no record yet, each in its own process."""
    for number, case in enumerate(track(cases, "images")):
        folder = runs / case.folder
        if not case.is_complete(folder):
            folder.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, "-m", "experiments.studies.large_images", *sys.argv[1:], "--one", str(number)]
            subprocess.run(command, check=True)


def main() -> None:
    """Make every missing image, then write the page; `--one N` is one of the processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder of the images")
    parser.add_argument("page", type=Path, help="Markdown file to write")
    parser.add_argument("--normalized", required=True, help="folder of the student's adapter")
    parser.add_argument("--unnormalized", required=True, help="folder of the adapter of the same mixer, unnormalized")
    parser.add_argument("--size", type=int, default=2048, help="side of the largest image in pixels")
    parser.add_argument("--one", type=int, help="make the image of this number in this process")
    arguments = parser.parse_args()
    cases = list_cases(arguments.normalized, arguments.unnormalized, arguments.size)
    if arguments.one is not None:
        case = cases[arguments.one]
        with keep_freed_memory():
            make_image(case, arguments.runs / case.folder)
        return
    make_missing_images(cases, arguments.runs)
    write_page(arguments.runs, arguments.page)
    print(f"Page: {arguments.page.resolve()}")


if __name__ == "__main__":
    main()
