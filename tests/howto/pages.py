"""How documentation pages are executed: Python blocks in order, and commands in a folder of the reader."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from experiments.cli import app
from experiments.core.registries import REGISTRIES
from mixers import entries, list_mixers
from mixers.operators import backend
from unet_adapters.hosts import base as hosts

ROOT = Path(__file__).resolve().parents[2]
HOWTO = ROOT / "docs" / "howto"
SMALL_RUN = (
    "distillation.fit.steps=2",
    "distillation.fit.batch_size=2",
    "distillation.images=4",
    "evaluation.shapes=[]",
    "evaluation.generated.images=0",
    "evaluation.held_in_images=0",
    "evaluation.sizes=[64,128]",
    "evaluation.images=1",
    "evaluation.timesteps=[500]",
    "evaluation.sample_sizes=[64]",
    'evaluation.prompts=["a red apple, teal background"]',
    "evaluation.sample_steps=2",
    "evaluation.metrics.cost.sizes=[64]",
    "evaluation.metrics.cost.repeats=1",
    "evaluation.metrics.sites.images=1",
)
"""Settings that make an ablation take seconds."""
SMALL_LOCAL_STAGE = ("distillation.before.0.fit.steps=2", "distillation.before.0.fit.batch_size=2")
"""What a grid needs besides if it first distills site by site."""


def as_options(changes: Iterable[str]) -> str:
    """Return changes of settings as options of a command: `--set a=1 --set b=2`, quoted for a shell."""
    return " ".join(f"--set {shlex.quote(change)}" for change in changes)


def blocks(page: Path, *languages: str) -> list[str]:
    """The code blocks in these languages that start at the margin, in the order of the page."""
    text = page.read_text(encoding="utf-8")
    return [code for language, code in re.findall(r"^```(\w+)\n(.*?)^```", text, re.M | re.S) if language in languages]


def run_python_blocks(page: Path, names: dict[str, object] | None = None) -> dict[str, object]:
    """Execute the Python blocks one after the other and compare their output with the text blocks.

    Args:
        page: of the documentation.
        names: that the page takes for granted.

    Returns:
        The names that the blocks define.
    """
    names = {"__name__": "page", **(names or {})}
    output = StringIO()
    with redirect_stdout(output):
        for number, code in enumerate(blocks(page, "python"), 1):
            exec(compile(code, f"{page.name}, block {number}", "exec", dont_inherit=True), names)
    expected = "".join(blocks(page, "text"))
    if expected:
        assert_printed(output.getvalue(), expected)
    return names


def create_reader_folder(folder: Path) -> Path:
    """Put the command `mixlab` into a folder, as if the package were installed."""
    script = folder / "bin" / "mixlab"  # -P: an installed script does not have the working directory on its path
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -P -c "from experiments.cli import main; main()" "$@"\n')
    script.chmod(0o755)
    return folder


def run_shell(command: str, folder: Path, *paths: Path) -> subprocess.CompletedProcess[str]:
    """Run a command as the reader does.

    Args:
        command: for bash.
        folder: the reader's folder.
        *paths: folders with installed packages. The library is this tree, whatever is installed.
    """
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(folder / "bin"), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *paths))),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "80",
    }
    return subprocess.run(["bash", "-ec", command], cwd=folder, env=environment, capture_output=True, text=True)


def assert_succeeds(command: str, folder: Path, *paths: Path) -> str:
    """Run a command as the reader does, and return what it printed to stdout."""
    completed = run_shell(command, folder, *paths)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    return completed.stdout


@contextmanager
def registrations_restored() -> Iterator[None]:
    """Forget at the end what plug-ins registered inside the block."""
    list_mixers()
    for registry in REGISTRIES:
        registry.discover()
    tables: list[dict[Any, Any]] = [entries.ENTRIES, hosts._HOSTS, *backend._REGISTRY.values()]
    tables += [table for registry in REGISTRIES for table in (registry._items, registry._origins)]
    before = [dict(table) for table in tables]
    try:
        yield
    finally:
        for table, items in zip(tables, before, strict=True):
            table.clear()
            table.update(items)


def run_here(command: str) -> Result:
    """Run one `mixlab` command in this process, which saves a start of Python.

    Its plug-ins are forgotten afterwards. The working directory is the reader's folder.
    """
    program, *words = shlex.split(command.replace("\\\n", ""), comments=True)
    assert program == "mixlab", command
    with registrations_restored():
        return CliRunner().invoke(app, words, env={"COLUMNS": "80"})


def assert_runs_here(command: str) -> str:
    """Run one `mixlab` command as `run_here` does, and return what it printed to stdout."""
    result = run_here(command)
    assert result.exit_code == 0, result.output
    return result.stdout


def assert_printed(output: str, expected: str) -> None:
    """Check that every line of the page is in the output, in this order; "…" stands for any lines."""
    lines = iter(line.rstrip() for line in output.splitlines())
    for line in expected.splitlines():
        assert line == "…" or line in lines, f"the page shows {line!r}, which is not next in\n{output}"
