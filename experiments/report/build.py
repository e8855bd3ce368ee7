"""THE flow of a report: files -> records -> effects, tables, figures, finding -> page."""

from __future__ import annotations

from pathlib import Path

from experiments.report import page
from experiments.report.export import write_numbers
from experiments.report.figures import draw_all
from experiments.report.finding import find
from experiments.report.records import load_run
from experiments.report.tables import main_table


def build_report(run_dir: Path) -> Path:
    """Build `run_dir/report/`; returns the path of its page.

    index.html (self-contained), report.md, results.csv, .parquet and .tex, figures/*.png and *.svg. Everything is read
    from the run's files, finished or not, so a report can be built again at any time.

    Raises:
        ValueError: `run_dir/grid.json` is missing or damaged.
    """
    run = load_run(Path(run_dir))
    out = Path(run_dir) / "report"
    out.mkdir(parents=True, exist_ok=True)
    finding, table = find(run), main_table(run)
    write_numbers(run, table, out)
    figures = draw_all(run, finding.effects, out / "figures")
    (out / "report.md").write_text(page.as_markdown(run, finding, table, figures), encoding="utf-8")
    index = out / "index.html"
    index.write_text(page.as_html(run, finding, table, figures), encoding="utf-8")
    return index
