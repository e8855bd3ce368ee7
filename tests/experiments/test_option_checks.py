"""Options are checked before a command works: nothing is computed that could not be written, and numbers are finite."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

import pytest
import typer

from experiments.cli import app
from experiments.cli.option_checks import check_file, check_finite, check_folder
from experiments.config import EvaluationConfig, FitConfig, apply_overrides

WRITES = {"out", "stage_dir", "table"}
"""Parameters that say where a command writes; `teacher sheet` has one more."""


class Parameter(NamedTuple):
    """An option or argument of a command."""

    command: str
    name: str
    type: Any
    callback: Any


def parameters(group: typer.Typer = app) -> Iterator[Parameter]:
    """Every option and argument that has a help text, of every command."""
    for command in group.registered_commands:
        assert command.callback is not None
        for name, hint in get_type_hints(command.callback, include_extras=True).items():
            if get_origin(hint) is Annotated:
                kind, info = get_args(hint)[:2]
                yield Parameter(command.callback.__name__, name, kind, info.callback)
    for subgroup in group.registered_groups:
        assert subgroup.typer_instance is not None
        yield from parameters(subgroup.typer_instance)


def test_every_command_checks_where_it_writes() -> None:
    writing = [p for p in parameters() if p.name in WRITES or (p.command, p.name) in {("sheet", "path")}]
    assert len(writing) > 10 and {"sheet", "generate", "collect"} <= {p.command for p in writing}
    assert not [f"{p.command} {p.name}" for p in writing if p.callback is None]


def test_every_number_of_every_command_has_to_be_finite() -> None:
    floats = [p for p in parameters() if float in (p.type, *get_args(p.type))]
    assert len(floats) > 8
    assert not [f"{p.command} {p.name}" for p in floats if p.callback is not check_finite]


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
