"""One small image through every mixer, and what their matrices have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mixers import TokenMixer, create_mixer, list_mixers, registry, structure
from mixers.stages.scan_orders import SCANS
from mixers.traits import CAUSALITIES, Causality

DIM, HEADS, GRID = 32, 2, (8, 8)


@dataclass(frozen=True)
class Record:
    """A mixer's first head (and first value channel, where each has its own matrix) on one image.

    Attributes:
        matrix: (l, l), in raster order.
        rank, lower, upper: numerical rank of W, and semiseparable rank below and above its diagonal.
        shares: of |W| before, on and after the diagonal.
        radius: how far tokens see on average, in places of the grid.
    """

    mixer: str
    causality: Causality
    normalize: bool
    grid: tuple[int, int]
    matrix: Tensor
    rank: int
    lower: int
    upper: int
    shares: tuple[float, float, float]
    radius: float


def picture(dim: int, grid: tuple[int, int], seed: int = 0) -> Tensor:
    """A smooth random image as tokens (1, l, d) in float64: neighbors are alike, as in pictures."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, dim, 4, 4, generator=generator, dtype=torch.float64)
    return 1.5 * F.interpolate(coarse, grid, mode="bicubic", align_corners=True).flatten(2).transpose(1, 2)


def build(name: str, **options: Any) -> TokenMixer:
    """A mixer in its drop-in form, in float64, with every parameter moved a little from where it starts."""
    torch.manual_seed(0)
    settings = {**registry.get_mixer_entry(name).mixer.drop_in_options, **options}
    mixer = create_mixer(name, DIM, HEADS, **settings).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return mixer


@torch.no_grad()
def examine(name: str, grid: tuple[int, int] = GRID, **options: Any) -> Record:
    """Everything about one mixer; `options` as in `create_mixer`. Costs O(l⁴) time for the semiseparable ranks."""
    mixer = build(name, **options)
    matrix = structure.mixing_matrix(mixer, picture(DIM, grid), grid=grid)[0, 0]
    matrix = matrix if matrix.ndim == 2 else matrix[0]
    lower, upper = structure.semiseparable_rank(matrix)
    return Record(
        mixer=name,
        causality=mixer.traits.causality,
        normalize=mixer.config.normalize,
        grid=grid,
        matrix=matrix,
        rank=int(structure.numerical_rank(matrix)),
        lower=int(lower),
        upper=int(upper),
        shares=tuple(float(share) for share in structure.triangularity(matrix)),  # type: ignore[arg-type]
        radius=float(structure.effective_radius(matrix, grid).mean()),
    )


def records(pattern: str = "*", report: Callable[[int, int, str], None] | None = None) -> list[Record]:
    """A record of every causality that each matching mixer offers.

    Args:
        pattern: wildcard pattern of registered names.
        report: called with (records done, their number, the mixer that is next).

    Raises:
        ValueError: no mixer matches.
    """
    wanted = [
        (name, c)
        for name in list_mixers(pattern)
        for c in CAUSALITIES
        if c in registry.get_mixer_entry(name).causalities
    ]
    if not wanted:
        raise ValueError(f"No mixer matches {pattern!r}: expected one of {', '.join(list_mixers())}.")
    found = []
    for done, (name, causality) in enumerate(wanted):
        if report:
            report(done, len(wanted), name)
        found.append(examine(name, causality=causality))
    if report:
        report(len(wanted), len(wanted), "done")
    return found


def decaying(found: Sequence[Record]) -> str | None:
    """The causal mixer that sees least far of those that read in every scan order; None where there is none."""
    causal = sorted((r for r in found if r.causality == "causal"), key=lambda r: r.radius)
    return next((record.mixer for record in causal if _reads_in_every_order(record.mixer)), None)


def _reads_in_every_order(name: str) -> bool:
    try:
        for scan in SCANS:
            build(name, causality="causal", scan=scan)
    except ValueError:  # the mixer says why, to whoever asks for that scan
        return False
    return True
