"""The pages on adapters run as they stand, in a folder outside the repository."""

from __future__ import annotations

from pathlib import Path
from re import DOTALL, MULTILINE, findall
from typing import Any

import pytest

from unet_adapters.hosts import base

HOWTO = Path(__file__).resolve().parents[2] / "docs" / "howto"


def blocks(page: Path, language: str) -> list[str]:
    return findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), MULTILINE | DOTALL)


def run_page(page: Path) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "page"}
    for code in blocks(page, "python"):
        exec(compile(code, str(page), "exec"), names)
    return names


@pytest.mark.slow  # the teacher that ships
def test_the_page_of_what_works_runs(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not run_page(HOWTO / "works_with.md")["adapter"].is_mounted


def test_a_host_is_one_file_outside_the_repository(tmp_path, monkeypatch, capsys) -> None:
    page = HOWTO / "add_a_host.md"
    base.list_hosts()
    monkeypatch.setattr(base, "_HOSTS", dict(base._HOSTS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    first, *rest = blocks(page, "python")
    Path("dit_host.py").write_text(first, encoding="utf-8")
    names: dict[str, Any] = {"__name__": "page"}
    for code in rest:
        exec(compile(code, str(page), "exec"), names)
    assert capsys.readouterr().out == "".join(blocks(page, "text"))
