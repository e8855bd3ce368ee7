"""Two processes are one with the same global batch, and stop as one; a script of itself is what they run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed import distributed_c10d

from experiments.config import FitConfig
from experiments.core.signals import Interrupted
from experiments.training import fit
from experiments.training.processes import this_process

CONFIG = FitConfig(
    steps=12, batch_size=8, learning_rate=1e-2, warmup=2, ema=0.5, checkpoint_every=4, log_every=4, weight_decay=0.1
)


class Objective(nn.Module):
    """Its parameters are reached through a network that is not its child, as a student's are through the UNet; one of
    them has no part in the loss, as in a stage that looks at the queries and keys alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).requires_grad_(False)
        self.student = nn.ModuleDict({"used": network[0], "unused": nn.Linear(2, 2)}).requires_grad_(True)
        self.host = (network,)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        error = self.host[0](batch["x"]) - batch["y"]
        return {"loss": error.square().mean(), "size": error.detach().abs().mean()}


def batch(step: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(step)
    return {"x": torch.randn(8, 3, generator=draw), "y": torch.randn(8, 2, generator=draw)}


def half_broken(step: int) -> dict[str, Tensor]:
    """What breaks is in the second half, the share of the second of two processes."""
    values = batch(step)
    values["x"][5] *= float("inf") if step == 6 else 1
    return values


class Drawing(nn.Module):
    """Its model draws noise for every item by itself, as the teacher's does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.noise: list[float] = []

    def forward(self, batch: Tensor) -> dict[str, Tensor]:
        noise = torch.randn_like(batch)
        self.noise += noise.tolist()
        return {"loss": (batch + noise - self.weight).square().mean()}


def work(folder: Path, rank: int) -> None:
    """What each process does."""
    torch.set_num_threads(1)
    if this_process().num_processes > 1:
        backend = distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
        (folder / f"hours-{rank}.txt").write_text(str(backend.options._timeout.total_seconds() / 3600))
    for accumulation in (1, 2):
        model = Objective()
        config = CONFIG.model_copy(update={"accumulation": accumulation})
        fit(model, batch, config, folder / f"parts{accumulation}")
        state = {name: p.detach().contiguous() for name, p in model.named_parameters()}
        save_file(state, folder / f"parts{accumulation}-{rank}.safetensors")

    def ask(step: int, _: dict[str, float]) -> None:
        if step == 5 and rank == 0:  # only one of the processes gets the signal
            os.kill(os.getpid(), signal.SIGTERM)

    drawing = Drawing()
    fit(drawing, lambda step: torch.randn(4), CONFIG, folder / "drawing")
    (folder / f"noise-{rank}.json").write_text(json.dumps(drawing.noise))

    apart = folder / f"apart-{rank}"  # each sees a folder of its own, with checkpoints in the first one's alone
    if rank == 0:
        shutil.copytree(folder / "parts1", apart)
    output = [
        attempt(half_broken, folder / "broken"),
        attempt(batch, folder / "stopped", ask),
        attempt(batch, apart),
    ]
    (folder / f"said-{rank}.json").write_text(json.dumps(output))


def attempt(data: Callable[[int], Any], folder: Path, report: Callable[..., None] | None = None) -> str:
    model = Objective()
    try:
        fit(model, data, CONFIG, folder, report, watched=model.host[0])
    except (FloatingPointError, Interrupted, ValueError) as error:
        return str(error)
    return "finished"


def run(folder: Path, processes: int, script: str = __file__) -> None:
    """Start processes that train together; each runs the script with the folder and its rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    several = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    root = str(Path(__file__).parents[2])
    common = {**os.environ, "PYTHONPATH": root}
    folder.mkdir()
    running = [
        subprocess.Popen(
            [sys.executable, script, str(folder), str(rank)],
            env={**common, **(several | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {})},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    for process in running:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("processes")
    for processes in (1, 2):
        run(folder / str(processes), processes)
    return folder / "1", folder / "2"


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_are_one(folders: tuple[Path, Path], accumulation: int) -> None:
    one, two = folders
    expected = load_file(one / "parts1-0.safetensors")
    assert not torch.equal(expected["student.used.weight"], Objective().student["used"].weight)
    for rank in range(2):
        got = load_file(two / f"parts{accumulation}-{rank}.safetensors")
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-5)
    logs = [[json.loads(line) for line in (f / "parts1/metrics.jsonl").read_text().splitlines()] for f in folders]
    assert len(logs[0]) == len(logs[1]) == 3
    for ours, theirs in zip(*logs, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


@pytest.mark.slow
def test_processes_wait_while_the_main_one_encodes_for_hours(folders: tuple[Path, Path]) -> None:
    """NCCL's default is ten minutes."""
    assert [float((folders[1] / f"hours-{rank}.txt").read_text()) for rank in range(2)] == [24, 24]


@pytest.mark.slow
def test_two_processes_draw_different_noise(folders: tuple[Path, Path]) -> None:
    """Else a batch would hold every noise twice."""
    one, two = folders
    noise = [json.loads((two / f"noise-{rank}.json").read_text()) for rank in range(2)]
    assert len(noise[0]) == len(noise[1]) == 2 * CONFIG.steps
    assert not set(noise[0]) & set(noise[1])
    assert len(set(json.loads((one / "noise-0.json").read_text()))) == 4 * CONFIG.steps


@pytest.mark.slow
def test_two_processes_stop_as_one(folders: tuple[Path, Path]) -> None:
    one, two = folders
    alone, first, second = (json.loads(path.read_text()) for path in (*one.glob("said*"), *sorted(two.glob("said*"))))
    reason = "step 6: loss, size not finite. The first layer whose output is not finite is 0 (torch.float32)."
    for output in (alone, first, second):
        assert reason in output[0]
        assert "after step 6 of 12" in output[1]
    assert alone[2] == "finished" and "steps: 12, 0." in first[2] and first[2] == second[2]
    for folder in folders:
        for name in ("broken", "stopped"):
            assert max(path.stem for path in (folder / name / "checkpoints").glob("*.safetensors"))[-2:] == "06"


if __name__ == "__main__":
    work(Path(sys.argv[1]), int(sys.argv[2]))
