"""Records of mixers as matrices, their figures, and the command."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from experiments.cli import app
from experiments.studies.structure import examine, records
from experiments.studies.structure.figures import gallery, multiples, scans, shares
from mixers import structure
from mixers.stages.scan_orders import SCANS


def test_a_record_tells_what_the_matrix_has() -> None:
    record = examine("mamba2", causality="causal")
    assert record.matrix.shape == (64, 64) and structure.is_causal(record.matrix)
    assert record.shares[2] == 0 and sum(record.shares) == pytest.approx(1)
    assert 0 < record.lower <= 16 and record.upper == 0
    softmax = examine("softmax")
    assert softmax.lower == 32 and softmax.radius > record.radius


def test_figures_have_a_panel_for_each_thing_they_show() -> None:
    found = records("lin*n")
    names = ["linear_attention", "linfusion"]
    assert [(r.mixer, r.causality) for r in found[:2]] == [(names[0], "causal"), (names[0], "bidirectional")]
    painted: list[str] = []
    assert len(gallery(found, names, lambda panel, record: painted.append(record.mixer)).axes) == 6
    assert painted == [names[0]] * 3 + [names[1]] * 3
    drawn = multiples(found, names, lambda panel, record, look: panel.plot([0, 1], **look), "x", "y")
    assert [len(panel.get_lines()) for panel in drawn.axes] == [3, 3]
    assert len(shares(found).axes[0].patches) == 3 * len(found)
    assert len(scans("retnet").axes) == 2 * len(SCANS)


def test_the_command_prints_a_table_and_draws(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["structure", "sana*", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "sana_relu" in done.output and "scan_orders.png" in done.output
    pictures = sorted(tmp_path.glob("*.png"))
    assert len(pictures) == 7
    assert all(min(Image.open(path).size) > 150 for path in pictures)


def test_a_pattern_that_matches_nothing_is_one_sentence(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["structure", "nothing*", "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert "No mixer matches 'nothing*'" in done.output and "Traceback" not in done.output


def test_a_mixer_that_refuses_a_scan_gets_the_other_figures(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["structure", "mila", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert len(list(tmp_path.glob("*.png"))) == 6 and "scan_orders" not in done.output
