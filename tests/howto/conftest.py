"""Fixtures of the pages' tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.experiments.conftest import tiny_teacher
from tests.howto.pages import create_reader_folder

__all__ = ["folder", "tiny_teacher"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The reader's folder, outside the repository, which is also the working directory."""
    monkeypatch.chdir(tmp_path)
    return create_reader_folder(tmp_path)
