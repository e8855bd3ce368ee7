"""The page: one HTML file with everything in it, and the same in Markdown."""

from __future__ import annotations

from typing import Any

from experiments.data.emoji import LICENSE
from experiments.metrics import ValueTable
from experiments.report.conclusions import Conclusions
from experiments.report.controls import control_rows
from experiments.report.figures import ReportFigure
from experiments.report.html import render
from experiments.report.metric_tables import metric_table
from experiments.report.run_files import CellRecord, RunRecord
from experiments.report.sample_viewer import collect_samples
from experiments.report.sections import OVERVIEW, report_sections, reported_metrics
from experiments.report.tables import (
    SPREAD,
    ReportTable,
    controls_table,
    effects_table,
    markdown,
    shape_table,
    splits_table,
)

TABLE_NOTE = (
    "Error to teacher: mean squared difference of the two predictions on held-out images, over the mean square of the "
    "teacher's. Error ratio to truth: the student's squared error against the true target over the teacher's own; 1 is "
    f"as good as the teacher. Values: {SPREAD}. Best among the trained variants: "
)
EFFECTS_NOTE = (
    "Ratios of errors to the teacher with their 95 % t intervals for new seeds and images; ▼ lower and ▲ higher if "
    "p < 0.05 after Holm's correction: for the number of effects, and for parts of the rows, for that of effects and "
    "parts together. Among: which rows are compared."
)
CONTROLS_NOTE = (
    "Excess: the error minus that of softmax attention with random projections, trained with the same recipe, in "
    "shares of the teacher's mean square; 0 is as good as the recipe can be expected to get. Share of identity's "
    "error: 1 is as far from the teacher as a student that mixes nothing."
)
SPLITS_NOTE = "Error to teacher on held-out images, and on images whose objects were trained on."
SHAPES_NOTE = "Error to teacher on held-out images, width × height."


def as_html(run: RunRecord, conclusions: Conclusions, table: ReportTable, figures: list[ReportFigure]) -> str:
    """Return the self-contained page: styles, script and images inline, no network."""
    sections = [
        (title, introduction, [figure for figure in figures if figure.section == title], section_tables(run, title))
        for title, introduction in report_sections()
    ]
    return render(
        "page.html.j2",
        title=run.name,
        run=run,
        conclusions=conclusions,
        overview=[figure for figure in figures if figure.section == OVERVIEW],
        table=table,
        table_note=TABLE_NOTE,
        reference_note=_reference_note(run),
        extra_tables=extra_tables(run),
        factors=effects_table(run, conclusions.effects),
        factors_note=EFFECTS_NOTE,
        sections=sections,
        samples=collect_samples(run),
        steps=" or ".join(sorted({str(c.result.steps) for c in run.cells if c.result and c.result.steps})),
        counts=_count_cells(run),
        describe_cell=_describe_cell,
        failed=[cell for cell in run.cells if cell.state in ("failed", "damaged")],
        unfinished=_unfinished(run),
        environment=_flatten(run.description.environment),
        protocol=_flatten(run.protocol),
        notes=run.description.notes,
        license=LICENSE,
    )


def as_markdown(run: RunRecord, conclusions: Conclusions, table: ReportTable, figures: list[ReportFigure]) -> str:
    """Return the page in Markdown, with images beside it in figures/."""
    parts = [f"# {run.name}", run.description.question, _count_cells(run), "## Conclusions"]
    parts += [f"> **{fault}**" for fault in conclusions.broken]
    sentences = "\n".join(f"- {sentence}" for sentence in conclusions.sentences[1:])
    parts += [conclusions.sentences[0], sentences, conclusions.method]
    parts += [f"> Caution: {warning}" for warning in conclusions.warnings]
    if conclusions.verdicts:
        parts.append("## Claims")
        parts += [f"- **{v.statement}**: {v.state}. {v.evidence}" for v in conclusions.verdicts]
    parts += [_markdown_figure(figure) for figure in figures if figure.section == OVERVIEW]
    parts += ["## Results", markdown(table), f"{TABLE_NOTE}bold. {_reference_note(run)}"]
    for title, extra, note in extra_tables(run):
        parts += [f"## {title}", markdown(extra), note]
    for title, introduction in report_sections():
        parts += _markdown_section(run, conclusions, title, introduction, figures)
    parts.append("## Exact configuration")
    parts += [f"- `cells/{c.id}/config.json`: {c.variant}, seed {c.seed}, {c.state}" for c in run.cells]
    for title, value in (("Environment", run.description.environment), ("Protocol", run.protocol)):
        rows = "\n".join(f"| {key} | {text} |" for key, text in _flatten(value))
        parts += [f"## {title}", f"| | |\n| --- | --- |\n{rows}" if rows else "Not recorded."]
    parts += [f"- {note}" for note in run.description.notes]
    parts.append("## Failed, unfinished and damaged")
    lines = [f"- {c.id}: {c.state}. {c.error or ''}" for c in run.cells if c.state in ("failed", "damaged")]
    lines += [f"- {line}" for line in (*_unfinished(run), *run.problems)]
    parts += ["\n".join(lines) or "None.", LICENSE]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def extra_tables(run: RunRecord) -> list[tuple[str, ReportTable, str]]:
    """Return (title, table, note) of the tables below the main one that have rows."""
    tables = (
        ("Controls", controls_table(run, control_rows(run)), CONTROLS_NOTE),
        ("Held-out and held-in images", splits_table(run), SPLITS_NOTE),
        ("Other aspect ratios", shape_table(run), SHAPES_NOTE),
    )
    return [(title, table, note) for title, table, note in tables if table.rows]


