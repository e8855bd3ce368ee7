"""The pages on adapters run as they stand, in a folder outside the repository."""

from __future__ import annotations

from pathlib import Path
from re import DOTALL, MULTILINE, findall
from typing import Any

import pytest

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
