"""Kill a training at random points, again and again, and compare its weights with those of one that was left alone.

    python -m experiments.studies.crash_test [--kills 20] [--distill]

SIGKILL, in the middle of whatever the process does: every other one as soon as a checkpoint is being written, the rest
at any time. With `--distill` it is a distillation of the embedded teacher, else a small regression. Exits with 0 where
the weights and the log are the same to the last bit.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from experiments.training.checkpoints import FOLDER
from mixers.files import PARTIAL

WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class Outcome:
    """How it went.

    Attributes:
        identical: whether the weights, and the log, are the same, byte for byte.
        kills: how many processes were killed while they trained.
        writing: how many of them left a checkpoint half written.
        steps: after which step each began, the first at 0.
    """

    identical: bool
    kills: int
    writing: int
    steps: tuple[int, ...]


def crash_test(folder: Path, kills: int = 20, steps: int = 60, pause: float = 0.05, distill: bool = False) -> Outcome:
    """Train undisturbed, then with `kills` SIGKILLs at random moments, and compare.

    Args:
        folder: scratch.
        steps: of the training; it starts anew from its last checkpoint after each kill.
        pause: seconds that each step is drawn out by, so that there is time to be killed in.
        distill: a real distillation.
    """
    whole, killed = folder / "whole", folder / "killed"
    _run(whole, steps, 0.0, distill).wait()
    draw, done, writing, began = random.Random(0), 0, 0, []
    while not (killed / WEIGHTS).is_file():
        began.append(_latest(killed))
        since = time.time_ns()
        process = _run(killed, steps, pause, distill)
        if done < kills:
            delay = None if done % 2 == 0 else draw.uniform(0.0, pause * steps / kills)
            done += _kill(process, killed, since, delay)
            writing += _last_half(killed) > since
        elif process.wait() != 0:
            raise RuntimeError(f"The training itself failed; its folder is {killed}.")
    same = all((whole / name).read_bytes() == (killed / name).read_bytes() for name in (WEIGHTS, "metrics.jsonl"))
    return Outcome(same, done, writing, tuple(began))


def train(folder: Path, steps: int, pause: float, distill: bool) -> None:
    """One process: train from the last checkpoint on, and write the weights at the end."""
    import torch
    from safetensors.torch import save_file

    from experiments.config import FitConfig
    from experiments.training import fit

    torch.set_num_threads(1)
    config = FitConfig(
        steps=steps, batch_size=4, learning_rate=1e-3, warmup=2, ema=0.9, checkpoint_every=1, log_every=1
    )
    model, batch = _distillation(config) if distill else _regression()
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
    from experiments.config import DistillationConfig, MixerSpec
    from experiments.distill import DistillationLoss, build_student, open_context
    from experiments.grids.compatibility import GRID

    setting = open_context("embedded", GRID.data, 64, 32)
    plan = DistillationConfig(fit=config)
    choice = MixerSpec(select="mid_block")
    adapter = build_student(setting.teacher, GRID.variants[0].mixer, choice, plan, 0)
    return DistillationLoss(setting.teacher, adapter, plan.objectives), lambda step: setting.batch(step, config)


def _run(folder: Path, steps: int, pause: float, distill: bool) -> subprocess.Popen[bytes]:
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
    return subprocess.Popen([*command, *(["--distill"] if distill else [])], cwd=Path(__file__).parents[3])


def _latest(folder: Path) -> int:
    found = sorted((folder / FOLDER).glob("step-*.safetensors"))
    return int(found[-1].stem.removeprefix("step-")) if found else 0


def _logged(folder: Path, since: int) -> int:
    """How many steps the log has, if it was written to since then."""
    log = folder / "metrics.jsonl"
    return len(log.read_text().splitlines()) if log.is_file() and log.stat().st_mtime_ns > since else 0


def _last_half(folder: Path) -> int:
    """When the last file was written that is not finished, or never will be; 0 without one."""
    times = [0]
    for path in (folder / FOLDER).glob(f"*{PARTIAL}"):
        with suppress(FileNotFoundError):  # it is finished
            times.append(path.stat().st_mtime_ns)
    return max(times)


def _kill(process: subprocess.Popen[bytes], folder: Path, since: int, delay: float | None) -> bool:
    """Kill a process in its training, some seconds after its first step or as soon as it writes a checkpoint.

    Returns:
        Whether it was still running.
    """
    before = _latest(folder)
    while process.poll() is None and _logged(folder, since) <= before:
        time.sleep(0.005)
    while delay is None and process.poll() is None and _last_half(folder) <= since:
        pass
    time.sleep(delay or 0.0)
    process.kill()
    return process.wait() != 0


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--pause", type=float, default=0.05)
    parser.add_argument("--distill", action="store_true")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child is not None:
        train(asked.child, asked.steps, asked.pause, asked.distill)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        outcome = crash_test(Path(folder), asked.kills, asked.steps, asked.pause, asked.distill)
    began = ", ".join(map(str, outcome.steps))
    print(f"killed {outcome.kills} times, {outcome.writing} of them in a checkpoint; taken up after steps {began}")
    print("weights and log are identical, to the last bit" if outcome.identical else "THEY DIFFER")
    return 0 if outcome.identical else 1


if __name__ == "__main__":
    sys.exit(main())
