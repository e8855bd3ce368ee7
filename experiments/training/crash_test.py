"""Kill a training at random points, again and again, and compare its weights with those of one that was left alone.

    python -m experiments.training.crash_test [--kills 20] [--distil]

SIGKILL, in the middle of whatever the process does, writing a checkpoint included. With `--distil` it is a distillation
of the embedded teacher, else a small regression. Exits with 0 where the weights are the same to the last bit.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class Outcome:
    """How it went.

    Attributes:
        identical: whether the weights are the same, byte for byte.
        kills: how many processes were killed while they trained.
        steps: after which step each began, the first at 0.
    """

    identical: bool
    kills: int
    steps: tuple[int, ...]


def crash_test(folder: Path, kills: int = 20, steps: int = 60, pause: float = 0.05, distil: bool = False) -> Outcome:
    """Train undisturbed, then with `kills` SIGKILLs at random moments, and compare.

    Args:
        folder: scratch.
        steps: of the training; it starts anew from its last checkpoint after each kill.
        pause: seconds that each step is drawn out by, so that there is time to be killed in.
        distil: a real distillation.
    """
    whole, killed = folder / "whole", folder / "killed"
    _run(whole, steps, 0.0, distil).wait()
    draw, done, began = random.Random(0), 0, []
    while not (killed / WEIGHTS).is_file():
        began.append(_latest(killed))
        process = _run(killed, steps, pause, distil)
        if done < kills:
            _wait_for_training(process, killed, began[-1])
            time.sleep(draw.uniform(0.0, pause * steps / max(1, kills)))
            process.kill()
            done += process.wait() != 0
        elif process.wait() != 0:
            raise RuntimeError(f"The training itself failed; its folder is {killed}.")
    same = (whole / WEIGHTS).read_bytes() == (killed / WEIGHTS).read_bytes()
    return Outcome(same, done, tuple(began))


def train(folder: Path, steps: int, pause: float, distil: bool) -> None:
    """One process: train from the last checkpoint on, and write the weights at the end."""
    import torch
    from safetensors.torch import save_file

    from experiments.training import FitConfig, fit

    torch.set_num_threads(1)
    config = FitConfig(
        steps=steps, batch_size=4, learning_rate=1e-3, warmup=2, ema=0.9, checkpoint_every=3, log_every=1
    )
    model, batch = _distillation(config) if distil else _regression()
    fit(model, batch, config, folder, lambda step, losses: time.sleep(pause))
    partial = folder / "weights.partial"
    save_file({name: p.detach().contiguous() for name, p in model.named_parameters()}, partial)
    os.replace(partial, folder / WEIGHTS)


def _regression():  # type: ignore[no-untyped-def]
    import torch
    from torch import nn

    class Regression(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Linear(8, 64), nn.SiLU(), nn.Linear(64, 8))

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": (self.layers(x) + torch.randn_like(x)).square().mean()}

    return Regression(), lambda step: torch.full((4, 8), float(step % 7))


def _distillation(config):  # type: ignore[no-untyped-def]
    from experiments.config import Distillation, MixerChoice
    from experiments.distil import Distil, build_student, open_setting
    from experiments.grids.demo import GRID

    setting = open_setting("embedded", GRID.data, 64, 32)
    plan = Distillation(fit=config)
    choice = MixerChoice(select="mid_block")
    adapter = build_student(setting.teacher, GRID.variants[1].mixer, choice, plan, 0)
    return Distil(setting.teacher, adapter, plan.objectives), lambda step: setting.batch(step, config)


def _run(folder: Path, steps: int, pause: float, distil: bool) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        "-m",
        __spec__.name,
        "--child",
        str(folder),
        "--steps",
        str(steps),
        "--pause",
        str(pause),
    ]
    return subprocess.Popen([*command, *(["--distil"] if distil else [])], cwd=Path(__file__).parents[2])


def _latest(folder: Path) -> int:
    found = sorted((folder / "checkpoints").glob("step-*.safetensors"))
    return int(found[-1].stem.removeprefix("step-")) if found else 0


def _wait_for_training(process: subprocess.Popen[bytes], folder: Path, began: int) -> None:
    """Until a step after `began` is logged, or the process has ended."""
    log = folder / "metrics.jsonl"
    while process.poll() is None:
        if log.is_file() and len(log.read_text().splitlines()) > began:
            return
        time.sleep(0.005)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--pause", type=float, default=0.05)
    parser.add_argument("--distil", action="store_true")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child is not None:
        train(asked.child, asked.steps, asked.pause, asked.distil)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        outcome = crash_test(Path(folder), asked.kills, asked.steps, asked.pause, asked.distil)
    began = ", ".join(map(str, outcome.steps))
    print(f"killed {outcome.kills} times, taken up after steps {began}")
    print("the weights are identical, to the last bit" if outcome.identical else "THE WEIGHTS DIFFER")
    return 0 if outcome.identical else 1


if __name__ == "__main__":
    sys.exit(main())
