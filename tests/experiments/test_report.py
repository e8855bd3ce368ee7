"""The report, on a made-up run: it is complete, its numbers are right, and it says what is broken."""

import csv
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from experiments.config import DistillationConfig, FitConfig
from experiments.metrics import HeatMap, LinePlot, metric_class
from experiments.report import build_report
from experiments.report.conclusions import draw_conclusions
from experiments.report.effect_plots import plot_pareto
from experiments.report.figures import _image_figures
from experiments.report.heat_maps import plot_heat_map
from experiments.report.line_plots import growth_exponent, plot_metric
from experiments.report.overview import overview_rows, read_sample
from experiments.report.page import as_html, as_markdown
from experiments.report.run_files import load_run
from experiments.report.style import background_rows, group_variants
from experiments.report.tables import main_table
from tests.experiments.runs import SIZES, UNFINISHED, VARIANTS, edit, error, make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made-up run with its report."""
    folder = make_run(tmp_path_factory.mktemp("run"))
    assert build_report(folder) == folder / "report" / "index.html"
    return folder


def test_the_page_is_complete_and_self_contained(run: Path) -> None:
    page = (run / "report" / "index.html").read_text()
    text = re.sub(r"data:image/(png|webp);base64,[A-Za-z0-9+/=]+", "IMAGE", page)
    assert not re.search(r"https?:|@import|url\(|fetch\(|import\(", text)
    assert set(re.findall(r'(?:src|href)="([^"#]+)"', text)) == {"IMAGE", "data:,"}
    titles = re.findall(r"<h2[^>]*>([^<]+)", text)
    order = ["Claims", "Results", "Controls", "Held-out and held-in images", "Other aspect ratios", "Factors"]
    order += ["Error against resolution", "Samples", "Quality against cost", "Error by site", "Error by timestep"]
    order += ["Fréchet distance", "Text-image score", "Time and memory", "Mixing matrices and receptive fields"]
    order += ["Training curves", "Exact configuration", "Environment", "Protocol"]
    assert titles == [*order, "Failed, unfinished and damaged"]
    assert text.index("Which features") < text.index('id="conclusions"') < text.index("<table")
    assert "FloatingPointError: the loss is not finite &lt;at step 12&gt;" in text
    assert f"{UNFINISHED}: unfinished, 39 training steps" in text
    assert "CC-BY 4.0" in text and "prefers-color-scheme: dark" in text and str(run) not in text
    assert len(page) < 4e6
    anchors = set(re.findall(r'href="#([^"]+)"', text))
    assert anchors <= set(re.findall(r'id="([^"]+)"', text))


def test_figures_and_markdown(run: Path) -> None:
    figures = {p.name for p in (run / "report" / "figures").glob("*.png")}
    lines = {"effects", "pareto", "training", "sites_relative_error", "timesteps_relative_error_to_teacher"}
    lines |= {"fidelity_relative_error_to_teacher", "fidelity_error_ratio"}
    lines |= {f"cost_{quantity}" for quantity in ("seconds", "peak_bytes", "flops")}
    images = {"overview", "mixing_matrices", "receptive_fields", *(f"samples_{s}" for s in SIZES)}
    assert figures == {f"{name}.png" for name in lines | images}
    assert {p.stem for p in (run / "report" / "figures").glob("*.svg")} == lines
    text = (run / "report" / "report.md").read_text()
    assert set(re.findall(r"\(figures/([^)]+)\)", text)) == figures
    assert re.search(r"\| LinFusion \|.*\*\*0\.0254 ± 0\.00121\*\*", text)
    distances = text.split("## Fréchet distance")[1]
    assert "| teacher | 20.0 |" in distances and "| other true images | 3.00 |" in distances
    assert "| identity: no mixing | 1.00 [1.00, 1.00] |" in text.split("## Controls")[1]


def test_the_overview_shows_what_normalization_and_causality_do(run: Path) -> None:
    """The reference, its rows that differ in one switch, the best mixer, and the row that mixes nothing; best first."""
    names = [row.name for row in overview_rows(load_run(run))]
    assert names == ["linfusion", "linear", "linear_causal", "identity", "linear_raw"]


def test_the_overview_shows_the_last_prompt(run: Path) -> None:
    record = load_run(run)
    folder = run / "teacher"
    numbers = range(len(record.description.prompts))
    images = [np.asarray(Image.open(folder / "samples" / str(SIZES[0]) / f"{k}.png").convert("RGB")) for k in numbers]
    sample = read_sample(record, folder, SIZES[0])
    assert len(images) > 1 and [bool((sample == image).all()) for image in images] == [
        k == numbers[-1] for k in numbers
    ]
    assert f"“{record.description.prompts[-1]}”" in (run / "report" / "report.md").read_text()


def test_controls_are_behind_every_panel(run: Path) -> None:
    record = load_run(run)
    panels = group_variants(record)
    assert len(panels) == 1 and background_rows(record) == [], "few rows are in one panel"
    rows = list(record.variants)
    more = [v.model_copy(update={"name": f"{v.name}{k}", "label": f"{v.label} {k}"}) for k in range(3) for v in rows]
    many = replace(record, description=record.description.model_copy(update={"variants": tuple(more)}))
    controls = [variant.name for variant in many.trained if variant.control is not None]
    assert len(group_variants(many)) > 1 and controls
    assert [variant.name for variant in background_rows(many)] == controls
    assert not {variant.name for _, variants in group_variants(many) for variant in variants} & set(controls)


def page_of(folder: Path) -> str:
    """The page without its figures, which take seconds."""
    run = load_run(folder)
    return as_html(run, draw_conclusions(run), main_table(run), [])


def test_metrics_that_were_not_measured_have_no_section(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    missing = ("sites", "timesteps", "frechet_distance", "text_image_score")

    def change(result: dict) -> None:
        metrics = result.get("measurements", {}).get("metrics", {})
        for name in missing:
            metrics.pop(name, None)
        if metrics:
            metrics["cost"] = [{**metrics["cost"][0], "state_size": None}]

    for path in folder.glob("cells/*/result.json"):
        edit(path, change)
    assert "Fréchet" not in page_of(folder)
    run = load_run(folder)
    cost = metric_class("cost")
    sites = metric_class("sites")
    line, *_ = cost.figures
    (heat_map,) = sites.figures
    assert isinstance(line, LinePlot) and isinstance(heat_map, HeatMap)
    assert not plot_metric(run, cost, line, tmp_path / "no.png"), "one size does not show growth"
    assert plot_pareto(run, tmp_path / "pareto.png")
    assert not plot_heat_map(run, sites, heat_map, tmp_path / "no.png") and not (tmp_path / "no.png").exists()


def test_numbers_for_other_programs(run: Path) -> None:
    with (run / "report" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    growth = {v[0]: v[-1] for v in VARIANTS}
    wide = [r for r in rows if (r["height"], r["width"]) == ("64", "128")]
    assert wide and all(float(r["relative_error_to_teacher"]) == 77.0 for r in wide)
    assert {r["metric"] for r in rows} == {
        *("fidelity", "sites", "timesteps", "frechet_distance", "text_image_score", "cost")
    }
    cells = [r for r in rows if r["kind"] == "cell" and r["metric"] == "fidelity" and r["split"] == "held_out"]
    cells = [r for r in cells if r["height"] == r["width"]]
    assert len(cells) == (18 - 2) * len(SIZES)
    for row in cells:
        expected = error(growth[row["variant"]], int(row["size"]), int(row["seed"]))
        assert float(row["relative_error_to_teacher"]) == expected
    means = {(r["variant"], r["size"]): r for r in rows if r["kind"] == "mean"}
    assert float(means["linear", "256"]["relative_error_to_teacher"]) == pytest.approx(0.02 * 1.05 * 1.2**2)
    assert {k for k, r in means.items() if r["best"] == "True"} >= {("linfusion", "128"), ("linfusion", "256")}
    parquet = pyarrow.parquet.read_table(run / "report" / "results.parquet").to_pylist()
    written = [r["relative_error_to_teacher"] for r in rows]
    assert [
        "" if r["relative_error_to_teacher"] is None else str(r["relative_error_to_teacher"]) for r in parquet
    ] == written
    latex = (run / "report" / "results.tex").read_text()
    body = latex.split("\\midrule")[1].split("\\bottomrule")[0].strip().splitlines()
    assert len(body) == len(VARIANTS) and len({line.count("&") for line in body}) == 1 and "\\textbf{0.0254" in latex


def test_the_best_is_marked_and_never_the_teacher(run: Path) -> None:
    page = (run / "report" / "index.html").read_text().split('id="results"')[1].split("</table>")[0]
    lines = [line for line in page.splitlines() if 'class="best"' in line]
    assert any("LinFusion</th>" in line for line in lines) and not any("untouched" in line for line in lines)


def test_conclusions(run: Path) -> None:
    conclusions = draw_conclusions(load_run(run))
    normalization, order, maps = conclusions.verdicts
    assert not conclusions.broken
    assert "undecided" in normalization.state, "one cell of a pair is unfinished, so that all pairs share one seed"
    assert "256 px" in normalization.evidence and " 64 px" not in normalization.evidence
    assert order.state == "holds in part" and "ndecided at 64 px" in order.evidence
    assert "ncomplete at 64 px, unnormalized rows" in order.evidence
    assert "LinFusion's learned maps" in maps.statement
    assert (
        "matters most for the error to the teacher at 256 px, 4 times the training side. " in conclusions.sentences[0]
    )
    assert "Closest to the teacher at 256 px is “LinFusion”" in conclusions.sentences[0]
    assert any(
        s.startswith("LinFusion rather than linear attention among normalized rows: ") for s in conclusions.sentences
    )
    assert "Holm's correction" in conclusions.method
    assert "fewer than three" in conclusions.warnings[0]


def test_a_claim_whose_reverse_holds(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    for path in folder.glob("cells/*_raw-*/result.json"):
        edit(path, lambda r: [_scale(row, 0.001) for row in _fidelity(r)])
    normalization = draw_conclusions(load_run(folder)).verdicts[0]
    assert normalization.state.startswith("undecided"), "all pairs share one seed"
    edit(folder / "grid.json", lambda g: g.update(variants=[v for v in g["variants"] if "causal" not in v["name"]]))
    assert draw_conclusions(load_run(folder)).verdicts[0].state == "the reverse holds"


def _fidelity(result: dict) -> list[dict]:
    return result.get("measurements", {}).get("metrics", {}).get("fidelity", [])


def _scale(row: dict, factor: float) -> None:
    row["relative_error_to_teacher"] *= factor


def test_the_reference_is_the_grids_else_the_first_that_is_finished(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    reference = load_run(folder).reference
    assert reference is not None and reference.name == "linear"
    edit(folder / "grid.json", lambda g: g.pop("reference"))
    for path in folder.glob("cells/linfusion-*/result.json"):
        path.unlink()
    reference = load_run(folder).reference
    assert reference is not None and reference.name == "linear", "linfusion, before it, has no finished cell"


def test_a_single_seed_decides_nothing(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    edit(folder / "grid.json", lambda g: g.update(seeds=[0]))
    conclusions = draw_conclusions(load_run(folder))
    assert {v.state for v in conclusions.verdicts} == {"undecided: one seed gives no interval"}
    assert not any(e.significant for e in conclusions.effects)
    assert "A single seed gives no interval" in conclusions.method


def test_a_broken_sanity_row_is_reported_first(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    edit(folder / "cells/softmax-s1-x/result.json", lambda r: _fidelity(r)[1].update(error_to_teacher=1e-12))
    run = load_run(folder)
    page = page_of(folder)
    assert "THE MEASUREMENT IS BROKEN" in page and "1e-12 at 128 px (seed 1)" in page
    conclusions = draw_conclusions(run)
    assert "THE MEASUREMENT IS BROKEN" in as_markdown(run, conclusions, main_table(run), [])
    assert conclusions.verdicts == []


def test_damaged_files_are_reported(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    cells = folder / "cells"
    (cells / "linear-s0-x/result.json").write_text('{"variant": "lin')
    (cells / "linfusion-s0-x/arrays.safetensors").write_bytes(b"no")
    (cells / "linfusion-s0-x/samples/64/0.png").write_bytes(b"no")
    with (cells / "linfusion-s1-x/metrics.jsonl").open("a") as file:
        file.write('{"step": 10')
    (cells / "linear-s1-x/config.json").write_text("[]")
    edit(cells / "linear_raw-s0-x/result.json", lambda r: _fidelity(r)[2].update(error_ratio=math.nan))
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
    "damage", [{"sizes": ["a"]}, {"sizes": 3}, {"seeds": ["a"]}, {"variants": {"a": 1}}, {"train_size": "large"}]
)
def test_a_damaged_grid_is_one_sentence(damage: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "grid.json").write_text(json.dumps({"name": "x", "question": "?", "variants": [], **damage}))
    with pytest.raises(ValueError, match=r"not a readable grid \("):
        load_run(tmp_path)


@pytest.mark.parametrize("metric", ["sites", "timesteps", "frechet_distance"])
def test_a_row_without_its_fields_damages_its_cell_alone(metric: str, tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    edit(folder / "cells/linear-s0-x/result.json", lambda r: r["measurements"]["metrics"].update({metric: [{}]}))
    run = load_run(folder)
    assert [c.id for c in run.cells if c.state == "damaged"] == ["linear-s0-x"]


def test_rows_of_a_metric_that_is_not_registered_are_named(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    path = folder / "cells/linear-s0-x/result.json"
    edit(path, lambda r: r["measurements"]["metrics"].update(sharpness=[{"size": 64, "sharpness": 1.0}]))
    run = load_run(folder)
    assert [c.seed for c in run.done("linear")] == [0, 1]
    assert any("'sharpness' are not reported" in problem and "--plugin" in problem for problem in run.problems)


@pytest.mark.parametrize("sizes", [(), (64, 64, 64, 128)])
def test_sizes_that_students_were_distilled_at_are_called_that(sizes: tuple[int, ...], tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    plan = DistillationConfig(fit=FitConfig(steps=3, batch_size=2, learning_rate=1e-3), image_size=64, sizes=sizes)
    edit(folder / "grid.json", lambda g: g.update(protocol={"distillation": plan.model_dump(mode="json")}))
    text = page_of(folder)
    assert f"not distilled at sizes other than {'64 and 128 px' if sizes else '64 px'}" in text
    run = load_run(folder)
    captions = {plan.name: plan.caption for plan in _image_figures(run) if plan.name.startswith("samples_")}
    distilled = {64, *sizes}
    for size in SIZES:
        assert ("not distilled at" in captions[f"samples_{size}"]) is (size not in distilled)
    claim = draw_conclusions(run).verdicts[0]
    assert run.description.claims[0].beyond and ("128 px" in claim.evidence) is (128 not in distilled)


def test_empty_runs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"grid\.json"):
        build_report(tmp_path)
    (tmp_path / "grid.json").write_text('{"name": "empty", "question": "?", "variants": []}')
    assert "there is no conclusion yet" in build_report(tmp_path).read_text()


def test_growth_exponent() -> None:
    assert growth_exponent([(t, 3e-6 * t**2) for t in (64, 256, 1024)]) == pytest.approx(2)
    assert growth_exponent([(64, 1.0)]) is None
