"""The table behind `backend="auto"`: which backends are tried first, by operator, device and kind of call.

The first backend of the first matching row that does not refuse the call, and whose bound on the number of tokens is
not exceeded, runs it; `chunked` runs every call that is left. The default table holds on any machine. A table that was
measured on this machine (`mixlab bench --calibrate`) replaces it: a JSON file at $MIXERS_BACKENDS or, by default,
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

from mixers.files import atomic_path
from mixers.operators.compilation import constant_in_graphs

FORMAT = 1
TABLE_VARIABLE = "MIXERS_BACKENDS"
ANY = "*"


@dataclass(frozen=True)
class BackendPreference:
    """A row of the table: the backends to try for one kind of call.

    Attributes:
        operator: `linear`, `scan` or `delta`.
        causality: of the calls; "*" matches any.
        decay: of the calls, `none`, `scalar` or `vector`; "*" matches any.
        order: (backend, largest number of tokens), the best first; None means no bound.
    """

    operator: str
    causality: str
    decay: str
    order: tuple[tuple[str, int | None], ...]

    def matches(self, operator: str, causality: str, decay: str) -> bool:
        """Return whether the row is for such calls."""
        return self.operator == operator and self.causality in (ANY, causality) and self.decay in (ANY, decay)


def _prefer(operator: str, causality: str, decay: str, *order: str) -> BackendPreference:
    return BackendPreference(operator, causality, decay, tuple((name, None) for name in order))


DEFAULT_TABLE: Mapping[str, tuple[BackendPreference, ...]] = {
    "cuda": (
        _prefer("linear", "noncausal", ANY, "triton"),
        _prefer("linear", "bidirectional", ANY, "triton"),
        _prefer("linear", "causal", ANY, "fla"),
        _prefer("scan", ANY, ANY, "mamba_ssm"),
        _prefer("delta", ANY, ANY, "fla"),
    ),
}
"""By the type of the device; if a type or a kind of call is missing, `chunked` runs."""


@constant_in_graphs
def preferred_backends(operator: str, device: str, causality: str, decay: str) -> tuple[tuple[str, int | None], ...]:
    """Return the backends to try and the largest number of tokens of each, the best first.

    Raises:
        ValueError: The table of this machine is damaged, or $MIXERS_BACKENDS names no file.
    """
    where = torch.device(device)
    rows = load_table(table_path()).get(device_name(where)) or DEFAULT_TABLE.get(where.type, ())
    return next((row.order for row in rows if row.matches(operator, causality, decay)), ())


def device_name(device: torch.device) -> str:
    """Return the key of a device in the file: the GPU's name, or the processor's architecture."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.machine()}"


def table_path() -> Path | None:
    """Return the file with the table of this machine; None if there is none.

    Raises:
        ValueError: $MIXERS_BACKENDS names no file.
    """
    named = os.environ.get(TABLE_VARIABLE)
    if named and not Path(named).is_file():
        raise ValueError(f"${TABLE_VARIABLE} is {named}, which is no file: unset it, or write one.")
    path = Path(named) if named else default_path()
    return path if path.is_file() else None


def default_path() -> Path:
    """Return the file that `mixlab bench --calibrate` writes by default."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "mixers" / "backends.json"


@cache
def load_table(path: Path | None) -> Mapping[str, tuple[BackendPreference, ...]]:
    """Read the rows of every device from a file, once; None gives an empty table.

    Raises:
        ValueError: The file is damaged or of another format.
    """
    if path is None:
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, expected {FORMAT}")
        return {device: tuple(parse_row(entry) for entry in rows) for device, rows in content["devices"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"The table of backends {path} cannot be read ({type(error).__name__}: {error}): delete it, or write it "
            "again with mixlab bench --calibrate."
        ) from error


def save_table(path: Path, device: str, rows: Sequence[BackendPreference]) -> None:
    """Write the rows of a device atomically; rows of other devices in the file stay.

    Raises:
        ValueError: There is a damaged file already.
    """
    devices = dict(load_table(path if path.is_file() else None)) | {device: tuple(rows)}
    content = {"format": FORMAT, "devices": {name: [asdict(row) for row in table] for name, table in devices.items()}}
    with atomic_path(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    load_table.cache_clear()


def parse_row(entry: Mapping[str, Any]) -> BackendPreference:
    """Return the row of a JSON object.

    Raises:
        KeyError, TypeError, ValueError: The object is no row.
    """
    order = tuple((str(name), None if longest is None else int(longest)) for name, longest in entry["order"])
    return BackendPreference(str(entry["operator"]), str(entry["causality"]), str(entry["decay"]), order)
