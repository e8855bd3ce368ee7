"""MkDocs hooks: the home page is the README; links to files outside docs/, which the site has not, become text."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?:|#)([^)\s]+)\)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Replace the body of index.md by the README, and links out of docs/ by the paths of their files."""
    source = f"docs/{page.file.src_uri}"
    if page.file.src_uri == "index.md":
        markdown = (ROOT / "README.md").read_text(encoding="utf-8")
        source = "README.md"

    def link(match: re.Match[str]) -> str:
        target, _, anchor = match[2].partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if not path.startswith("docs/"):
            return f"{match[1]} (`{path}`)"
        relative = posixpath.relpath(path, posixpath.dirname(f"docs/{page.file.src_uri}"))
        return f"[{match[1]}]({relative}{'#' * bool(anchor)}{anchor})"

    return LINK.sub(link, markdown).replace("](docs/", "](")
