"""The report, on a made-up run: everything is there, the numbers are right, what is broken is said."""

import csv
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from experiments.report import build_report
from experiments.report.figures import exponent
from experiments.report.finding import find
from experiments.report.records import load_run

SIZES = (64, 128, 256)
PROMPTS = ["red apple, teal background", "blue heart, yellow background", "full moon, black background", "cat face"]
VARIANTS = [  # name, label, mixer, causality, normalize, growth of the error per doubling
    ("softmax", "softmax, untouched", "softmax", "noncausal", True, 0.0),
    ("linfusion", "LinFusion", "linfusion", "noncausal", True, 1.1),
    ("linear", "linear attention", "linear_attention", "noncausal", True, 1.2),
    ("linear_raw", "linear attention, not normalised", "linear_attention", "noncausal", False, 4.0),
    ("linfusion_raw", "LinFusion, not normalised", "linfusion", "noncausal", False, 5.0),
    ("linear_causal", "linear attention, causal", "linear_attention", "causal", True, 1.4),
    ("linear_causal_raw", "linear attention, causal, not normalised", "linear_attention", "causal", False, 6.0),
    ("mamba2", "Mamba-2, bidirectional", "mamba2", "bidirectional", False, 2.0),
]
FAILED, UNFINISHED = "mamba2-s1-x", "linear_causal_raw-s1-x"


def error(growth: float, size: int, seed: int) -> float:
    """The made-up error to the teacher."""
    return growth and 0.02 * (1 + 0.1 * seed) * growth ** math.log2(size / 64)


