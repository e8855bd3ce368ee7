"""What an adapter consists of, as a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields


@dataclass(frozen=True)
class SiteStatus:
    """One site of an adapter.

    Attributes:
        site: its name.
        group: the part of the model it lies in.
        tokens: at the size given to `status`; None without a size, or if the host cannot compute it.
        new_parameters: parameters of the mixer; these start random, or at zero.
        mounted: whether the mixer is in the model now.
    """

    site: str
    group: str
    tokens: int | None
    dim: int
    heads: int
    mixer: str
    new_parameters: int
    mounted: bool


class StatusTable(list[SiteStatus]):
    """One row per site; printed, equal sites of a group share a line."""

    def __str__(self) -> str:
        groups: dict[tuple[object, ...], list[SiteStatus]] = {}
        for row in self:
            values = {key: value for key, value in asdict(row).items() if key != "site"}
            groups.setdefault(tuple(values.values()), []).append(row)
        header = ("group", "sites", *(field.name.replace("_", " ") for field in fields(SiteStatus)[2:]))
        table = [header]
        for (group_name, *rest), rows in groups.items():
            cells = ("–" if v is None else f"{v:,}" if type(v) is int else str(v) for v in rest)
            table.append((str(group_name), str(len(rows)), *cells))
        widths = [max(len(line[i]) for line in table) for i in range(len(header))]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table)
        return "\n".join(line.rstrip() for line in lines)
