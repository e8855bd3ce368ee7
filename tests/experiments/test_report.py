"""The report, on a made-up run: everything is there, the numbers are right, what is broken is said."""

import csv
import json
import math
import re
from pathlib import Path

import pyarrow.parquet
import pytest

from experiments.report import build_report, curves, heat, points
from experiments.report.curves import exponent
from experiments.report.finding import find
from experiments.report.page import as_html, as_markdown
from experiments.report.records import load_run
from experiments.report.tables import main_table
from tests.experiments.runs import SIZES, UNFINISHED, VARIANTS, edit, error, make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made-up run with its report."""
    folder = make_run(tmp_path_factory.mktemp("run"))
    assert build_report(folder) == folder / "report" / "index.html"
    return folder


def test_page_is_whole_and_self_contained(run: Path) -> None:
    page = (run / "report" / "index.html").read_text()
    text = re.sub(r"data:image/(png|webp);base64,[A-Za-z0-9+/=]+", "PICTURE", page)
    assert not re.search(r"https?:|@import|url\(|fetch\(|import\(", text)
    assert set(re.findall(r'(?:src|href)="([^"#]+)"', text)) == {"PICTURE", "data:,"}
    titles = re.findall(r"<h2[^>]*>([^<]+)", text)
    order = [
        "Claims",
        "Results",
        "Factors",
        "Error against resolution",
        "Samples",
        "Quality against cost",
    ]
    order += ["Error by site", "Error by timestep", "Mixing matrices and receptive fields", "Training curves"]
    order += ["Time and memory", "Other aspect ratios", "Pictures against true ones", "Exact configuration"]
    order += ["Environment", "Protocol"]
    assert titles == [*order, "Failed, unfinished and damaged"]
    assert text.index("Which features") < text.index('id="finding"') < text.index("<table")
    assert "FloatingPointError: the loss is not finite &lt;at step 12&gt;" in text
    assert f"{UNFINISHED}: unfinished, 39 training steps" in text
    assert "CC-BY 4.0" in text and "prefers-color-scheme: dark" in text and str(run) not in text
    assert len(page) < 4e6
    anchors = set(re.findall(r'href="#([^"]+)"', text))
    assert anchors <= set(re.findall(r'id="([^"]+)"', text))


def test_figures_and_markdown(run: Path) -> None:
    figures = {p.name for p in (run / "report" / "figures").glob("*.png")}
    lines = {"effects", "error_to_teacher", "error_ratio", "pareto", "sites", "timesteps", "training"}
    lines |= {f"cost_{what}" for what in ("time", "memory", "flops")}
    pictures = {"mixing_matrices", "receptive_fields", *(f"samples_{s}" for s in SIZES)}
    assert figures == {f"{name}.png" for name in lines | pictures}
    assert {p.stem for p in (run / "report" / "figures").glob("*.svg")} == lines
    text = (run / "report" / "report.md").read_text()
    assert set(re.findall(r"\(figures/([^)]+)\)", text)) == figures
    assert re.search(r"\| LinFusion \|.*\*\*0\.0254 ± 0\.00121\*\*", text)
    assert "| teacher | 20.0 | 20.0 | 20.0 |" in text.split("## Pictures against true ones")[1]


def page_of(folder: Path) -> str:
    """The page without its figures, which take seconds."""
    run = load_run(folder)
    return as_html(run, find(run), main_table(run), [])


def test_older_records_leave_their_parts_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    for path in folder.glob("cells/*/result.json"):
        edit(path, lambda r: [r.pop(name, None) for name in ("sites", "timesteps", "images")])
        edit(path, lambda r: [[row.pop("state_size", None) for row in r["speed"]], r.update(speed=r["speed"][:1])])
    assert "Pictures against" not in page_of(folder)
    assert not curves.cost(load_run(folder), "seconds", tmp_path / "no.png")
    assert points.pareto(load_run(folder), tmp_path / "pareto.png")
    assert not heat.sites(load_run(folder), tmp_path / "no.png") and not (tmp_path / "no.png").exists()


def test_numbers_for_other_programs(run: Path) -> None:
    with (run / "report" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    growth = {v[0]: v[-1] for v in VARIANTS}
    wide = [r for r in rows if (r["height"], r["width"]) == ("64", "128")]
    assert wide and all(r["size"] == "" and float(r["relative_error_to_teacher"]) == 77.0 for r in wide)
    cells = [r for r in rows if r["kind"] == "cell" and r["size"]]
    assert len(cells) == (16 - 2) * len(SIZES)
    for row in cells:
        expected = error(growth[row["variant"]], int(row["size"]), int(row["seed"]))
        assert float(row["relative_error_to_teacher"]) == expected
    means = {(r["variant"], r["size"]): r for r in rows if r["kind"] == "mean"}
    assert float(means["linear", "256"]["relative_error_to_teacher"]) == pytest.approx(0.02 * 1.05 * 1.2**2)
    assert {k for k, r in means.items() if r["best"] == "True"} >= {("linfusion", "128"), ("linfusion", "256")}
    parquet = pyarrow.parquet.read_table(run / "report" / "results.parquet").to_pylist()
    assert [str(r["relative_error_to_teacher"]) for r in parquet] == [r["relative_error_to_teacher"] for r in rows]
    latex = (run / "report" / "results.tex").read_text()
    body = latex.split("\\midrule")[1].split("\\bottomrule")[0].strip().splitlines()
    assert len(body) == len(VARIANTS) and len({line.count("&") for line in body}) == 1 and "\\textbf{0.0254" in latex


def test_the_best_is_marked_and_never_the_teacher(run: Path) -> None:
    page = (run / "report" / "index.html").read_text().split('id="results"')[1].split("</table>")[0]
    lines = [line for line in page.splitlines() if 'class="best"' in line]
    assert any("LinFusion</th>" in line for line in lines) and not any("untouched" in line for line in lines)


def test_finding(run: Path) -> None:
    found = find(load_run(run))
    normal, order, maps = found.verdicts
    assert not found.broken
    assert normal.state == "holds" and "256 px" in normal.sentence and " 64 px" not in normal.sentence
    assert order.state == "holds in part" and order.sentence.startswith("Undecided at 64 px")
    assert maps.state == "undecided" and "LinFusion's learned maps" in maps.told
    lead = "Normalization matters most for the error to the teacher at 256 px, 4 times the training side. "
    assert found.sentences[0].startswith(lead + "Not normalized rather than normalized: ")
    assert "Nearest to the teacher at 256 px is “LinFusion”" in found.sentences[0]
    assert any(s.startswith("LinFusion rather than linear attention: ") for s in found.sentences[1:])
    assert "chance alone does once in 2" in found.judged
    assert "fewer than three" in found.warnings[0]


def test_a_finding_that_does_not_hold(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    for path in folder.glob("cells/*_raw-*/result.json"):
        edit(path, lambda r: [f.update(relative_error_to_teacher=0.001) for f in r["fidelity"]])
    assert find(load_run(folder)).verdicts[0].state == "the reverse holds"


def test_the_reference_is_the_grids_else_the_first_that_is_finished(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    reference = load_run(folder).reference
    assert reference is not None and reference.name == "linear"
    edit(folder / "grid.json", lambda g: g.pop("reference"))
    for path in folder.glob("cells/linfusion-*/result.json"):
        path.unlink()
    reference = load_run(folder).reference
    assert reference is not None and reference.name == "linear", "linfusion, before it, has no finished cell"


def test_one_seed_decides_nothing(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    edit(folder / "grid.json", lambda g: g.update(seeds=[0]))
    found = find(load_run(folder))
    assert {v.state for v in found.verdicts} == {"one seed tells nothing of chance"}
    assert not any(e.marked for e in found.effects)


def test_broken_sanity_row_is_said_loudly(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    edit(folder / "cells/softmax-s1-x/result.json", lambda r: r["fidelity"][1].update(error_to_teacher=1e-12))
    run, page = load_run(folder), page_of(folder)
    assert "THE MEASUREMENT IS BROKEN" in page and "1e-12 at 128 px (seed 1)" in page
    assert "THE MEASUREMENT IS BROKEN" in as_markdown(run, find(run), main_table(run), [])
    assert find(load_run(folder)).verdicts == []


def test_damage_is_reported_not_fatal(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    cells = folder / "cells"
    (cells / "linear-s0-x/result.json").write_text('{"variant": "lin')
    (cells / "linfusion-s0-x/arrays.safetensors").write_bytes(b"no")
    (cells / "linfusion-s0-x/samples/64/0.png").write_bytes(b"no")
    with (cells / "linfusion-s1-x/metrics.jsonl").open("a") as file:
        file.write('{"step": 10')
    (cells / "linear-s1-x/config.json").write_text("[]")
    edit(cells / "linear_raw-s0-x/result.json", lambda r: r["fidelity"][2].update(error_ratio=math.nan))
    (cells / "stranger-s0-x").mkdir()
    page = build_report(folder).read_text()
    for text in (
        "result.json is damaged",
        "arrays.safetensors cannot be read",
        "1 damaged line skipped",
        "config.json is damaged",
    ):
        assert text in page
    assert "not finite" in page and "no variant &#39;stranger&#39;" in page


@pytest.mark.parametrize(
    "damage", [{"sizes": ["a"]}, {"sizes": 3}, {"seeds": ["0"]}, {"variants": {"a": 1}}, {"train_size": "64"}]
)
def test_a_damaged_grid_is_one_sentence(damage: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "grid.json").write_text(json.dumps({"name": "x", "question": "?", "variants": [], **damage}))
    with pytest.raises(ValueError, match=r"not a readable grid \("):
        load_run(tmp_path)


@pytest.mark.parametrize("kind", ["sites", "timesteps", "images"])
def test_a_row_without_its_parts_damages_its_cell_alone(kind: str, tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    edit(folder / "cells/linear-s0-x/result.json", lambda r: r.update({kind: [{}]}))
    run = load_run(folder)
    assert [c.id for c in run.cells if c.status == "damaged"] == ["linear-s0-x"]


def test_cells_of_an_earlier_grid_are_left_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    edit(folder / "cells/linear-s0-x/config.json", lambda c: c.update(distillation={"steps": 7}))
    run = load_run(folder)
    assert [c.seed for c in run.done("linear")] == [1]
    assert any("its distillation differ" in p for p in run.problems)


def test_empty_runs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"grid\.json"):
        build_report(tmp_path)
    (tmp_path / "grid.json").write_text('{"name": "empty", "question": "?", "variants": []}')
    assert "nothing can be said yet" in build_report(tmp_path).read_text()


def test_growth_exponent() -> None:
    assert exponent([(t, 3e-6 * t**2) for t in (64, 256, 1024)]) == pytest.approx(2)
    assert exponent([(64, 1.0)]) is None
