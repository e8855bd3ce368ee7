"""What a variant looks like, the same in every figure."""

from __future__ import annotations

from typing import Any

import matplotlib

matplotlib.use("Agg")

from experiments.report.records import Run, Variant

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#332288", "#999933")
GREY = "#555555"
MARKERS = {"noncausal": "o", "causal": ">", "bidirectional": "D"}
RC: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "lines.linewidth": 1.7,
    "lines.markersize": 5,
}


def line(run: Run, variant: Variant) -> dict[str, Any]:
    """Colour by variant, dashes if unnormalised, marker by causality."""
    trained = [v.name for v in run.variants if not v.untouched]
    color = GREY if variant.untouched else PALETTE[trained.index(variant.name) % len(PALETTE)]
    marker = "s" if variant.untouched else MARKERS.get(variant.causality or "", "o")
    return {"color": color, "linestyle": "--" if variant.normalize is False else "-", "marker": marker}
