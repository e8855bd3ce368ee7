"""From 64 to 2048 pixels with the embedded model: does the picture stay one object, what does it take?

    python -m experiments.studies.large_images RUNS PAGE --normalized ADAPTER --raw ADAPTER [--size 2048]

Every picture is made in a process of its own and kept in RUNS; what is there already is not made again. PAGE gets the
tables and the pictures.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.progress import track
from safetensors import safe_open

from experiments.core.files import write_json
from experiments.core.memory import keep_freed_memory
from experiments.highres.models import mount, open_model
from experiments.highres.rate import measure_rate
from experiments.highres.watch import Watch
from experiments.studies.large_images.page import write_page
from unet_adapters.highres import decode, generate, make_plan
from unet_adapters.highres.ladder import shown

PICTURES = (("red apple, teal background", 0), ("blue heart, yellow background", 1), ("cat face, purple background", 2))
"""Prompts and their seeds: the first is made as large as asked for, all of them up to COMPARED."""

COMPARED = 512  # pixels: up to where softmax attention and direct generation are looked at
STEPS, GUIDANCE = 20, 3.0


@dataclass(frozen=True)
class Case:
    """One picture to make.

    Attributes:
        name: of the attention: normalized, unnormalized or teacher.
        adapter: folder of the student; None is the teacher's softmax attention.
        mode: progressive or direct.
        size: side in pixels.
        prompt, seed: of the picture.
    """

    name: str
    adapter: str | None
    mode: str
    size: int
    prompt: str
    seed: int

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return f"{self.name}-{self.mode}-{self.size}-s{self.seed}"


def cases(normalized: str, raw: str, size: int) -> list[Case]:
    """The pictures, the quick ones first."""
    students: dict[str, str | None] = {"normalized": normalized, "unnormalized": raw, "teacher": None}
    direct = [(name, "direct", side, p) for side in (256, COMPARED) for p in PICTURES for name in students]
    direct = [
        row for row in direct if row[0] != "teacher" or row[2] < COMPARED or row[3] is PICTURES[0]
    ]  # minutes each
    compared = [("teacher", "progressive", COMPARED, p) for p in PICTURES]
    compared += [(name, "progressive", COMPARED, p) for p in PICTURES[1:] for name in ("normalized", "unnormalized")]
    large = [(name, "progressive", size, PICTURES[0]) for name in ("normalized", "unnormalized")]
    wanted = [*compared, *direct, *large]
    return [Case(name, students[name], mode, side, *picture) for name, mode, side, picture in wanted]


def make(case: Case, folder: Path) -> None:
    """Make one picture, keep its stages as pictures, and write what they took."""
    torch.set_num_threads(1)
    pipe = open_model("embedded", torch.float32, "cpu")
    mount(pipe, case.adapter, None)
    settings: dict[str, Any] = {"steps": STEPS, "guidance": GUIDANCE}
    size, rate = (case.size, case.size), measure_rate(pipe)
    plan = make_plan(pipe, size, **settings, rate=rate, direct=case.mode == "direct")
    watch, latents = Watch(), folder / "latents"
    settings |= {"mode": case.mode, "seed": case.seed, "plan": plan, "keep": latents, "report": watch}
    generate(pipe, case.prompt, size, **settings).save(folder / f"{case.size}.png", adapter=case.adapter)
    for path in latents.iterdir():
        side = int(path.stem.split("x")[-1])
        with safe_open(path, framework="pt") as file:
            Image.fromarray(decode(pipe.vae, file.get_tensor("latents")).numpy()).save(folder / f"{side}.png")
    foreseen = {shown(s.stage.size): {"side": s.stage.size[0], "foreseen": s.seconds} for s in plan.stages}
    rows = [{**foreseen[what], **row} for what, row in watch.parts.items() if what in foreseen]
    write_json(folder / "record.json", {**asdict(case), "adapter": bool(case.adapter), "stages": rows})


def main() -> None:
    """Make every picture that is not there, then the page; `--one N` is one of the processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("page", type=Path)
    parser.add_argument("--normalized", required=True, help="adapter")
    parser.add_argument("--raw", required=True, help="adapter of the same mixer, not normalized")
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--one", type=int)
    given = parser.parse_args()
    chosen = cases(given.normalized, given.raw, given.size)
    folders = [given.runs / case.folder for case in chosen]
    if given.one is not None:
        with keep_freed_memory():
            make(chosen[given.one], folders[given.one])
        return
    for number, folder in enumerate(track(folders, "pictures")):
        if not (folder / "record.json").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, "-m", "experiments.studies.large_images", *sys.argv[1:], "--one", str(number)]
            subprocess.run(command, check=True)
    write_page(given.runs, given.page)
    print(f"Page: {given.page.resolve()}")


if __name__ == "__main__":
    main()
