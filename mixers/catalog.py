"""The tables of docs/mixers.md, generated from the registry.

    python -m mixers.catalog docs/mixers.md       # rewrite the generated tables of a page

A generated table stands between `<!-- table: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mixers.entries import MixerEntry
from mixers.registry import get_mixer_entry, list_mixers
from mixers.stages.normalizers import NORMALIZER_NAMES


def mixer_table() -> str:
    """Return the Markdown table of all mixers: formula, defaults, drop-in form, deviations from the paper's block."""
    rows = []
    for entry in map(get_mixer_entry, list_mixers()):
        defaults = entry.default_causality + (", normalized" if entry.default_normalize else "")
        rows.append((f"`{entry.name}`", entry.summary, defaults, _format_drop_in(entry), entry.deviations or "–"))
    return _markdown(("mixer", "what it is", "default", "drop-in form", "deviations from the published block"), rows)


def unsupported_table() -> str:
    """Return the Markdown table of the values that mixers do not support, with the reasons."""
    rows = []
    for entry in map(get_mixer_entry, list_mixers()):
        for normalizer in NORMALIZER_NAMES:
            reason = entry.mixer.refuses_normalizer(normalizer)
            if reason is not None and normalizer != entry.config.default_normalizer:
                rows.append((f"`{entry.name}`", f"`normalizer={normalizer!r}`", reason))
        for value, reason in entry.unsupported.items():
            option = f"normalize={value}" if value in ("True", "False") else f"causality={value!r}"
            rows.append((f"`{entry.name}`", f"`{option}`", reason))
    return _markdown(("mixer", "not supported", "because"), rows)


TABLES: Mapping[str, Callable[[], str]] = {"mixers": mixer_table, "unsupported": unsupported_table}


def render(page: str) -> str:
    """Return the text of a Markdown page with its generated tables up to date.

    Raises:
        ValueError: The page asks for a table that does not exist.
    """

    def table(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise ValueError(f"Unknown table {name!r}: expected one of {', '.join(TABLES)}.")
        return f"<!-- table: {name} -->\n\n{TABLES[name]()}\n\n<!-- end -->"

    return re.sub(r"<!-- table: (?P<name>\w+) -->.*?<!-- end -->", table, page, flags=re.DOTALL)


def _format_drop_in(entry: MixerEntry) -> str:
    options = entry.mixer.drop_in_options
    return ", ".join(f"{name}={_format_value(value)}" for name, value in options.items()) or "the same"


def _format_value(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


def _markdown(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.write_text(render(path.read_text(encoding="utf-8")), encoding="utf-8")
