"""The page on adding a mixer, step by step, and the errors of plug-ins."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from experiments.cli import app
from mixers import entries, list_mixers, registry
from tests.howto.pages import (
    HOWTO,
    SMALL_LOCAL_STAGE,
    SMALL_RUN,
    as_options,
    assert_printed,
    assert_runs_here,
    assert_succeeds,
    blocks,
    run_here,
    run_shell,
)

PAGE = HOWTO / "add_a_mixer.md"
FILES = ("my_mixer.py", "power_grid.py", "power-attention/pyproject.toml")
"""What the reader saves, in the order of the page."""


@pytest.fixture
def files(folder: Path) -> Path:
    """The reader's folder with the files of the page."""
    for name, code in zip(FILES, blocks(PAGE, "python", "toml"), strict=True):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code, encoding="utf-8")
    return folder


def commands() -> list[str]:
    """The commands of the page: check, break and check, ablate, and install and list."""
    return blocks(PAGE, "bash")


def read_variants(page: Path) -> list[dict[str, str]]:
    """The rows of a page's table of variants."""
    table = page.read_text(encoding="utf-8").partition("| Variant |")
    rows = [line.strip("| ").split(" | ") for line in "".join(table[1:]).split("\n\n")[0].splitlines()]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def test_step_2_the_mixer_passes_all_checks(files: Path) -> None:
    assert_printed(assert_runs_here(commands()[0]), blocks(PAGE, "text")[0])


def test_step_3_a_wrong_trait_is_caught_with_the_smallest_failing_case(files: Path) -> None:
    assert_succeeds(commands()[1], files)
    checked = run_here(commands()[2])
    assert checked.exit_code == 1, checked.output
    assert_printed(checked.stdout, blocks(PAGE, "text")[1])
    failure = checked.stdout.partition("-noncausal-normalized ")[2]
    name, message, _, *matrix = failure.splitlines()[:5]
    assert name == "check_never_looks_ahead"
    assert "with 2 tokens" in message
    first, second = ([float(weight) for weight in row.split()] for row in matrix)
    assert len(first) == len(second) == 2
    assert first[1] > 0, "the first token sees the second"
    assert "Traceback" not in checked.output


@pytest.mark.slow  # eight cells
def test_step_4_the_mixer_in_an_ablation(files: Path, tiny_teacher: Path) -> None:
    settings = as_options((f"teacher={tiny_teacher}", *SMALL_RUN, *SMALL_LOCAL_STAGE))
    assert_printed(assert_runs_here(f"{commands()[3].strip()} {settings}"), blocks(PAGE, "text")[2])
    report = files / "runs" / "power" / "report"
    html = (report / "index.html").read_text(encoding="utf-8")
    measured = read_variants(report / "report.md")
    documented = read_variants(PAGE)  # which has no errors: this short run has others than the whole one
    assert [row["Variant"] for row in documented] == [row["Variant"] for row in measured]
    for ours, theirs in zip(documented, measured, strict=True):
        assert ours["Variant"] in html
        assert ours["Features"] == theirs["Features"]
    assert {measured[0][key] for key in measured[0] if key.startswith("Error to teacher")} == {"0"}


@pytest.mark.slow  # pip, and two starts of mixlab
def test_step_5_an_installed_package_needs_no_plugin(files: Path) -> None:
    """The page's own package, built and installed by pip; offline, so with the build backend that is installed here."""
    pytest.importorskip("setuptools", "77", reason="pip builds the package with it, offline")
    copy = commands()[4]
    install, list_command = commands()[5].splitlines()[:2]
    assert_succeeds(copy.replace("mkdir", "mkdir -p"), files)
    assert install.startswith("pip install ")
    offline = "-m pip install --no-index --no-deps --no-build-isolation --target site "
    assert_succeeds(install.replace("pip install ", f"{shlex.quote(sys.executable)} {offline}"), files)
    assert_printed(assert_succeeds(list_command, files, files / "site"), blocks(PAGE, "text")[-1])
    twice = run_shell(f"{list_command} --plugin my_mixer.py", files, files / "site")
    assert twice.returncode == 2
    assert (
        "my_mixer.PowerAttention already has that name" in twice.stderr
        and "Traceback" not in twice.stdout + twice.stderr
    )


@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        (None, "* --plugin mine.py", "Cannot load the plug-in mine.py: expected a .py file"),
        ("def (", "* --plugin mine.py", "Cannot load the plug-in mine.py: SyntaxError"),
        ("x = 1", "* --plugin mine.py", "The plug-in mine.py registers nothing"),
        ("x = 1 / 0", "* --plugin mine.py", "Cannot load the plug-in mine.py: ZeroDivisionError"),
        (
            "import mixers\nmixers.register_mixer('mine')(dict)",
            "* --plugin mine.py",
            "Cannot load the plug-in mine.py: ValueError: Cannot register <class 'dict'> as 'mine'",
        ),
        (None, "no_such_mixer", "No mixer matches 'no_such_mixer'"),
    ],
    ids=["missing", "syntax", "registers nothing", "raises", "no mixer", "unknown pattern"],
)
def test_what_a_user_can_fix_is_one_sentence(source: str | None, arguments: str, message: str, folder: Path) -> None:
    if source is not None:
        Path("mine.py").write_text(source)
    result = CliRunner().invoke(app, ["check", *arguments.split()])
    assert result.exit_code == 2, result.output
    assert [line for line in result.output.splitlines() if line.startswith(f"error: {message}")]
    assert "Traceback" not in result.output


BROKEN = """
from mixers import TokenMixer, register_mixer

@register_mixer("broken", causalities=("noncausal",))
class Broken(TokenMixer):
    pass
"""


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A plug-in, registered for one test, whose mixer has nothing that a mixer must have, not even a docstring."""
    list_mixers()
    monkeypatch.setattr(entries, "ENTRIES", dict(entries.ENTRIES))
    (tmp_path / "broken.py").write_text(BROKEN, encoding="utf-8")
    return str(tmp_path / "broken.py")


def test_a_mixer_that_cannot_be_built_fails_and_the_others_go_on(broken: str) -> None:
    listed = CliRunner().invoke(app, ["list", "broken", "--plugin", broken])
    assert listed.exit_code == 0, listed.output
    assert "see mixlab check" in listed.output
    checked = CliRunner().invoke(app, ["check", "broken", "--plugin", broken])
    assert checked.exit_code == 1, checked.output
    assert "cannot be built: NotImplementedError (in positive, " in checked.output
    assert "2 configurations: 2 of 2 checks failed." in checked.output
    assert "Traceback" not in listed.output + checked.output


def test_a_plug_in_with_the_same_file_name_does_not_replace_another(broken: str) -> None:
    assert registry.load_plugin(broken) == registry.load_plugin(broken) == ["broken"]  # the same file: loaded again
    other = Path(broken).parent / "other" / "broken.py"
    other.parent.mkdir()
    other.write_text(BROKEN, encoding="utf-8")
    with pytest.raises(ValueError, match="has that name"):
        registry.load_plugin(other)
