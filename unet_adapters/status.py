"""What an adapter is, as a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

from torch import nn

from unet_adapters.sites import Site


@dataclass(frozen=True)
class SiteStatus:
    """One site of an adapter.

    Attributes:
        tokens: at the size that was asked for; None where none was, or the level is not one of a UNet.
        new_parameters: of the mixer; these start random, or at zero.
        mounted: whether the mixer is in the UNet now.
    """

    site: str
    level: str
    tokens: int | None
    dim: int
    heads: int
    mixer: str
    new_parameters: int
    mounted: bool


class Status(list[SiteStatus]):
    """A row a site; printed, a table with the sites of a level, and of the same kind, in one line."""

    def __str__(self) -> str:
        groups: dict[tuple[object, ...], list[SiteStatus]] = {}
        for row in self:
            alike = {key: value for key, value in asdict(row).items() if key != "site"}
            groups.setdefault(tuple(alike.values()), []).append(row)
        header: tuple[str, ...] = ("level", "sites", *(f.name.replace("_", " ") for f in fields(SiteStatus)[2:]))
        table = [header]
        for (level, *rest), group in groups.items():
            cells = ("–" if v is None else f"{v:,}" if type(v) is int else str(v) for v in rest)
            table.append((str(level), str(len(group)), *cells))
        widths = [max(len(row[i]) for row in table) for i in range(len(header))]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table)
        return "\n".join(line.rstrip() for line in lines)


def tokens_at(unet: nn.Module, site: Site, latent: tuple[int, int]) -> int | None:
    """How many tokens a site sees for latents of this (height, width): every level halves both, rounding up."""
    levels = len(getattr(unet, "down_blocks", ()))
    kind, _, number = site.level.partition(".")
    halvings = {
        "down_blocks": lambda: int(number),
        "mid_block": lambda: levels - 1,
        "up_blocks": lambda: levels - 1 - int(number),
    }
    if kind not in halvings or not levels:
        return None
    height, width = latent
    for _ in range(halvings[kind]()):
        height, width = -(-height // 2), -(-width // 2)
    return height * width
