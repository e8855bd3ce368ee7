"""Sessions on borrowed hardware: order, budget, what is on disk when one is cut off, and a dry run on the CPU."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import pytest

from experiments.bench import gpu_session
from experiments.bench.session import LOG, MIN_SECONDS, STEPS, RunProcess, SessionStep, run_session, run_subprocess


def step(name: str, max_seconds: float = 100.0, is_required: bool = False) -> SessionStep:
    arguments = ("-m", name, "--out", "{out}", "--budget", "{seconds}")
    return SessionStep(name, max_seconds, arguments, ("-m", name, "--dry"), is_required)


class FakeProcesses:
    """Runs nothing: every step takes `seconds` of a fake clock, or is killed at its limit."""

    def __init__(self, seconds: float, exit_codes: dict[str, int] | None = None) -> None:
        self.now = 0.0
        self.seconds = seconds
        self.exit_codes = exit_codes or {}
        self.commands: list[list[str]] = []

    def __call__(self, arguments: Sequence[str], seconds: float, log: TextIO) -> int | None:
        self.commands.append(list(arguments))
        self.now += min(self.seconds, seconds)
        return None if self.seconds > seconds else self.exit_codes.get(arguments[1], 0)

    def clock(self) -> float:
        return self.now


def statuses(steps: Sequence[SessionStep], processes: FakeProcesses, out: Path, budget: float) -> list[str]:
    run: RunProcess = processes
    return [o.status for o in run_session(steps, out, budget, run_process=run, clock=processes.clock)]


def test_steps_run_in_order_until_the_budget_is_spent(tmp_path: Path) -> None:
    processes = FakeProcesses(60.0)
    steps = [step("a"), step("b"), step("c"), step("d")]
    budget = 120.0 + MIN_SECONDS + 1
    assert statuses(steps, processes, tmp_path, budget) == ["succeeded", "succeeded", "killed", "skipped"]
    assert processes.now <= budget
    assert processes.commands[0] == ["-m", "a", "--out", str(tmp_path), "--budget", "85"]
    assert [o["status"] for o in json.loads((tmp_path / STEPS).read_text())][-1] == "skipped"


def test_a_failing_step_leaves_the_others_alone_unless_it_is_required(tmp_path: Path) -> None:
    processes = FakeProcesses(1.0, {"a": 1})
    assert statuses([step("a"), step("b")], processes, tmp_path, 100.0) == ["failed", "succeeded"]
    required = [step("a", is_required=True), step("b")]
    assert statuses(required, FakeProcesses(1.0, {"a": 1}), tmp_path, 100.0) == ["failed", "skipped"]


def test_every_step_is_on_disk_when_it_ends(tmp_path: Path) -> None:
    """A session that is cut off in its second step has the first in the log, in steps.json and in the archive."""

    def run(arguments: Sequence[str], seconds: float, log: TextIO) -> int | None:
        if arguments[1] == "b":
            raise KeyboardInterrupt
        (tmp_path / "out" / "result.txt").write_text("measured")
        return 0

    archive = tmp_path / "out.tar.gz"
    with pytest.raises(KeyboardInterrupt):
        run_session([step("a"), step("b")], tmp_path / "out", 100.0, archive=archive, run_process=run)
    assert [o["name"] for o in json.loads((tmp_path / "out" / STEPS).read_text())] == ["a"]
    assert "== a: succeeded" in (tmp_path / "out" / LOG).read_text()
    with tarfile.open(archive) as tar:
        assert "out/result.txt" in tar.getnames() and "out/steps.json" in tar.getnames()


def test_a_process_is_logged_and_killed_at_its_limit(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        assert run_subprocess(["-c", "print('hello'); raise SystemExit(3)"], 60.0, log) == 3
        assert run_subprocess(["-c", "import threading; threading.Event().wait()"], 0.5, log) is None
    assert (tmp_path / "log").read_text() == "hello\n"


@pytest.mark.slow  # every step of the session
def test_a_dry_run_executes_every_step_of_the_gpu_session(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    exit_code = gpu_session.main([str(tmp_path), "--dry-run", "--budget", "3600"])
    log = (tmp_path / LOG).read_text()
    outcomes = {o["name"]: o["status"] for o in json.loads((tmp_path / STEPS).read_text())}
    assert exit_code == 0, log
    assert outcomes == {step.name: "succeeded" for step in gpu_session.STEPS}
    for result in ("sd15/operators.md", "unet/unet.json", "layers/layers.md", "crossover/crossover.json"):
        assert (tmp_path / result).is_file(), result
    assert "test_triton" in log, "the kernels' tests are collected"
    assert (tmp_path / "backends.json").is_file()


def test_the_session_runs_every_file_with_tests_that_need_a_gpu() -> None:
    root = Path(__file__).resolve().parents[2]
    files = {path for path in root.glob("tests/mixers/test_*.py") if "pytest.mark.gpu" in path.read_text("utf-8")}
    assert files == {root / name for name in gpu_session.KERNEL_TESTS}


def test_a_session_without_a_gpu_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if gpu_session.torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu_session.main([str(tmp_path / "out")]) == 2
    assert "torch finds no GPU here" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
