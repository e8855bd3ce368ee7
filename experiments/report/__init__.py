"""The report of a run: one self-contained page, Markdown, CSV and figures, rebuilt from the run's files alone."""

from experiments.report.build import build_report

__all__ = ["build_report"]
