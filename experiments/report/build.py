"""THE flow of a report: files -> records -> tables, figures, finding -> page."""

from __future__ import annotations

from pathlib import Path

from experiments.report import page
from experiments.report.figures import draw_all
from experiments.report.finding import find
from experiments.report.records import load_run
from experiments.report.tables import markdown, write_tables


def build_report(run_dir: Path) -> Path:
    """Build `run_dir/report/`: index.html, report.md, results.csv, figures/*.png; returns the page's path.

    Everything is read from the run's files, finished or not, so a report can be built again at any time.

    Raises:
        ValueError: `run_dir/grid.json` is missing or damaged.
    """
    run = load_run(Path(run_dir))
    out = Path(run_dir) / "report"
    out.mkdir(parents=True, exist_ok=True)
    finding = find(run)
    table = write_tables(run, out)
    figures = draw_all(run, out / "figures")
    (out / "report.md").write_text(page.as_markdown(run, finding, markdown(table), figures), encoding="utf-8")
    index = out / "index.html"
    index.write_text(page.as_html(run, finding, table, figures), encoding="utf-8")
    return index
