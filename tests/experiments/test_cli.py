"""The command line: errors on stderr, exit codes of signals, and runs that can be continued."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from experiments.ablation import load_grid
from experiments.ablation.description import describe_run
from experiments.ablation.result import CellResult
from experiments.cli import app
from experiments.cli.app import clean_errors
from experiments.cli.distill import describe_losses
from experiments.core.files import write_json
from experiments.core.progress import show_progress
from experiments.core.signals import Interrupted, raise_on_sigterm
from experiments.distill.recipe import load_recipe

TINY = (
    "distillation.before=[]",
    'distillation.objectives={"output": 1}',
    "distillation.fit.steps=3",
    "distillation.fit.batch_size=2",
    "distillation.images=2",
    "samples.prompts=[]",
)
SETTINGS = [word for setting in TINY for word in ("--set", setting)]


@pytest.mark.parametrize(
    "arguments",
    [
        ["distill", "no_such_recipe"],
        ["distill", "embedded", "--set", "nothing"],
        ["distill", "embedded", "--plugin", "missing.py"],
        ["status", "nowhere"],
        ["ablate", "no_such_grid"],
    ],
)
def test_errors_go_to_stderr(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and len(result.stderr.strip().splitlines()) == 1
    assert "error" not in result.stdout and "Traceback" not in result.output


BRACKETS = "x[i] of [/x] and [bold]"


@pytest.mark.parametrize("verb", ["list --metrics", "list --objectives", "list one", "distill embedded", "ablate demo"])
def test_brackets_in_texts_are_printed(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Formulas, questions and errors are no markup: a tag would vanish, and a closing one would raise an error."""

    def stop(*arguments: Any, **options: Any) -> Any:
        raise ValueError(f"stopped at {BRACKETS}")

    monkeypatch.setattr("experiments.metrics.base.Metric.summary", classmethod(lambda cls: BRACKETS))
    monkeypatch.setattr("inspect.getdoc", lambda _: BRACKETS)
    monkeypatch.setattr("mixers.list_mixers", lambda pattern: ["linear_attention"])
    monkeypatch.setattr("mixers.registry.MixerEntry.summary", BRACKETS)
    monkeypatch.setattr("mixers.registry.MixerEntry.trait_summary", BRACKETS)
    monkeypatch.setattr("experiments.distill.run.run_recipe", stop)
    monkeypatch.setattr("experiments.ablation.run.run_grid", stop)
    recipe = load_recipe("embedded").model_copy(update={"about": BRACKETS})
    monkeypatch.setattr("experiments.distill.recipe.load_recipe", lambda *_: recipe)
    grid = load_grid("demo").model_copy(update={"question": BRACKETS})
    monkeypatch.setattr("experiments.cli.ablate._load_grid", lambda *_: grid)
    result = CliRunner().invoke(app, verb.split())
    assert BRACKETS in " ".join(result.stdout.split()), result.output
    assert verb.startswith("list") or f"error: stopped at {BRACKETS}" in result.stderr


def test_failed_cells_are_named_on_stderr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = CellResult(cell="one-s0-x", variant="one", seed=0, status="failed", error=BRACKETS)
    grid = load_grid("demo")
    monkeypatch.setattr("experiments.cli.ablate._load_grid", lambda *_: grid)
    monkeypatch.setattr("experiments.ablation.run.run_grid", lambda *_, **__: [result])
    monkeypatch.setattr("experiments.report.build_report", lambda out: out / "page.html")
    write_json(tmp_path / "run" / "grid.json", describe_run(grid).model_dump(mode="json"))
    ended = CliRunner().invoke(app, ["ablate", "demo", "--out", str(tmp_path / "run")])
    assert ended.exit_code == 1 and f"failed one-s0-x: {BRACKETS}" in ended.stderr
    assert "one-s0-x" not in ended.stdout


def test_bars_show_brackets() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    with show_progress(console) as display:
        display.update(BRACKETS, 1, 2)
    assert BRACKETS in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT interrupts, as in a terminal; a shell lets what it starts in the background ignore it."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_the_step_and_gives_the_exit_code_of_shells(
    number: signal.Signals, code: int, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kills = [number]

    def describe_and_kill(*arguments: object) -> str:
        if kills:
            os.kill(os.getpid(), kills.pop())
        return "a step"

    teacher = ["--set", f"teacher={tiny_teacher}"]
    command = ["distill", "embedded", "--out", str(tmp_path / "run"), *teacher, *SETTINGS]
    monkeypatch.setattr("experiments.cli.distill.describe_losses", describe_and_kill)
    result = CliRunner().invoke(app, command)
    assert result.exit_code == code
    assert "Stopped after step 2 of 3. Run the same command again to continue." in result.stderr
    monkeypatch.setattr("experiments.cli.distill.describe_losses", describe_losses)
    assert CliRunner().invoke(app, command).exit_code == 0


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "Interrupted.\n"),
        (Interrupted("Terminated.", signal.SIGTERM), 143, "Terminated.\n"),
        (ValueError("a [bold] mistake"), 2, "error: a [bold] mistake\n"),
        (OSError(28, "No space left on device"), 2, "error: [Errno 28] No space left on device\n"),
    ],
)
def test_every_end_has_its_message_and_exit_code(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as ended, clean_errors():
        raise error
    assert ended.value.exit_code == code
    assert capsys.readouterr() == ("", message)


def test_sigterm_raises_where_nothing_else_handles_it() -> None:
    previous = signal.getsignal(signal.SIGTERM)
    try:
        raise_on_sigterm()
        with pytest.raises(Interrupted, match="Terminated") as interruption:
            os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.value.exit_code == 143
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_a_plug_in_that_registers_nothing_is_refused(tmp_path: Path) -> None:
    plugin = tmp_path / "empty.py"
    plugin.write_text("x = 1\n")
    result = CliRunner().invoke(app, ["distill", "embedded", "--plugin", str(plugin)])
    assert result.exit_code == 2 and "registers nothing" in result.stderr