def picture(path: Path, size: int, k: int, noise: float) -> None:
    """A disc on a plain background, the noisier the worse the mixer."""
    y, x = np.mgrid[:size, :size] / size - 0.5
    colours = np.array([[200, 60, 60], [60, 90, 200], [230, 210, 90], [240, 160, 60]])
    image = np.where((x**2 + y**2 < 0.12)[..., None], colours[k % 4], 255 - colours[k % 4] // 2).astype(float)
    image += np.random.default_rng(k).normal(0, 255 * noise, image.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(path)


def matrix(causality: str, normalize: bool, softmax: bool) -> np.ndarray:
    """Weights that fall off with distance on an 8 × 8 grid."""
    y, x = np.divmod(np.arange(64), 8)
    apart = (y[:, None] - y) ** 2 + (x[:, None] - x) ** 2
    weights = np.exp(-apart / (4 if softmax else 16)) + np.random.default_rng(0).random((64, 64)) * 0.1
    weights = np.tril(weights) if causality == "causal" else weights
    return (weights / weights.sum(1, keepdims=True) if normalize else weights).astype(np.float32)


def write_cell(run: Path, place: int, seed: int) -> None:
    """One cell's folder, as the grid runner leaves it."""
    name, _, mixer, causality, normalize, growth = VARIANTS[place]
    cell = f"{name}-s{seed}-x"
    folder = run / "cells" / cell
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(
        json.dumps({"variant": {"name": name, "mixer": mixer}, "seed": seed, "lr": 1e-3})
    )
    steps = range(0 if growth else 100, 40 if cell == UNFINISHED else 100)
    lines = [
        {"step": s, "loss": (0.1 + 0.02 * place) + math.exp(-s / 20), "noise": 0.1, "output": 0.1, "features": 0.1}
        for s in steps
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    result = {"cell": cell, "variant": name, "seed": seed, "status": "done", "error": None}
    result |= {
        "trained_parameters": 1000 * place,
        "train_seconds": 12.5 + place,
        "steps": 100,
        "fidelity": [],
        "speed": [],
    }
    if cell == UNFINISHED:
        return
    if cell == FAILED:
        result |= {"status": "failed", "error": "FloatingPointError: the loss is not finite <at step 12>"}
        (folder / "result.json").write_text(json.dumps(result))
        return
    for size in SIZES:
        value = error(growth, size, seed)
        row = {"size": size, "error_to_teacher": value * 0.9, "relative_error_to_teacher": value}
        result["fidelity"].append(
            row | {"error_to_truth": 0.1 + value, "teacher_error_to_truth": 0.1, "error_ratio": 1 + value * 10}
        )
        for k in range(len(PROMPTS)):
            picture(folder / "samples" / str(size) / f"{k}.png", size, k, min(0.5, value))
    for size in (*SIZES, 512):
        tokens = (size // 8) ** 2
        cost = 0.004 + 1e-6 * tokens * (1 + place / 4) + (0 if growth else 2e-8 * tokens**2)
        peak = int(1e6 + 4e3 * tokens * (1 + place / 4) + (0 if growth else 4 * tokens**2))
        result["speed"].append({"size": size, "tokens": tokens, "seconds": cost, "spread": 0.0001, "peak_bytes": peak})
    save_file({"mixing_matrix": matrix(causality, normalize, not growth)}, folder / "arrays.safetensors")
    (folder / "result.json").write_text(json.dumps(result))


def make_run(run: Path) -> Path:
    """Eight variants × two seeds; one cell failed, one unfinished."""
    names = ("name", "label", "mixer", "causality", "normalize")
    grid = {"name": "demo", "question": "Which features of a linear mixer matter for images?", "teacher": "embedded"}
    grid |= {
        "data": "emoji",
        "train_size": 64,
        "sizes": SIZES,
        "sample_sizes": SIZES,
        "seeds": [0, 1],
        "prompts": PROMPTS,
    }
    grid |= {
        "reference": "teacher",
        "variants": [dict(zip(names, v, strict=False)) | {"trained": v[-1] > 0} for v in VARIANTS],
        "notes": ["A made-up run."],
    }
    grid |= {
        "protocol": {"distillation": {"steps": 100}, "evaluation": {"images": 8}},
        "environment": {"torch": "2", "device": "CPU"},
    }
    run.mkdir(parents=True, exist_ok=True)
    (run / "grid.json").write_text(json.dumps(grid))
    for place in range(len(VARIANTS)):
        for seed in (0, 1):
            write_cell(run, place, seed)
    for size in SIZES:
        for k in range(len(PROMPTS)):
            picture(run / "teacher" / "samples" / str(size) / f"{k}.png", size, k, 0)
    return run


def edit(path: Path, change) -> None:
    """Change a JSON file in place."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made-up run with its report."""
    folder = make_run(tmp_path_factory.mktemp("run"))
    assert build_report(folder) == folder / "report" / "index.html"
    return folder


def test_page_is_whole_and_self_contained(run: Path) -> None:
    page = (run / "report" / "index.html").read_text()
    text = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "PICTURE", page)
    assert not re.search(r"https?:|<script|@import|url\(", text)
    assert set(re.findall(r'(?:src|href)="([^"]+)"', text)) == {"PICTURE", "data:,"}
    titles = re.findall(r"<h2[^>]*>([^<]+)", text)
    order = ["Results", "Error against resolution", "Samples", "Mixing matrices", "Training curves", "Time and memory"]
    assert titles == [*order, "Exact configuration", "Environment", "Protocol", "Failed, unfinished and damaged"]
    assert text.index("Which features") < text.index('id="finding"') < text.index("<table")
    assert "FloatingPointError: the loss is not finite &lt;at step 12&gt;" in text
    assert f"{UNFINISHED}: unfinished, 39 training steps" in text
    assert text.count("CC-BY 4.0") == 4
    assert "prefers-color-scheme: dark" in text and str(run) not in text


def test_figures_and_markdown(run: Path) -> None:
    figures = {p.name for p in (run / "report" / "figures").glob("*.png")}
    samples = {f"samples_{s}.png" for s in SIZES}
    assert (
        figures
        == {"error_to_teacher.png", "error_ratio.png", "mixing_matrices.png", "training.png", "cost.png"} | samples
    )
    text = (run / "report" / "report.md").read_text()
    assert set(re.findall(r"\(figures/([^)]+)\)", text)) == figures
    assert re.search(r"\| LinFusion \|.*\*\*0\.0254 ± 0\.00121\*\*", text)


def test_csv_and_best(run: Path) -> None:
    with (run / "report" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    growth = {v[0]: v[-1] for v in VARIANTS}
    cells = [r for r in rows if r["kind"] == "cell"]
    assert len(cells) == (16 - 2) * len(SIZES)
    for row in cells:
        assert float(row["relative_error_to_teacher"]) == error(
            growth[row["variant"]], int(row["size"]), int(row["seed"])
        )
    means = {(r["variant"], r["size"]): r for r in rows if r["kind"] == "mean"}
    assert float(means["linear", "256"]["relative_error_to_teacher"]) == pytest.approx(0.02 * 1.05 * 1.2**2)
    assert {k for k, r in means.items() if r["best"]} >= {("linfusion", "128"), ("linfusion", "256")}
    page = (run / "report" / "index.html").read_text()
    lines = [line for line in page.splitlines() if 'class="best"' in line and "<tr>" in line]
    assert any("LinFusion</th>" in line for line in lines) and not any("untouched" in line for line in lines)


def test_finding(run: Path) -> None:
    found = find(load_run(run))
    assert found.verdict == "shows" and not found.broken
    expected = math.sqrt((4**2 * 5**2) / (1.1**2 * 1.2**2))
    assert found.ratios["unnormalised / normalised, non-causal"] == pytest.approx(expected)
    assert found.ratios["causal / non-causal, normalised"] == pytest.approx(1.4**2 / math.sqrt(1.1**2 * 1.2**2))
    assert "fewer than three" in found.warnings[0]


def test_finding_that_does_not_show(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    for path in folder.glob("cells/*_raw-*/result.json"):
        edit(path, lambda r: [f.update(relative_error_to_teacher=0.02) for f in r["fidelity"]])
    found = find(load_run(folder))
    assert found.verdict == "does not show" and "does not show" in found.sentences[0]


def test_broken_sanity_row_is_said_loudly(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    edit(folder / "cells/softmax-s1-x/result.json", lambda r: r["fidelity"][1].update(error_to_teacher=1e-12))
    page = build_report(folder).read_text()
    assert "THE MEASUREMENT IS BROKEN" in page and "1e-12 at 128 px (seed 1)" in page
    assert "THE MEASUREMENT IS BROKEN" in (folder / "report/report.md").read_text()
    assert find(load_run(folder)).verdict == "cannot be judged"


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
    assert "cannot be judged" in build_report(tmp_path).read_text()


def test_growth_exponent() -> None:
    assert exponent([(t, 3e-6 * t**2) for t in (64, 256, 1024)]) == pytest.approx(2)
    assert exponent([(64, 1.0)]) is None
