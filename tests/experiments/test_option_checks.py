"""Options are checked before a command works: nothing is computed that could not be written, and numbers are finite."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer
from typer.main import get_command

from experiments.cli import app
from experiments.cli.option_checks import check_file, check_finite, check_folder
from experiments.config import EvaluationConfig, FitConfig, apply_overrides

WRITES = {"out", "stage_dir", "table"}
"""Parameters that say where a command writes."""
FIRST_ARGUMENTS = {("teacher", "sheet"): "path", ("teacher", "export"): "folder"}


def commands(group: click.Group, *path: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, *path, name)
        else:
            yield (*path, name), command


def test_every_command_checks_where_it_writes() -> None:
    unchecked = []
    for path, command in commands(get_command(app)):  # type: ignore[arg-type]
        names = WRITES | {FIRST_ARGUMENTS.get(path, "")}
        unchecked += [f"{path} {p.name}" for p in command.params if p.name in names and p.callback is None]
    assert not unchecked


def test_every_number_of_every_command_has_to_be_finite() -> None:
    floats = [
        (path, param)
        for path, command in commands(get_command(app))  # type: ignore[arg-type]
        for param in command.params
        if isinstance(param.type, click.types.FloatParamType)
    ]
    assert len(floats) > 8
    assert not [f"{path} {param.name}" for path, param in floats if param.callback is None]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(typer.BadParameter, match="is not a finite number"):
        check_finite(value)
    assert check_finite(None) is None and check_finite(1.5) == 1.5


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_a_setting_that_is_not_finite_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match="guidance: Input should be"):
        apply_overrides(EvaluationConfig(), [f"guidance={value}"])
    with pytest.raises(ValueError, match="learning_rate: Input should be"):
        apply_overrides(FitConfig(steps=1, batch_size=1, learning_rate=1e-3), [f"learning_rate={value}"])


@pytest.mark.parametrize(("check", "name"), [(check_folder, "file"), (check_folder, "file/x"), (check_file, "file/x")])
def test_a_file_in_the_way_is_named(check, name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(typer.BadParameter, match="file is a file, not a folder"):
        check(tmp_path / name)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="is a folder; expected the name of a file"):
        check_file(tmp_path)


def test_what_is_not_writable_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    for check, path in ((check_folder, tmp_path), (check_folder, tmp_path / "new"), (check_file, tmp_path / "x.png")):
        with pytest.raises(typer.BadParameter, match="is not writable"):
            check(path)


@pytest.mark.parametrize("check", [check_folder, check_file])
def test_what_can_be_written_is_left_alone(check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (None, Path("new.png"), tmp_path / "new" / "deep" / "x.png"):
        assert check(path) == path
    assert not list(tmp_path.iterdir()), "nothing is created by a check"


@pytest.mark.parametrize("check", [check_folder, check_file])
def test_a_path_with_a_nul_byte_is_refused(check) -> None:
    with pytest.raises(typer.BadParameter, match="is not a path"):
        check(Path("a\0b"))
