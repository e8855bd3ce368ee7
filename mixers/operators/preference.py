"""The table that `backend="auto"` goes by: what is tried first, for an operator, a device and a kind of call.

The first backend of the first row that fits, which does not refuse and whose bound the number of tokens does not pass,
runs the call; `chunked` runs what is left. The table below holds for any machine. One that was measured on this machine
(`mixlab bench --calibrate`) takes its place, as a JSON file at $MIXERS_BACKENDS or, by default,
$XDG_CONFIG_HOME/mixers/backends.json (~/.config/mixers/backends.json):

    {"format": 1, "devices": {"NVIDIA H100 80GB HBM3": [
        {"operator": "linear", "causality": "noncausal", "decay": "none", "order": [["triton", null]]}]}}
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from mixers.operators.opaque import constant_in_graphs

FORMAT = 1
VARIABLE = "MIXERS_BACKENDS"
ANY = "*"


@dataclass(frozen=True)
class Row:
    """What is tried for calls of one kind.

    Attributes:
        operator: `linear`, `scan` or `delta`.
        causality, decay: of the calls; "*" is any. Decay is `none`, `scalar` or `vector`.
        order: (backend, up to how many tokens), the best first; None is no bound.
    """

    operator: str
    causality: str
    decay: str
    order: tuple[tuple[str, int | None], ...]

    def fits(self, operator: str, causality: str, decay: str) -> bool:
        """Whether it is about such calls."""
        return self.operator == operator and self.causality in (ANY, causality) and self.decay in (ANY, decay)


def _row(operator: str, causality: str, decay: str, *order: str) -> Row:
    return Row(operator, causality, decay, tuple((name, None) for name in order))


DEFAULT: Mapping[str, tuple[Row, ...]] = {
    "cuda": (
        _row("linear", "noncausal", ANY, "triton"),
        _row("linear", "bidirectional", ANY, "triton"),
        _row("linear", "causal", ANY, "fla"),
        _row("scan", ANY, ANY, "mamba_ssm"),
        _row("delta", ANY, ANY, "fla"),
    ),
}
"""By the type of the device; where a type or a kind of call is missing, `chunked` runs."""


@constant_in_graphs
def preferred(operator: str, device: str, causality: str, decay: str) -> tuple[tuple[str, int | None], ...]:
    """The backends to try and up to how many tokens, the best first.

    Raises:
        ValueError: the table of this machine is damaged, or not where $MIXERS_BACKENDS says.
    """
    place = torch.device(device)
    rows = load_table(table_path()).get(device_name(place)) or DEFAULT.get(place.type, ())
    return next((row.order for row in rows if row.fits(operator, causality, decay)), ())


def device_name(device: torch.device) -> str:
    """What a machine's table is kept under: the GPU's name, or the processor's architecture."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.machine()}"


def table_path() -> Path | None:
    """Where the table of this machine is; None where there is none.

    Raises:
        ValueError: $MIXERS_BACKENDS names no file.
    """
    named = os.environ.get(VARIABLE)
    if named and not Path(named).is_file():
        raise ValueError(f"${VARIABLE} is {named}, which is no file: unset it, or write one.")
    path = Path(named) if named else default_path()
    return path if path.is_file() else None


def default_path() -> Path:
    """Where `mixlab bench --calibrate` writes by default."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "mixers" / "backends.json"


@cache
def load_table(path: Path | None) -> Mapping[str, tuple[Row, ...]]:
    """The rows of every device of a file; read once. None is an empty table.

    Raises:
        ValueError: it is damaged or of another format.
    """
    if path is None:
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, expected {FORMAT}")
        return {device: tuple(_read(entry) for entry in rows) for device, rows in content["devices"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"The table of backends {path} cannot be read ({type(error).__name__}: {error}): delete it, or write it "
            "again with mixlab bench --calibrate."
        ) from error


def save_table(path: Path, device: str, rows: Sequence[Row]) -> None:
    """Write the rows of a device, in one stroke, beside those of other devices in the file.

    Raises:
        ValueError: there is a damaged file already.
    """
    devices = dict(load_table(path if path.is_file() else None)) | {device: tuple(rows)}
    content = {"format": FORMAT, "devices": {name: [asdict(row) for row in kept] for name, kept in devices.items()}}
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(aside, path)
    load_table.cache_clear()


def _read(entry: Mapping[str, Any]) -> Row:
    order = tuple((str(name), None if bound is None else int(bound)) for name, bound in entry["order"])
    return Row(str(entry["operator"]), str(entry["causality"]), str(entry["decay"]), order)
