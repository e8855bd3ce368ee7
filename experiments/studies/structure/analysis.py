"""The properties of a mixer's mixing matrix on one small image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.core.progress import ProgressCallback, ignore_progress
from mixers import TokenMixer, create_mixer, list_mixers, registry, structure
from mixers.stages.scan_orders import SCANS
from mixers.traits import CAUSALITIES, Causality

DIM = 32
HEADS = 2
GRID = (8, 8)


@dataclass(frozen=True)
class MatrixAnalysis:
    """The mixing matrix of a mixer's first head, and of its first value channel if each channel has its own matrix.

    Attributes:
        mixer: name of the mixer.
        causality: of the mixer.
        normalize: whether its rows are normalized.
        grid: (height, width) of the image in tokens.
        matrix: (l, l), tokens in raster order.
        rank: numerical rank.
        lower_rank: semiseparable rank below the diagonal.
        upper_rank: semiseparable rank above the diagonal.
        shares: of the sum of |W| that lies before, on and after the diagonal.
        radius: mean distance at which tokens see, in tokens of the grid.
    """

    mixer: str
    causality: Causality
    normalize: bool
    grid: tuple[int, int]
    matrix: Tensor
    rank: int
    lower_rank: int
    upper_rank: int
    shares: tuple[float, float, float]
    radius: float


def random_image(dim: int, grid: tuple[int, int], seed: int = 0) -> Tensor:
    """Return a smooth random image as tokens (1, l, d) in float64; neighboring tokens are similar, as in images."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, dim, 4, 4, generator=generator, dtype=torch.float64)
    return 1.5 * F.interpolate(coarse, grid, mode="bicubic", align_corners=True).flatten(2).transpose(1, 2)


def build_perturbed_mixer(name: str, **options: Any) -> TokenMixer:
    """Build a mixer in its drop-in form, in float64, with noise added to every parameter.

    The noise makes parameters that start at zero take part.
    """
    torch.manual_seed(0)
    settings = {**registry.get_mixer_entry(name).mixer.drop_in_options, **options}
    mixer = create_mixer(name, DIM, HEADS, **settings).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return mixer


@torch.no_grad()
def analyze_mixer(name: str, grid: tuple[int, int] = GRID, **options: Any) -> MatrixAnalysis:
    """Analyze the mixing matrix of one mixer.

    Args:
        name: registered name.
        grid: (height, width) of the image in tokens.
        **options: of `create_mixer`.

    Cost: O(l⁴) time for the semiseparable ranks.
    """
    mixer = build_perturbed_mixer(name, **options)
    matrix = structure.mixing_matrix(mixer, random_image(DIM, grid), grid=grid)[0, 0]
    matrix = matrix if matrix.ndim == 2 else matrix[0]
    lower_rank, upper_rank = structure.semiseparable_rank(matrix)
    before, diagonal, after = structure.triangularity(matrix)
    return MatrixAnalysis(
        mixer=name,
        causality=mixer.traits.causality,
        normalize=mixer.config.normalize,
        grid=grid,
        matrix=matrix,
        rank=int(structure.numerical_rank(matrix)),
        lower_rank=int(lower_rank),
        upper_rank=int(upper_rank),
        shares=(float(before), float(diagonal), float(after)),
        radius=float(structure.effective_radius(matrix, grid).mean()),
    )


def analyze_mixers(pattern: str = "*", progress: ProgressCallback = ignore_progress) -> list[MatrixAnalysis]:
    """Analyze every causality that each matching mixer offers.

    Args:
        pattern: wildcard pattern of registered names.
        progress: called before every analysis.

    Raises:
        ValueError: no mixer matches.
    """
    cases = [
        (name, causality)
        for name in list_mixers(pattern)
        for causality in CAUSALITIES
        if causality in registry.get_mixer_entry(name).causalities
    ]
    if not cases:
        raise ValueError(f"No mixer matches {pattern!r}: expected one of {', '.join(list_mixers())}.")
    analyses = []
    for number, (name, causality) in enumerate(cases):
        progress(name, number, len(cases))
        analyses.append(analyze_mixer(name, causality=causality))
    progress("analyzed", len(cases), len(cases))
    return analyses


def choose_scan_mixer(analyses: Sequence[MatrixAnalysis]) -> str | None:
    """Choose the mixer that shows the scan orders best.

    Returns:
        Of the causal mixers that support every scan order, the one with the smallest radius, because its decay makes
        the order visible; None if there is none.
    """
    causal = sorted((a for a in analyses if a.causality == "causal"), key=lambda a: a.radius)
    return next((a.mixer for a in causal if _supports_all_scans(a.mixer)), None)


def _supports_all_scans(name: str) -> bool:
    try:
        for scan in SCANS:
            build_perturbed_mixer(name, causality="causal", scan=scan)
    except ValueError:  # the mixer explains the refusal to whoever asks for that scan
        return False
    return True
