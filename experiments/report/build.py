"""THE flow of a report: files -> run -> effects, conclusions, tables, figures -> page."""

from __future__ import annotations

from pathlib import Path

from experiments.core.files import write_text
from experiments.report.conclusions import draw_conclusions
from experiments.report.export import write_numbers
from experiments.report.figures import draw_figures
from experiments.report.page import as_html, as_markdown
from experiments.report.run_files import load_run
from experiments.report.tables import main_table


def build_report(run_dir: Path) -> Path:
    """Build `run_dir/report/` and return the path of its page.

    It holds index.html (self-contained), report.md, results.csv, .parquet and .tex, figures/*.png and *.svg. Everything
    is read from the run's files, finished or not, so a report can be rebuilt at any time.

    Raises:
        ValueError: `run_dir/grid.json` is missing or damaged.
    """
    run = load_run(Path(run_dir))
    out = Path(run_dir) / "report"
    out.mkdir(parents=True, exist_ok=True)
    conclusions = draw_conclusions(run)
    table = main_table(run)
    write_numbers(run, table, out)
    figures = draw_figures(run, conclusions.effects, out / "figures")
    write_text(out / "report.md", as_markdown(run, conclusions, table, figures))
    index = out / "index.html"
    write_text(index, as_html(run, conclusions, table, figures))
    return index
