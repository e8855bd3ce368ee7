"""Self-contained HTML: templates with their styles, script and images inline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image

from experiments.report.sample_viewer import encode_webp


def render(template: str, **values: Any) -> str:
    """Render one of templates/; the result needs no network."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "data_uri": _data_uri,
        "pretty": _pretty,
        "anchor": _anchor,
        "split_spread": _split_spread,
    }
    return environment.get_template(template).render(**values)


def _anchor(title: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in title.lower())


def _split_spread(text: str) -> Markup:
    """A value with its spread or interval on a line of its own."""
    for sign, first in ((" ± ", "± "), (" [", "[")):
        value, separator, rest = text.partition(sign)
        if separator:
            return escape(value) + Markup("<small>") + escape(first + rest) + Markup("</small>")
    return escape(text)


def _data_uri(path: Path) -> str:
    """As WebP, a third of the PNG's size or less; lossless if the figure consists of lines and letters."""
    with Image.open(path) as image:
        return encode_webp(image.convert("RGB"), lossless=path.with_suffix(".svg").is_file())


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False)
