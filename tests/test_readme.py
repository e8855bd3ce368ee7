"""The README's first snippet runs as it stands."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


def test_the_first_snippet_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snippet = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert snippet is not None
    assert len(snippet.group(1).strip().splitlines()) <= 12
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet.group(1), str(README), "exec"), {})
    assert (tmp_path / "apple.png").is_file()
