"""Two processes are one with the same global batch."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = '''
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from torch import nn
from experiments.training import FitConfig, fit

torch.set_num_threads(1)
folder, accumulation = Path(sys.argv[1]), int(sys.argv[2])


class Objective(nn.Module):
    """Its parameters are reached through a network that is not its child, as a student's are through the UNet."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).requires_grad_(False)
        network[0].requires_grad_(True)
        self.student = network[0]
        self.host = (network,)

    def forward(self, batch):
        return {"loss": (self.host[0](batch["x"]) - batch["y"]).square().mean()}


def batch(step):
    draw = torch.Generator().manual_seed(step)
    return {"x": torch.randn(8, 3, generator=draw), "y": torch.randn(8, 2, generator=draw)}


model = Objective()
config = FitConfig(
    steps=12, batch_size=8, learning_rate=1e-2, warmup=2, ema=0.5, checkpoint_every=4, log_every=4,
    accumulation=accumulation,
)
fit(model, batch, config, folder)
save_file({n: p.detach().contiguous() for n, p in model.named_parameters()}, folder / f"rank{sys.argv[3]}.safetensors")
'''


def run(script: Path, folder: Path, processes: int, accumulation: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    running = [
        subprocess.Popen(
            [sys.executable, str(script), str(folder), str(accumulation), str(rank)],
            env={
                **os.environ,
                **(settings | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}),
                "ACCELERATE_USE_CPU": "true",
                "PYTHONPATH": str(Path(__file__).parents[2]),
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    for process in running:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_are_one(tmp_path: Path, accumulation: int) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    run(script, tmp_path / "one", 1, 1)
    run(script, tmp_path / "two", 2, accumulation)
    wanted = load_file(tmp_path / "one" / "rank0.safetensors")
    for rank in range(2):
        got = load_file(tmp_path / "two" / f"rank{rank}.safetensors")
        for name, value in wanted.items():
            torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-5)
    assert (tmp_path / "one/metrics.jsonl").read_text().count("\n") == (
        tmp_path / "two/metrics.jsonl"
    ).read_text().count("\n")
