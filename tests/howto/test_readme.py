"""The README's first snippet runs as it stands."""

from pathlib import Path

from tests.howto.pages import ROOT, blocks

README = ROOT / "README.md"


def test_the_first_snippet_runs(folder: Path) -> None:
    snippet = blocks(README, "python")[0]
    assert len(snippet.strip().splitlines()) <= 12
    exec(compile(snippet, str(README), "exec", dont_inherit=True), {})
    assert (folder / "apple.png").is_file()