def section_tables(run: RunRecord, title: str) -> list[tuple[ReportTable, str]]:
    """Return (table, caption) of the tables that a section's metrics declare, if they have rows."""
    specs = [
        (metric, spec)
        for metric in reported_metrics()
        if metric.title == title
        for spec in metric.figures
        if isinstance(spec, ValueTable)
    ]
    tables = [(metric_table(run, metric, spec), spec.caption) for metric, spec in specs]
    return [(table, caption) for table, caption in tables if table.rows]


def _markdown_figure(figure: ReportFigure) -> str:
    return f"![{figure.alt}](figures/{figure.path.name})\n\n*{figure.caption}*"


def _markdown_section(
    run: RunRecord, conclusions: Conclusions, title: str, introduction: str, figures: list[ReportFigure]
) -> list[str]:
    own = [figure for figure in figures if figure.section == title]
    tables = section_tables(run, title)
    if not own and not tables:
        return []
    parts = [f"## {title}", introduction]
    parts += [_markdown_figure(figure) for figure in own]
    if title == "Factors":
        parts += [markdown(effects_table(run, conclusions.effects)), EFFECTS_NOTE]
    for table, caption in tables:
        parts += [markdown(table), caption]
    return parts


def _count_cells(run: RunRecord) -> str:
    counts = {state: sum(cell.state == state for cell in run.cells) for state in ("done", "failed", "damaged")}
    counts["unfinished"] = sum(cell.state == "unfinished" for cell in run.cells) + len(run.missing())
    names = {"done": "finished"}
    return "Cells: " + ", ".join(f"{n} {names.get(s, s)}" for s, n in counts.items() if n or s == "done") + "."


def _unfinished(run: RunRecord) -> list[str]:
    started = [f"{c.id}: unfinished, {_steps_logged(c)}" for c in run.cells if c.state == "unfinished"]
    return started + [f"{variant}, seed {seed}: not started" for variant, seed in run.missing()]


def _steps_logged(cell: CellRecord) -> str:
    return f"{cell.log[-1]['step']:.0f} training steps recorded" if cell.log else "no training step recorded"


def _describe_cell(cell: CellRecord) -> str:
    facts = [f"seed {cell.seed}", cell.state]
    if cell.state == "done" and cell.result is not None:
        facts += [f"{cell.result.steps} steps", f"{cell.result.train_seconds:.0f} s of training"]
    return ", ".join(facts)


def _flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """(dotted key, text) pairs of a nested object."""
    if not isinstance(value, dict):
        return [(prefix, "" if value is None else str(value))] if prefix else []
    rows = []
    for key, item in value.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(item, list) and any(isinstance(i, dict) for i in item):
            item = {str(k): i for k, i in enumerate(item)}
        if isinstance(item, dict) and item:
            rows += _flatten(item, name)
        else:
            rows.append((name, ", ".join(map(str, item)) if isinstance(item, list) else str(item)))
    return rows


def _reference_note(run: RunRecord) -> str:
    if run.reference is None:
        return ""
    return (
        f"÷ reference: the error over that of “{run.reference.label}”, seed by seed and image by image, with its 95 % "
        "t interval; ▼ lower and ▲ higher if the interval excludes 1 (not corrected for the number of rows)."
    )
