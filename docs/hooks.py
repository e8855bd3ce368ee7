"""MkDocs hooks: the site's home page is the README, with its links made relative to docs/."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Replace the body of index.md by the README; links to files outside docs/ become plain text."""
    if page.file.src_uri != "index.md":
        return markdown
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "](")
    return re.sub(r"\[([^\]]+)\]\((?!https?:|#)([^)]+)\)", _link, text)


def _link(match: re.Match[str]) -> str:
    inside = (ROOT / "docs" / match[2].split("#")[0]).exists()
    return match[0] if inside else f"{match[1]} (`{match[2]}`)"
