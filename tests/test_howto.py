"""The how-to pages run as they stand, in a folder outside the repository."""

from __future__ import annotations

import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from experiments.cli import app
from mixers.testing import CHECKS
from mixers.testing.operators import OPERATOR_CHECKS

ROOT = Path(__file__).resolve().parents[1]
ADD, CHECK = (ROOT / "docs" / "howto" / name for name in ("add_a_mixer.md", "check_a_mixer.md"))
FILES = ("my_mixer.py", "my_grid.py", "power-attention/pyproject.toml")  # in the order of the page
TINY = (
    *("distillation.fit.steps=2", "distillation.fit.batch_size=2", "distillation.images=4"),
    *("evaluation.sizes=[64]", "evaluation.images=1", "evaluation.timesteps=[500]", "evaluation.sample_sizes=[64]"),
    *(
        'evaluation.prompts=["red apple, teal background"]',
        "evaluation.sample_steps=2",
        "evaluation.speed_sizes=[64]",
        "evaluation.speed_repeats=1",
    ),
)


def blocks(page: Path, *languages: str) -> list[str]:
    """The page's blocks of code of these languages that start at the margin, in their order."""
    text = page.read_text(encoding="utf-8")
    return [code for language, code in re.findall(r"^```(\w+)\n(.*?)^```", text, re.M | re.S) if language in languages]


def commands() -> list[str]:
    """The page's commands, step by step: check, break and check, ablate, and install and list."""
    return blocks(ADD, "bash")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The reader's folder, with the files of the page in it and `mixlab` beside it."""
    for name, code in zip(FILES, blocks(ADD, "python", "toml"), strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(code, encoding="utf-8")
    script = tmp_path / "bin" / "mixlab"  # -P: as an installed script, it has the reader's folder not on its path
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -P -c "from experiments.cli import main; main()" "$@"\n')
    script.chmod(0o755)
    return tmp_path


def shell(command: str, folder: Path, *paths: Path) -> subprocess.CompletedProcess[str]:
    """Run a command as the reader does; the library is this tree, whatever is installed."""
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(folder / "bin"), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *paths))),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "80",
    }
    return subprocess.run(["bash", "-ec", command], cwd=folder, env=environment, capture_output=True, text=True)


def assert_shown(output: str, shown: str) -> None:
    """Every line that the page shows is in the output, in this order; "…" stands for any lines."""
    lines = iter(line.rstrip() for line in output.splitlines())
    for wanted in shown.splitlines():
        assert wanted == "…" or wanted in lines, f"the page shows {wanted!r}, which is not next in\n{output}"


def test_step_2_the_mixer_keeps_its_promises(folder: Path) -> None:
    done = shell(commands()[0], folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_shown(done.stdout, blocks(ADD, "text")[0])


def test_step_3_a_wrong_trait_is_caught_with_the_smallest_failing_case(folder: Path) -> None:
    assert shell(commands()[1], folder).returncode == 0
    done = shell(commands()[2], folder)
    assert done.returncode == 1, done.stdout + done.stderr
    assert_shown(done.stdout, blocks(ADD, "text")[1])
    failure = done.stdout.partition("-noncausal-normalized ")[2]
    name, told, _, *matrix = failure.splitlines()[:5]
    assert name == "check_never_looks_ahead"
    assert "with 2 tokens" in told
    first, second = ([float(weight) for weight in row.split()] for row in matrix)
    assert len(first) == len(second) == 2
    assert first[1] > 0, "the first token sees the second"
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.slow  # four cells on the teacher that ships
def test_step_4_the_mixer_in_an_ablation(folder: Path) -> None:
    settings = " ".join(f"--set {shlex.quote(setting)}" for setting in TINY)
    done = shell(f"{commands()[3].strip()} {settings}", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_shown(done.stdout, blocks(ADD, "text")[2])
    page = (folder / "runs" / "mine" / "report" / "index.html").read_text(encoding="utf-8")
    assert all(label in page for label in ("softmax, untouched", "linear attention", "power attention, p = 4"))


def test_step_5_an_installed_package_needs_no_plugin(folder: Path) -> None:
    """The page's own package, built and installed by pip; offline, so with the build backend that is here."""
    pytest.importorskip("setuptools", "77", reason="pip builds the package with it, offline")
    copy, install = commands()[4], commands()[5].splitlines()[0]
    assert shell(copy.replace("mkdir", "mkdir -p"), folder).returncode == 0
    assert install.startswith("pip install ")
    offline = "-m pip install --no-index --no-deps --no-build-isolation --target site "
    built = shell(install.replace("pip install ", f"{shlex.quote(sys.executable)} {offline}"), folder)
    assert built.returncode == 0, built.stdout + built.stderr
    listed = shell(commands()[5].splitlines()[1], folder, folder / "site")
    assert listed.returncode == 0, listed.stdout + listed.stderr
    assert_shown(listed.stdout, blocks(ADD, "text")[-1])


@pytest.mark.parametrize(
    ("source", "arguments", "told"),
    [
        (None, "* --plugin mine.py", "Cannot load the plug-in mine.py: expected a .py file"),
        ("def (", "* --plugin mine.py", "Cannot load the plug-in mine.py: SyntaxError"),
        ("x = 1", "* --plugin mine.py", "The plug-in mine.py registers no mixer"),
        ("x = 1 / 0", "* --plugin mine.py", "Cannot load the plug-in mine.py: ZeroDivisionError"),
        (None, "no_such_mixer", "No mixer matches 'no_such_mixer'"),
    ],
    ids=["missing", "syntax", "registers nothing", "raises", "unknown pattern"],
)
def test_what_a_user_can_mend_is_one_sentence(
    source: str | None, arguments: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if source is not None:
        Path("mine.py").write_text(source)
    done = CliRunner().invoke(app, ["check", *arguments.split()])
    assert done.exit_code == 2, done.output
    assert [line for line in done.output.splitlines() if line.startswith(f"error: {told}")]
    assert "Traceback" not in done.output


@pytest.mark.slow  # every check of a mixer and of an operator
def test_the_kit_s_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {"__name__": "page"}
    for code in blocks(CHECK, "python"):
        exec(compile(code, str(CHECK), "exec"), names)
    assert capsys.readouterr().out == "".join(blocks(CHECK, "text"))


def test_the_kit_s_page_lists_every_check() -> None:
    functions = [*(check.run for check in CHECKS), *OPERATOR_CHECKS]
    summaries = [" ".join((inspect.getdoc(f) or "").split("\n\n")[0].split()) for f in functions]
    wanted = [f"- `{f.__name__}`: {summary}" for f, summary in zip(functions, summaries, strict=True)]
    assert re.findall(r"^- `check_.*", CHECK.read_text(encoding="utf-8"), re.M) == wanted
