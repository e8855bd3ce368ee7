"""Analyses of mixers as matrices, their figures, and the command."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from experiments.cli import app
from experiments.studies.structure import analyze_mixer, analyze_mixers
from experiments.studies.structure.figures import draw_causality_grid, draw_panels, draw_scan_orders, draw_shares
from mixers import structure
from mixers.stages.scan_orders import SCANS


def test_an_analysis_describes_the_matrix() -> None:
    mamba2 = analyze_mixer("mamba2", causality="causal")
    assert mamba2.matrix.shape == (64, 64) and structure.is_causal(mamba2.matrix)
    assert mamba2.shares[2] == 0 and sum(mamba2.shares) == pytest.approx(1)
    assert 0 < mamba2.lower_rank <= 16 and mamba2.upper_rank == 0
    softmax = analyze_mixer("softmax")
    assert softmax.lower_rank == 32 and softmax.radius > mamba2.radius


def test_figures_have_a_panel_for_each_mixer_and_causality() -> None:
    analyses = analyze_mixers("lin*n")
    names = ["linear_attention", "linfusion"]
    assert [(a.mixer, a.causality) for a in analyses[:2]] == [(names[0], "causal"), (names[0], "bidirectional")]
    painted: list[str] = []
    grid = draw_causality_grid(analyses, names, lambda panel, analysis: painted.append(analysis.mixer))
    assert len(grid.axes) == 6
    assert painted == [names[0]] * 3 + [names[1]] * 3
    panels = draw_panels(analyses, names, lambda panel, analysis, line: panel.plot([0, 1], **line), "x", "y")
    assert [len(panel.get_lines()) for panel in panels.axes] == [3, 3]
    assert len(draw_shares(analyses).axes[0].patches) == 3 * len(analyses)
    assert len(draw_scan_orders("retnet").axes) == 2 * len(SCANS)


def test_the_command_prints_a_table_and_draws_figures(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["structure", "sana*", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "sana_relu" in result.output and "scan_orders.png" in result.output
    figures = sorted(tmp_path.glob("*.png"))
    assert len(figures) == 7
    assert all(min(Image.open(path).size) > 150 for path in figures)


def test_a_pattern_without_matches_is_one_sentence(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["structure", "nothing*", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "No mixer matches 'nothing*'" in result.output and "Traceback" not in result.output


def test_a_mixer_that_refuses_a_scan_gets_the_other_figures(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["structure", "mila", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert len(list(tmp_path.glob("*.png"))) == 6 and "scan_orders" not in result.output
