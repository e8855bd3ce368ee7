"""The page: one HTML file with everything in it, and the same in Markdown."""

from __future__ import annotations

from typing import Any

from experiments.report.figures import Figure
from experiments.report.finding import Finding
from experiments.report.html import render
from experiments.report.pictures import LICENSE
from experiments.report.records import Cell, Run
from experiments.report.tables import SPREAD, Table, effects_table, markdown, picture_table, shape_table
from experiments.report.viewer import samples

TABLE_NOTE = (
    "Error to teacher: mean squared difference of the two predictions over the mean square of the teacher's. "
    "Error ratio to truth: the student's error against the true target over the teacher's own; 1 is as good as the "
    f"teacher. Values: {SPREAD}. Best among the trained variants: "
)
SHAPES = "Other aspect ratios"
SHAPES_NOTE = "Error to teacher, width × height."
SECTIONS = (
    ("Factors", "effects", "Rows that differ in one thing alone, compared seed by seed."),
    ("Error against resolution", "error", ""),
    ("Samples", "samples", "Choose a picture of the wall; the slider lays it over the teacher's."),
    ("Quality against cost", "pareto", ""),
    ("Error by site", "sites", ""),
    ("Error by timestep", "timesteps", ""),
    ("Mixing matrices and receptive fields", "matrices", ""),
    ("Training curves", "training", ""),
    ("Time and memory", "cost", ""),
)


def as_html(run: Run, finding: Finding, table: Table, figures: list[Figure]) -> str:
    """The self-contained page: styles, script and pictures inline, no network."""
    return render(
        "page.html.j2",
        title=run.name,
        run=run,
        finding=finding,
        table=table,
        factors=effects_table(run, finding.effects),
        table_note=TABLE_NOTE,
        shapes_title=SHAPES,
        shapes_note=SHAPES_NOTE,
        reference_note=_reference(run),
        shapes=shape_table(run),
        pictures=picture_table(run),
        samples=samples(run),
        sections=[(title, [f for f in figures if f.kind == kind], note) for title, kind, note in SECTIONS],
        steps=" or ".join(sorted({f"{c.steps}" for c in run.cells if c.steps})),
        counts=_counts(run),
        facts=_facts,
        failed=[c for c in run.cells if c.status in ("failed", "damaged")],
        unfinished=_unfinished(run),
        environment=_flat(run.grid.get("environment")),
        protocol=_flat(run.protocol),
        notes=[str(n) for n in run.grid.get("notes") or []],
        license=LICENSE,
    )


def as_markdown(run: Run, finding: Finding, table: Table, figures: list[Figure]) -> str:
    """The page in Markdown, pictures beside it in figures/."""
    parts = [f"# {run.name}", run.question, _counts(run), "## Finding"]
    parts += [f"> **{b}**" for b in finding.broken]
    parts += [finding.sentences[0], "\n".join(f"- {s}" for s in finding.sentences[1:]), finding.judged]
    parts += [f"> Caution: {w}" for w in finding.warnings]
    if finding.verdicts:
        parts.append("## Claims")
        parts += [f"- **{v.told}**: {v.state}. {v.sentence}" for v in finding.verdicts]
    parts += ["## Results", markdown(table), f"{TABLE_NOTE}bold. {_reference(run)}"]
    for title, kind, _ in SECTIONS:
        chosen = [f for f in figures if f.kind == kind]
        parts += [f"## {title}"] if chosen else []
        parts += [f"![{f.alt}](figures/{f.path.name})\n\n*{f.caption}*" for f in chosen]
        parts += [markdown(effects_table(run, finding.effects))] if chosen and kind == "effects" else []
    shapes = shape_table(run)
    parts += [f"## {SHAPES}", markdown(shapes), SHAPES_NOTE] if shapes.rows else []
    pictures = picture_table(run)
    parts += ["## Pictures against true ones", markdown(pictures)] if pictures.rows else []
    parts.append("## Exact configuration")
    parts += [f"- `cells/{c.id}/config.json`: {c.variant}, seed {c.seed}, {c.status}" for c in run.cells]
    for title, value in (("Environment", run.grid.get("environment")), ("Protocol", run.protocol)):
        rows = "\n".join(f"| {k} | {v} |" for k, v in _flat(value))
        parts += [f"## {title}", f"| | |\n| --- | --- |\n{rows}" if rows else "Not recorded."]
    parts += [f"- {n}" for n in run.grid.get("notes") or []]
    parts.append("## Failed, unfinished and damaged")
    lines = [f"- {c.id}: {c.status}. {c.error or ''}" for c in run.cells if c.status in ("failed", "damaged")]
    lines += [f"- {u}" for u in _unfinished(run)] + [f"- {p}" for p in run.problems]
    parts += ["\n".join(lines) or "None.", LICENSE]
    return "\n\n".join(p.strip() for p in parts if p) + "\n"


def _counts(run: Run) -> str:
    states = ("done", "failed", "damaged", "unfinished")
    found = {s: sum(c.status == s for c in run.cells) for s in states}
    found["unfinished"] += len(run.missing())
    texts = {"done": "finished"}
    return "Cells: " + ", ".join(f"{n} {texts.get(s, s)}" for s, n in found.items() if n or s == "done") + "."


def _unfinished(run: Run) -> list[str]:
    started = [f"{c.id}: unfinished, {_steps(c)}" for c in run.cells if c.status == "unfinished"]
    return started + [f"{v}, seed {s}: not started" for v, s in run.missing()]


def _steps(cell: Cell) -> str:
    return f"{cell.metrics[-1]['step']:.0f} training steps recorded" if cell.metrics else "no training step recorded"


def _facts(cell: Cell) -> str:
    facts = [f"seed {cell.seed}", cell.status]
    if cell.status == "done":
        facts += [f"{cell.steps} steps"] if cell.steps is not None else []
        facts += [f"{cell.train_seconds:.0f} s of training"] if cell.train_seconds is not None else []
    return ", ".join(facts)


def _flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """(dotted key, text) pairs of a nested object."""
    if not isinstance(value, dict):
        return [(prefix, "" if value is None else str(value))] if prefix else []
    rows = []
    for key, item in value.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(item, list) and any(isinstance(i, dict) for i in item):
            item = {str(k): i for k, i in enumerate(item)}
        if isinstance(item, dict) and item:
            rows += _flat(item, name)
        else:
            rows.append((name, ", ".join(map(str, item)) if isinstance(item, list) else str(item)))
    return rows


def _reference(run: Run) -> str:
    if run.reference is None:
        return ""
    return (
        f"÷ reference: the error over that of “{run.reference.label}”, seed by seed, with its 95 % bootstrap interval; "
        "▼ lower and ▲ higher where the interval excludes 1."
    )
